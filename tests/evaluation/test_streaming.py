"""Bounded caches that are fed, against a loop that feeds them one by one."""

from __future__ import annotations

import math

import pytest
import torch

from kvenv.cache import EvictionCache
from kvenv.errors import KvenvError
from kvenv.evaluation.streaming import Streaming
from kvenv.learning.agent import Heuristic
from kvenv.scorers import load_scorer

LIMITS = {"sinks": 2, "recent": 3}


class Half(Heuristic):
    heads = frozenset({(0, 0), (0, 1), (1, 1)})

    def score(self, layer, keys, values, positions, now, **needs):
        return positions.float()


@pytest.fixture(scope="module")
def streaming(families):
    def make(*names: str, family: str = "llama", budgets=(16,), **limits: int) -> Streaming:
        scorers = {name: load_scorer(name) for name in names}
        return Streaming(families(family)[0], scorers, budgets, **{**LIMITS, **limits})

    return make


def by_hand(model, name: str, traces, index: int, budget: int, ends: list[int], first: int):
    """The mean loss of tokens ``first`` on, each forward pass ending where ``ends`` say."""
    ids = torch.from_numpy(traces.tokens(index)).long().unsqueeze(0)
    cache = EvictionCache(model, load_scorer(name), budget=budget, **LIMITS)
    found = []
    with torch.inference_mode():
        begin = 0
        for end in ends:
            logits = model(ids[:, begin:end], past_key_values=cache).logits[0].double()
            for at in range(begin, min(end, ids.shape[1] - 1)):
                found.append(-logits[at - begin].log_softmax(-1)[ids[0, at + 1]].item())
            begin = end
    return sum(found[first - 1 :]) / len(found[first - 1 :])


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("name", ["random", "keydiff"])
@pytest.mark.parametrize("step", [1, 4])
def test_a_text_is_fed_bit_by_bit(families, sets, streaming, family, name, step) -> None:
    """Equal lengths in one batch; what the budget holds may come at once."""
    model, traces = families(family)[0], sets(family)
    ours = streaming(name, family=family, budgets=(20, 12), step=step)
    batches = ours.texts([traces])
    assert [(b.documents, b.first) for b in batches] == [
        (["document 1"], 20),
        (["document 0", "document 2"], 20),
    ]
    section = ours.run(batches)
    assert (section["documents"], section["tokens"]) == (3, 2 * 36 + 26)
    assert {key: section[key] for key in LIMITS} == LIMITS
    for budget in (20, 12):
        expected = 0.0
        for index, length in enumerate((56, 46, 56)):
            steps = [min(end, length) for end in range(budget + step, length + step, step)]
            ends = [*range(1, budget + 1), *steps]
            expected += by_hand(model, name, traces, index, budget, ends, 20) / 3
        figures = section["agents"][name][str(budget)]
        assert math.log(figures["mean"]) == pytest.approx(expected, rel=1e-4)
        ratio = figures["mean"] / section["full"]["mean"] - 1
        assert figures["versus_full"]["mean"] == pytest.approx(ratio)
        assert abs(ratio) > 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_full_cache_s_figure_is_a_plain_forward_pass_s(
    families, sets, streaming, family
) -> None:
    model, traces = families(family)[0], sets(family)
    ours = streaming("random", family=family, budgets=(20, 56 - 11))
    means = []
    for index in range(3):
        ids = torch.from_numpy(traces.tokens(index)).long().unsqueeze(0)
        with torch.no_grad():
            spread = model(ids).logits[0, 44:-1].double().log_softmax(-1)
        means.append(-spread.gather(-1, ids[0, 45:, None]).mean().item())
    section = ours.run(ours.texts([traces]))
    assert math.log(section["full"]["mean"]) == pytest.approx(sum(means) / 3, rel=1e-5)


def test_a_budget_for_everything_is_the_full_cache(streaming, sets) -> None:
    ours = streaming("random", "keydiff", budgets=(45,))
    batches = [b for b in ours.texts([sets("llama")]) if b.tokens.shape[1] == 46]
    figures = ours.run(batches)["agents"]
    for name in ("random", "keydiff"):
        assert figures[name]["45"]["versus_full"]["mean"] == pytest.approx(0, abs=1e-5)


def test_batches_are_no_larger_than_asked(streaming, sets) -> None:
    batches = streaming("random").texts([sets("llama")] * 3, rows=4)
    assert [len(b.documents) for b in batches] == [3, 4, 2]
    assert {b.tokens.shape for b in batches} == {(3, 46), (4, 56), (2, 56)}


def test_conversations_are_bounded_after_every_turn(families, recorded, streaming) -> None:
    turns = [[0, 25, 31, 44], [0, 37], None]
    facts = [{} if t is None else {"turns": t} for t in turns]
    traces = recorded("llama", facts=facts)
    ours = streaming("random", "keydiff", budgets=(20, 12))
    batches = ours.conversations([traces])
    assert [(b.documents, list(b.turns), b.first) for b in batches] == [
        (["document 0"], [0, 25, 31, 44], 25),
        (["document 1"], [0, 37], 37),
    ]
    section = ours.run(batches)
    assert (section["documents"], section["tokens"]) == (2, 31 + 9)
    model = families("llama")[0]
    for name in ("random", "keydiff"):
        for budget in (20, 12):
            expected = [
                by_hand(model, name, traces, 0, budget, [25, 31, 44, 56], 25),
                by_hand(model, name, traces, 1, budget, [37, 46], 37),
            ]
            mean = section["agents"][name][str(budget)]["mean"]
            assert math.log(mean) == pytest.approx(sum(expected) / 2, rel=1e-4)


def test_agents_that_cannot_decode_are_left_out_and_named(streaming, sets) -> None:
    ours = streaming("random", "oracle")
    section = ours.run(ours.texts([sets("llama")]))
    assert list(section["agents"]) == ["random"]
    assert section["left_out"] == {"oracle": "needs utility"}
    with pytest.raises(KvenvError, match="none of the agents oracle can decode"):
        streaming("oracle")


def test_every_pass_ticks(streaming, sets) -> None:
    ours = streaming("random", "knorm", "oracle", budgets=(20, 12, 20))
    batches, ticks = ours.texts([sets("llama")]), []
    ours.run(batches, tick=lambda: ticks.append(None))
    assert len(ticks) == ours.passes(batches) == 2 * (1 + 2 * 2)


def test_what_cannot_be_fed_is_refused_at_once(families, sets, streaming) -> None:
    with pytest.raises(KvenvError, match=r"episode 1 of .* has 46 tokens, none after the first 46"):
        streaming("random", budgets=(12, 46)).texts([sets("llama")])
    with pytest.raises(KvenvError, match="no episode tells where its turns begin"):
        streaming("random").conversations([sets("llama")])
    with pytest.raises(KvenvError, match="no token budgets"):
        streaming("random", budgets=())
    with pytest.raises(KvenvError, match="agent random cannot decode: budget 4 cannot hold"):
        streaming("random", budgets=(16, 4))
    with pytest.raises(KvenvError, match=r"agent half cannot decode: Half has no scores for 1"):
        Streaming(families("llama")[0], {"half": Half()}, (16,), **LIMITS)
    with pytest.raises(KvenvError, match="was recorded from"):
        streaming("random", family="gemma").texts([sets("llama")])
    with pytest.raises(KvenvError, match="step is 0"):
        streaming("random", step=0)


@pytest.mark.parametrize("turns", [[0], [1, 20], [0, 20, 20], [0, 46], [0, 2.5]])
def test_turns_that_are_none_are_an_error(recorded, streaming, turns) -> None:
    traces = recorded("llama", facts=[{"turns": turns}] * 3)
    with pytest.raises(KvenvError, match="must be two or more token offsets, rising from 0"):
        streaming("random", budgets=(12,)).conversations([traces])
