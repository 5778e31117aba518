"""A cut cache against plain attention that is told, head by head, which tokens are left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, DynamicCache

from kvenv.cache import EvictionCache
from kvenv.errors import KvenvError
from kvenv.evaluation.accuracy import greedy
from kvenv.evaluation.calibrating import calibrate
from kvenv.evaluation.cut import Cutter, Prompt, forward
from kvenv.evaluation.cutlayer import CutLayer
from kvenv.evaluation.retention import score_prompt
from kvenv.learning.agent import Heuristic
from kvenv.recording.capture import attention_of
from kvenv.rules import compete, protect
from kvenv.scorers import load_scorer

KEPT: dict[int, torch.Tensor] = {}
PROMPT = 44


class Aged(Heuristic):
    """Scores by position that fade with age at a pace of each head's own; a few are infinite."""

    def score(self, layer, keys, values, positions, now, **needs):
        age = now.view(-1, 1, 1) - positions
        scores = (positions * 7 + layer) % 11 - age * torch.tensor([0.1, 0.9]).view(1, -1, 1)
        return scores.masked_fill(positions % 13 == 5, torch.inf)


class Half(Heuristic):
    heads = frozenset({(0, 0), (0, 1), (1, 1)})

    def score(self, layer, keys, values, positions, now, **needs):
        return positions.float()


def reference(module, query, key, value, attention_mask, scaling, **kwargs: Any):
    """Attention in which what follows the prompt sees of it only what each head has kept."""
    length, window = query.shape[2], kwargs.get("sliding_window")
    group = query.shape[1] // key.shape[1]
    q, k = torch.arange(length).view(-1, 1), torch.arange(length)
    seen = (k <= q).repeat(key.shape[1], 1, 1)
    if window:
        seen &= q - k < window
    else:
        left = torch.zeros(key.shape[1], length, dtype=torch.bool)
        left[:, PROMPT:] = True
        left.scatter_(-1, KEPT[module.layer_idx], True)
        seen &= left.unsqueeze(1) | (q < PROMPT)
    weights = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scaling
    weights = weights.masked_fill(~seen.repeat_interleave(group, 0), -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2), None


AttentionInterface.register("kvenv_test_reference", reference)


@pytest.fixture(scope="module")
def cutter(families, sets) -> Callable[..., Cutter]:
    def make(family: str, *names: str, **options: Any) -> Cutter:
        model = copy.deepcopy(families(family)[0]).double()
        scorers = {name: load_scorer(name) for name in names}
        settings = {"budgets": [0.5], "sinks": 0, "recent": 0, **options}
        return Cutter(model, [sets(family)], scorers, **settings)

    return make


@pytest.mark.parametrize("budget", [1, 7, 30, PROMPT])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_what_follows_sees_what_each_head_kept(cutter, family: str, budget: int) -> None:
    ours = cutter(family, "random", "knorm", "oracle")
    prompt = ours.read(ours.sets[0], 0)
    logits = forward(ours.model, prompt.cut(budget), prompt.future.expand(3, -1), PROMPT)
    tokens = torch.from_numpy(ours.sets[0].tokens(0)).long().unsqueeze(0)
    for row in range(3):
        for layer, orders in prompt.orders.items():
            KEPT[layer] = orders[row, :, :budget]
        with torch.no_grad(), attention_of(ours.model, "kvenv_test_reference"):
            expected = ours.model(tokens, use_cache=False).logits[0, PROMPT:]
        torch.testing.assert_close(logits[row], expected, rtol=1e-9, atol=1e-9)
    if 1 < budget < PROMPT:  # and rows and heads did keep different tokens
        kept = prompt.kept(max(prompt.orders), budget).tolist()
        assert kept[0] != kept[1]
        assert kept[1][0] != kept[1][1]


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_budget_of_the_whole_prompt_is_the_full_cache(cutter, family: str) -> None:
    ours = cutter(family, "random", "knorm")
    prompt = ours.read(ours.sets[0], 0)
    tokens = torch.from_numpy(ours.sets[0].tokens(0)).long().unsqueeze(0)
    with torch.no_grad():
        plain = ours.model(tokens).logits[0]
    for cache in (prompt.whole(), prompt.cut(PROMPT), prompt.cut(PROMPT + 5)):
        rows = cache.layers[-1].keys.shape[0]
        logits = forward(ours.model, cache, prompt.future.expand(rows, -1), PROMPT)
        torch.testing.assert_close(logits, plain[PROMPT:].expand(rows, -1, -1))
    torch.testing.assert_close(prompt.logits[0], plain[PROMPT - 1])


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_tokens_may_come_in_any_portions(cutter, family: str) -> None:
    ours = cutter(family, "random", "knorm")
    prompt = ours.read(ours.sets[0], 0)
    future = prompt.future.expand(2, -1)
    at_once = forward(ours.model, prompt.cut(20), future, PROMPT)
    cache, start, parts = prompt.cut(20), PROMPT, []
    for part in future.split([1, 1, 5, 2, 3], dim=1):
        parts.append(forward(ours.model, cache, part, start))
        start += part.shape[1]
        assert cache.get_seq_length() == start
    torch.testing.assert_close(torch.cat(parts, 1), at_once)
    assert forward(ours.model, prompt.cut(20), future, PROMPT, keep=1).shape[1] == 1


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("name", ["random", "keydiff", "aged"])
def test_a_cut_is_an_eviction_cache_s_first_step(families, sets, family: str, name: str) -> None:
    model, traces = families(family)[0], sets(family)
    scorer = Aged() if name == "aged" else load_scorer(name)
    cutter = Cutter(model, [traces], {name: scorer}, budgets=[0.5], sinks=3, recent=5)
    prompt = cutter.read(traces, 0)
    cut, step = (
        prompt.cut(17),
        EvictionCache(model, scorer, budget=29, refresh=12, sinks=3, recent=5),
    )
    tokens = torch.from_numpy(traces.tokens(0)).long().unsqueeze(0)
    with torch.inference_mode():
        model(tokens[:, :PROMPT], past_key_values=step)
        for layer, (mine, theirs) in enumerate(zip(cut.layers, step.layers, strict=True)):
            if layer in prompt.orders:
                assert prompt.kept(layer, 17).tolist() == step.positions(layer).tolist()
            else:
                torch.testing.assert_close(mine.keys, theirs.keys)
                torch.testing.assert_close(mine.values, theirs.values)
        expected = model(tokens[:, PROMPT:], past_key_values=step).logits
    logits = forward(model, cut, prompt.future.unsqueeze(0), PROMPT)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def budgets_of(prompt: Prompt, shift: int = 0) -> dict[int, torch.Tensor]:
    """Budgets that differ between heads and layers; one layer's are equal, another's are all."""
    return {
        layer: torch.tensor([(20, 20), (7, PROMPT), (1, 12)][(at + shift) % 3]).expand(
            prompt.rows, -1
        )
        for at, layer in enumerate(prompt.orders)
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_heads_may_have_budgets_of_their_own(
    cutter, family: str, shift: int, attention: str
) -> None:
    ours = cutter(family, "random", "knorm")
    prompt = ours.read(ours.sets[0], 0)
    budgets = budgets_of(prompt, shift)
    tokens = torch.from_numpy(ours.sets[0].tokens(0)).long().unsqueeze(0)
    cache, start, parts = prompt.cut(budgets), PROMPT, []
    with attention_of(ours.model, attention):
        for part in prompt.future.expand(2, -1).split([1, 4, 1, 6], dim=1):
            parts.append(forward(ours.model, cache, part, start))
            start += part.shape[1]
            assert cache.get_seq_length() == start
    logits = torch.cat(parts, 1)
    close = 1e-9 if attention == "sdpa" else 1e-5  # its softmax is float32
    for row in range(2):
        for layer, orders in prompt.orders.items():
            kept = [
                order[:size] for order, size in zip(orders[row], budgets[layer][row], strict=True)
            ]
            full = [torch.cat([one, one[:1].expand(PROMPT - len(one))]) for one in kept]
            KEPT[layer] = torch.stack(full)
        with torch.no_grad(), attention_of(ours.model, "kvenv_test_reference"):
            expected = ours.model(tokens, use_cache=False).logits[0, PROMPT:]
        torch.testing.assert_close(logits[row], expected, rtol=close, atol=close)


def test_equal_budgets_of_heads_are_one_budget(cutter) -> None:
    ours = cutter("gemma", "random", "knorm")
    prompt = ours.read(ours.sets[0], 0)
    future = prompt.future.expand(2, -1)
    whole = forward(ours.model, prompt.cut(17), future, PROMPT)
    each = forward(
        ours.model, prompt.cut(dict.fromkeys(prompt.orders, torch.full((2, 2), 17))), future, PROMPT
    )
    torch.testing.assert_close(each, whole)
    ragged = prompt.kept(1, torch.tensor([3, 5]).expand(2, -1))
    assert ragged[:, 0, :2].eq(-1).all()
    assert ragged[:, 0, 2:].tolist() == prompt.kept(1, 3)[:, 0].tolist()
    assert ragged[:, 1].tolist() == prompt.kept(1, 5)[:, 1].tolist()


def test_heads_that_differ_are_not_fed_where_nothing_masks_them(cutter) -> None:
    ours = cutter("llama", "knorm")
    prompt = ours.read(ours.sets[0], 0)
    cache, tokens = prompt.cut(budgets_of(prompt)), prompt.future.unsqueeze(0)
    forward(ours.model, cache, tokens[:, :2], PROMPT)
    with (
        torch.inference_mode(),
        pytest.raises(KvenvError, match=r"feed it with kvenv\.evaluation\.cut\.forward"),
    ):
        ours.model(tokens[:, 2:], past_key_values=cache)
    with (
        attention_of(ours.model, "kvenv_test_reference"),
        pytest.raises(KvenvError, match="'kvenv_test_reference' takes no mask for each head"),
    ):
        forward(ours.model, cache, tokens[:, 2:], PROMPT + 2)


@pytest.mark.parametrize("allocation", ["layerwise", "adaptive"])
def test_heads_compete_for_one_total(families, sets, allocation: str) -> None:
    """Against the rules applied by hand to calibrated scores."""
    traces, scorers = sets("llama"), {"aged": Aged(), "knorm": load_scorer("knorm")}
    tables = {name: calibrate(one, [traces]) for name, one in scorers.items()}
    ours = Cutter(
        families("llama")[0],
        *([traces], scorers),
        budgets=[0.5],
        sinks=2,
        recent=3,
        calibrations=tables,
        allocations=["uniform", allocation],
    )
    rows = ("aged", "knorm", f"aged ({allocation})", f"knorm ({allocation})")
    assert ours.agents == rows
    prompt = ours.read(traces, 0)
    counts = prompt.counts(22, allocation, 5)
    _, scores = score_prompt(traces, 0, scorers, traces.heads)
    for row, name in enumerate(scorers):
        masses = torch.cat(
            [tables[name].masses_of(at, scores[name][None, 2 * at : 2 * at + 2]) for at in (0, 1)]
        )
        masses = protect(masses, 2, 3)
        if allocation == "adaptive":
            expected = compete(masses.view(1, 4, -1), 88, 5).view(2, 2)
        else:
            expected = compete(masses, 44, 5)
        assert torch.stack([counts[at][row] for at in (0, 1)]).tolist() == expected.tolist()
    assert sum(int(one.sum()) for one in counts.values()) == 2 * 88
    assert len({int(number) for one in counts.values() for number in one.flatten()}) > 1
    caches = list(ours.cuts(prompt, 0.5))
    assert isinstance(caches[0].layers[0].absent, type(None))
    for at in (0, 1):
        assert (~caches[1].layers[at].absent).sum(-1).tolist() == counts[at].tolist()


def test_competing_needs_a_calibration(families, sets) -> None:
    with pytest.raises(KvenvError, match=r"agent aged has no calibration.*--calibrate-on"):
        Cutter(
            *(families("llama")[0], [sets("llama")], {"aged": Aged()}),
            budgets=[0.9],
            allocations=["adaptive"],
        )


def test_sinks_and_recent_tokens_stay_whatever_a_scorer_says(families, sets) -> None:
    options = {"budgets": [0.25], "sinks": 2, "recent": 3}
    cutter = Cutter(families("llama")[0], [sets("llama")], {"aged": Aged()}, **options)
    kept = cutter.read(sets("llama"), 0).kept(0, 5)
    assert kept.tolist() == [[[0, 1, PROMPT - 3, PROMPT - 2, PROMPT - 1]] * 2]


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_generate_works_unmodified(cutter, family: str) -> None:
    ours = cutter(family, "random", "knorm", "keydiff")
    prompt = ours.read(ours.sets[0], 0)
    asked = prompt.future[:5].expand(3, -1)
    tokens = torch.from_numpy(ours.sets[0].tokens(0)).long()[: PROMPT + 5].expand(3, -1)
    theirs = ours.model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=prompt.cut(20),
        max_new_tokens=9,
        do_sample=False,
        pad_token_id=0,
    )[:, PROMPT + 5 :]
    cache = prompt.cut(20)
    with torch.inference_mode():
        logits = forward(ours.model, cache, asked, PROMPT, keep=1)[:, -1]
        own = greedy(ours.model, cache, logits, PROMPT + 5, 9, frozenset())
    assert own == theirs.tolist()
    assert len({tuple(row) for row in own}) > 1


def test_a_prompt_can_be_cut_again_and_again(cutter) -> None:
    ours = cutter("gemma", "random")
    prompt = ours.read(ours.sets[0], 0)
    first = forward(ours.model, prompt.cut(12), prompt.future.unsqueeze(0), PROMPT)
    forward(ours.model, prompt.whole(), prompt.future.unsqueeze(0), PROMPT)
    again = forward(ours.model, prompt.cut(12), prompt.future.unsqueeze(0), PROMPT)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert prompt.cache.get_seq_length() == PROMPT


def test_every_episode_of_every_set_is_read_in_order(families, sets) -> None:
    cutter = Cutter(
        families("llama")[0], [sets("llama")] * 2, {"aged": Aged()}, budgets=[1], recent=0
    )
    assert len(cutter) == 6
    assert [prompt.info.n for prompt in cutter] == [44, 37, 44] * 2


def test_older_transformers_give_positions_to_the_mask() -> None:
    layer = CutLayer(torch.zeros(2, 1, 6, 4), torch.zeros(2, 1, 6, 4), evicted=9)
    assert layer.get_seq_length() == 15
    assert layer.get_mask_sizes(3) == layer.get_mask_sizes(torch.arange(15, 18)) == (9, 9)


def test_another_model_is_refused(families, sets, checkpoints) -> None:
    from kvenv import models

    other, _ = models.load(str(checkpoints(1)))
    with pytest.raises(KvenvError, match=f"recorded from {checkpoints(0)}, not {checkpoints(1)}"):
        Cutter(other, [sets("llama")], {"aged": Aged()}, budgets=[0.5])


@pytest.mark.parametrize(
    ("scorers", "options", "message"),
    [
        ({}, {}, "no agents given"),
        ({"half": Half()}, {}, r"agent half has no scores for 1 of the 4 heads .* \(1, 0\): train"),
        ({"aged": Aged()}, {"budgets": []}, "no budgets given"),
        ({"aged": Aged()}, {"budgets": [1.5]}, "budget 1.5 is not in"),
        ({"aged": Aged()}, {"sinks": -1}, "sinks -1 and recent 5"),
        (
            {"aged": Aged()},
            {"budgets": [0.5, 0.2]},
            r"episode 1 of .*: budget 0.2 of 37 prompt tokens is 7, which cannot hold",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_at_once(
    families, sets, scorers: dict, options: dict, message: str
) -> None:
    settings = {"budgets": [0.5], "sinks": 3, "recent": 5, **options}
    with pytest.raises(KvenvError, match=message):
        Cutter(families("llama")[0], [sets("llama")], scorers, **settings)


def test_a_set_without_every_layer_is_refused(families, recorded) -> None:
    part = recorded("llama", [(30, 4)], layers=[1])
    with pytest.raises(
        KvenvError, match=r"lacks the full-attention layers \[0\].*without --layers"
    ):
        Cutter(families("llama")[0], [part], {"aged": Aged()}, budgets=[0.9])


def test_nan_scores_are_refused(families, sets) -> None:
    class Broken(Aged):
        def score(self, layer, keys, values, positions, now, **needs):
            return super().score(layer, keys, values, positions, now) + torch.nan

    cutter = Cutter(families("llama")[0], [sets("llama")], {"broken": Broken()}, budgets=[1])
    with pytest.raises(KvenvError, match="agent broken gave NaN scores in layer 0, episode 0"):
        cutter.read(sets("llama"), 0)


def test_the_oracle_is_known_by_what_it_needs(cutter) -> None:
    assert cutter("llama", "random", "oracle").oracle == "oracle"
    assert cutter("llama", "random").oracle is None


def test_the_model_s_own_cache_is_only_read(cutter) -> None:
    ours = cutter("llama", "random")
    prompt = ours.read(ours.sets[0], 0)
    whole = prompt.whole()
    assert isinstance(whole, DynamicCache)
    forward(ours.model, whole, prompt.future.unsqueeze(0), PROMPT)
    assert (prompt.cache.get_seq_length(), whole.get_seq_length()) == (PROMPT, PROMPT + 12)
