from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kvenv.errors import KvenvError
from kvenv.evaluation import perplexity as module
from kvenv.evaluation.calibrating import calibrate
from kvenv.evaluation.cut import Cutter, forward
from kvenv.evaluation.perplexity import Perplexity, losses
from kvenv.evaluation.statistics import interval
from kvenv.scorers import load_scorer

NAMES = ("random", "knorm", "oracle")


def by_hand(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """What each token after the first cost, from logits at every token."""
    chances = logits.double().softmax(-1)
    return -chances[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1).log()


@pytest.fixture(scope="module")
def cutter(families, sets):
    def make(*names: str, family: str = "llama", budgets=(0.5, 0.25)) -> Cutter:
        scorers = {name: load_scorer(name) for name in names}
        model = families(family)[0]
        return Cutter(model, [sets(family)], scorers, budgets=budgets, sinks=2, recent=3)

    return make


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_losses_are_those_of_a_plain_forward_pass(
    families, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = families(family)[0]
    tokens = torch.randint(256, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = by_hand(model(tokens).logits, tokens)

    def ours(*given, **options) -> torch.Tensor:
        return losses(model, DynamicCache(config=model.config), tokens, *given, **options)

    torch.testing.assert_close(ours(), expected, rtol=1e-5, atol=1e-5)
    for sizes in ([40], [13, 1, 1, 7, 30], [1] * 40, [38, 2], [39, 1]):
        for first in (1, 14, 15, 39):
            found = ours(sizes, first=first)
            torch.testing.assert_close(found, expected[:, first - 1 :], rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(module, "LOGITS", 3 * 256 * 5)  # five tokens a pass
    torch.testing.assert_close(ours(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_section_is_that_of_its_definitions(cutter, family: str) -> None:
    ours = cutter(*NAMES, family=family)
    task = Perplexity(ours)
    full, cut = [], []
    for prompt in ours:
        task.add(prompt)
        n, future = prompt.info.n, prompt.future.unsqueeze(0)
        full.append(by_hand(forward(ours.model, prompt.whole(), future, n), future).mean())
        rows = future.expand(3, -1)
        logits = [forward(ours.model, prompt.cut(round(n * f)), rows, n) for f in (0.5, 0.25)]
        cut.append([by_hand(one, rows).mean(-1).tolist() for one in logits])
    section = task.result()
    full, cut, documents = np.array(full), np.array(cut), [f"document {i}" for i in range(3)]
    assert (section["sinks"], section["recent"], section["protocol"]) == (2, 3, "cut once")
    assert (section["tokens"], section["documents"]) == (11 + 8 + 11, 3)
    assert section["full"]["mean"] == pytest.approx(np.exp(full.mean()), rel=1e-5)
    for column, name in enumerate(NAMES):
        assert list(section["agents"][name]) == ["0.5", "0.25"]
        for row, budget in enumerate(("0.5", "0.25")):
            figures, own = section["agents"][name][budget], cut[:, row, column]
            for key, value in interval(own, documents).items():
                assert figures[key] == pytest.approx(np.exp(value), rel=1e-5)
            versus = {"versus_full": full, "versus_oracle": cut[:, row, 2]}
            for key, other in versus.items():
                if key == "versus_oracle" and name == "oracle":
                    assert figures[key] is None
                    continue
                paired = interval(own - other, documents)
                assert figures[key]["mean"] == pytest.approx(np.exp(paired["mean"]) - 1, rel=1e-3)
                assert figures[key]["low"] == pytest.approx(np.exp(paired["low"]) - 1, rel=1e-3)
    figures = section["agents"]["random"]["0.25"]
    assert figures["versus_full"]["low"] < figures["versus_full"]["high"]
    assert figures["versus_full"]["mean"] != pytest.approx(figures["versus_oracle"]["mean"])


def test_allocations_are_rows_of_their_own(families, sets) -> None:
    traces, scorer = sets("llama"), load_scorer("knorm")
    ours = Cutter(
        *(families("llama")[0], [traces], {"knorm": scorer}),
        budgets=[0.5],
        sinks=2,
        recent=3,
        allocations=["uniform", "adaptive"],
        calibrations={"knorm": calibrate(scorer, [traces])},
    )
    task, costs = Perplexity(ours), []
    for prompt in ours:
        task.add(prompt)
        n, future = prompt.info.n, prompt.future.unsqueeze(0)
        caches = [prompt.cut(round(n / 2)), prompt.cut(prompt.counts(round(n / 2), "adaptive", 5))]
        logits = [forward(ours.model, cache, future, n) for cache in caches]
        costs.append([float(by_hand(one, future).mean()) for one in logits])
    agents = task.result()["agents"]
    assert list(agents) == ["knorm", "knorm (adaptive)"]
    means = [agents[name]["0.5"]["mean"] for name in agents]
    assert means == pytest.approx(np.exp(np.array(costs).mean(0)), rel=1e-5)
    assert means[0] != pytest.approx(means[1], rel=1e-4)


def test_the_whole_prompt_as_budget_costs_nothing(cutter) -> None:
    ours = cutter("random", budgets=[1])
    task = Perplexity(ours)
    task.add(ours.read(ours.sets[0], 0))
    figures = task.result()["agents"]["random"]["1.0"]
    assert figures["versus_full"]["mean"] == pytest.approx(0, abs=1e-5)
    assert figures["versus_oracle"] is None


def test_one_future_token_is_too_few(families, recorded) -> None:
    short = recorded("llama", [(30, 1)])
    cutter = Cutter(
        families("llama")[0], [short], {"random": load_scorer("random")}, budgets=[1], recent=0
    )
    with pytest.raises(KvenvError, match=r"episode 0 of .* has 1 future token: perplexity"):
        Perplexity(cutter)
