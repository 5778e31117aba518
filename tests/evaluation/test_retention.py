from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvenv import plugins
from kvenv import rules as ut
from kvenv.errors import KvenvError
from kvenv.evaluation.retention import (
    BUDGETS,
    METRICS,
    Measurement,
    layer_inputs,
    measure,
)
from kvenv.learning.agent import Heuristic
from kvenv.trace import TraceSet

LENGTHS = ((40, 6), (24, 5), (33, 7))


class Watching(Heuristic):
    """Scores from a table by position, kept beside what it was called with."""

    needs = frozenset({"queries", "past_attention"})

    def __init__(self) -> None:
        self.calls: list[tuple[int, dict[str, torch.Tensor]]] = []

    def score(self, layer: int, keys: torch.Tensor, *given: torch.Tensor, **needs: torch.Tensor):
        values, positions, now = given
        assert now.tolist() == [keys.shape[2] - 1]
        everything = {"keys": keys, "values": values, "positions": positions, **needs}
        self.calls.append((layer, everything))
        return torch.sin(layer + 7.0 * positions + torch.arange(2).view(1, 2, 1))


class Some(Heuristic):
    """Covers two heads; NaN for the others, as the contract says."""

    heads = frozenset({(1, 1), (3, 0)})

    def score(self, layer: int, keys: torch.Tensor, *given: torch.Tensor, **needs: torch.Tensor):
        scores = torch.full(keys.shape[:3], torch.nan)
        row = 1 if layer == 1 else 0
        scores[:, row] = given[1][:, row].float()
        return scores


class Aged(Watching):
    """Looks at the age of tokens, from now."""

    def score(self, layer: int, keys: torch.Tensor, *given: torch.Tensor, **needs: torch.Tensor):
        age = given[2].view(-1, 1, 1) - given[1]
        fade = age * layer * torch.tensor([0.01, 0.2]).view(1, -1, 1)
        return super().score(layer, keys, *given, **needs) - fade


class Broken(Heuristic):
    def score(self, layer: int, keys: torch.Tensor, *given: torch.Tensor, **needs: torch.Tensor):
        scores = torch.zeros(keys.shape[:3])
        if layer == 3 and keys.shape[2] == 24:
            scores[0, 1, 5] = torch.nan
        return scores


@pytest.fixture(scope="module")
def traces(tiny_traces: Callable[..., TraceSet], tmp_path_factory: pytest.TempPathFactory):
    return tiny_traces(tmp_path_factory.mktemp("traces") / "tiny", LENGTHS)


@pytest.fixture(scope="module")
def random_traces(tiny_traces: Callable[..., TraceSet], tmp_path_factory: pytest.TempPathFactory):
    return tiny_traces(tmp_path_factory.mktemp("traces") / "long", [(200, 1)] * 12)


def expected(utility: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """The metrics of one head, from their definitions and nothing of kvenv's."""
    n, mass = len(utility), utility.astype(np.float64)

    def curve(keys: np.ndarray) -> np.ndarray:
        return np.array([mass[np.argsort(-keys, kind="stable")[:b]].sum() for b in range(1, n + 1)])

    held, best = curve(scores) / mass.sum(), curve(mass) / mass.sum()
    chance = (n + 1) / (2 * n)
    figures = {
        "reward": held.mean(),
        "normalized_score": (held.mean() - chance) / (best.mean() - chance),
    }
    for parts in (16, 8, 4, 2):
        figures[f"retention@1/{parts}"] = held[max(1, round(n / parts)) - 1]
    return figures


def test_figures_are_those_of_the_definitions(traces: TraceSet):
    ours = Watching()
    (measured,) = measure([traces], {"watching": ours})
    assert measured.agent == "watching"
    assert measured.heads == [(1, 0), (1, 1), (3, 0), (3, 1)]
    assert measured.documents == [f"document {i}" for i in range(3)]
    assert set(METRICS) == set(measured.full) == set(measured.sink_free)
    for index, (n, _) in enumerate(LENGTHS):
        for column, (layer, head) in enumerate(measured.heads):
            utility = traces.read(index, "utility/sum", layer, head)
            scores = torch.sin(layer + 7.0 * torch.arange(n) + head).numpy()
            for table, drop in ((measured.full, 0), (measured.sink_free, 4)):
                for metric, value in expected(utility[drop:], scores[drop:]).items():
                    assert table[metric].shape == (3, 4)
                    assert table[metric][index, column] == pytest.approx(value, rel=1e-9), metric


def test_a_scorer_is_given_the_prompt_and_nothing_of_the_future(traces: TraceSet):
    ours = Watching()
    measure([traces], {"watching": ours})
    assert [layer for layer, _ in ours.calls] == [1, 3] * 3
    for call, (layer, given) in enumerate(ours.calls):
        index = call // 2
        n, future = LENGTHS[index]
        assert given.keys() == {"keys", "values", "positions", "queries", "past_attention"}
        for name, part in (("keys", 8), ("values", 8)):
            recorded = traces.read(index, name, layer)
            assert given[name].shape == (1, 2, n, part)
            np.testing.assert_array_equal(given[name][0], recorded[:, :n])
        assert given["positions"].tolist() == [[list(range(n))] * 2]
        queries = traces.read(index, "queries", layer)
        np.testing.assert_array_equal(given["queries"][0], queries[:, :-future])
        past = traces.read(index, "past/sum", layer)
        np.testing.assert_array_equal(given["past_attention"][0], past)


def test_the_oracle_is_perfect_and_chance_is_zero(random_traces: TraceSet):
    scorers = {name: plugins.load("agent", name)() for name in ("oracle", "random")}
    oracle, chance = measure([random_traces], scorers)
    for table in (oracle.full, oracle.sink_free):
        np.testing.assert_allclose(table["normalized_score"], 1, rtol=1e-9)
    for table in (chance.full, chance.sink_free):
        assert abs(table["normalized_score"].mean()) < 0.03
        assert table["retention@1/4"].mean() == pytest.approx(0.25, abs=0.03)
    for metric in METRICS:
        assert (chance.full[metric] <= oracle.full[metric]).all()


def test_sink_free_figures_leave_out_exactly_the_first_four(
    tiny_traces: Callable[..., TraceSet], tmp_path: Path
):
    def sinks_hold_most(keys: np.ndarray) -> np.ndarray:
        mass = np.exp(keys[..., 0])
        mass[..., :4] += 1e6
        return mass

    class FirstTokens(Heuristic):
        def score(self, layer: int, keys: torch.Tensor, values: torch.Tensor, *given: Any, **_):
            return keys[..., 0].float() + 100 * (given[0] < 4)

    class NotTheFourth(FirstTokens):
        def score(self, layer: int, keys: torch.Tensor, values: torch.Tensor, *given: Any, **_):
            return super().score(layer, keys, values, *given) - 200 * (given[0] == 3)

    traces = tiny_traces(tmp_path / "sinks", utility=sinks_hold_most)
    first, without = measure([traces], {"first": FirstTokens(), "without": NotTheFourth()})
    assert (first.full["normalized_score"] > without.full["normalized_score"] + 0.1).all()
    for metric in METRICS:
        np.testing.assert_array_equal(first.sink_free[metric], without.sink_free[metric])
    np.testing.assert_allclose(first.sink_free["normalized_score"], 1, rtol=1e-9)


def test_all_agents_are_measured_on_the_heads_that_every_one_covers(traces: TraceSet):
    scorers = {"newest": plugins.load("agent", "streaming")(sinks=0), "some": Some()}
    newest, some = measure([traces], scorers)
    assert newest.heads == some.heads == [(1, 1), (3, 0)]
    for metric in METRICS:
        np.testing.assert_array_equal(newest.full[metric], some.full[metric])
    (one,) = measure([traces], {"some": Some()}, heads=[(3, 0)])
    np.testing.assert_array_equal(one.full["reward"], some.full["reward"][:, 1:])


def test_an_agent_is_measured_the_same_in_any_company(traces: TraceSet):
    names = ("knorm", "keydiff", "oracle")
    scorers = {name: plugins.load("agent", name)() for name in names}
    together = measure([traces, traces], scorers)
    for name, measured in zip(names, together, strict=True):
        (alone,) = measure([traces], {name: scorers[name]})
        for metric in METRICS:
            np.testing.assert_array_equal(
                measured.full[metric], np.tile(alone.full[metric], (2, 1))
            )
        assert measured.documents == [*alone.documents, *alone.documents]


def test_curves_are_the_retention_at_every_budget_of_the_grid(traces: TraceSet):
    assert (1 / 64, *(k / 32 for k in range(1, 33))) == BUDGETS
    (measured,) = measure([traces], {"watching": Watching()})
    for index, (n, _) in enumerate(LENGTHS):
        for column, (layer, head) in enumerate(measured.heads):
            utility = traces.read(index, "utility/sum", layer, head).astype(np.float64)
            scores = torch.sin(layer + 7.0 * torch.arange(n) + head).numpy()
            for name, drop in (("full", 0), ("sink_free", 4)):
                mass = utility[drop:][np.argsort(-scores[drop:], kind="stable")]
                held = [
                    mass[: max(1, round(budget * (n - drop)))].sum() / mass.sum()
                    for budget in BUDGETS
                ]
                curve = measured.curves[name]
                assert curve.shape == (3, 4, 33)
                np.testing.assert_allclose(curve[index, column], held, rtol=1e-6)
    for name, table in (("full", measured.full), ("sink_free", measured.sink_free)):
        for parts in (16, 8, 4, 2):
            np.testing.assert_allclose(
                measured.curves[name][..., BUDGETS.index(1 / parts)],
                table[f"retention@1/{parts}"],
                rtol=1e-6,
            )


def test_what_a_scorer_says_of_ages_counts_as_at_the_prompt_s_end(traces: TraceSet):
    (aged,) = measure([traces], {"aged": Aged()}, heads=[(1, 1), (3, 0), (3, 1)])
    for index, (n, _) in enumerate(LENGTHS):
        at = torch.arange(n)
        for column, (layer, head) in enumerate(aged.heads):
            utility = torch.from_numpy(traces.read(index, "utility/sum", layer, head))
            fresh = torch.sin(layer + 7.0 * at + head)
            scores = fresh - (n - 1 - at) * layer * torch.tensor([0.01, 0.2])[head]
            assert aged.full["reward"][index, column] == ut.reward(utility, scores)
            assert aged.full["reward"][index, column] != ut.reward(utility, fresh)


def test_normalized_score_is_that_of_utility_to_the_bit(traces: TraceSet):
    agent = plugins.load("agent", "knorm")()
    (measured,) = measure([traces], {"knorm": agent})
    for index in range(len(traces)):
        parts = [layer_inputs(traces, index, at, frozenset({"utility"})) for at in (1, 3)]
        scores = torch.cat(
            [
                agent.score(at, *(part[x] for x in ("keys", "values", "positions", "now")))[0]
                for at, part in zip((1, 3), parts, strict=True)
            ]
        )
        utility = torch.cat([part["utility"][0] for part in parts])
        for table, drop in ((measured.full, 0), (measured.sink_free, 4)):
            given = utility[:, drop:], scores[:, drop:]
            np.testing.assert_array_equal(
                table["normalized_score"][index], ut.normalized_score(*given)
            )
            np.testing.assert_array_equal(table["reward"][index], ut.reward(*given))


def test_where_nothing_can_be_won_normalized_score_is_one(
    tiny_traces: Callable[..., TraceSet], tmp_path: Path
):
    flat = tiny_traces(tmp_path / "flat", utility=lambda keys: np.ones(keys.shape[:3]))
    (measured,) = measure([flat], {"watching": Watching()})
    for table in (measured.full, measured.sink_free):
        np.testing.assert_array_equal(table["normalized_score"], 1)


def test_heads_keep_the_recorded_order_and_their_own_figures(traces: TraceSet):
    every, turned = (
        measure([traces], {"watching": Watching()}, heads=heads)[0]
        for heads in (None, [(3, 1), (1, 0)])
    )
    assert turned.heads == [(1, 0), (3, 1)]
    for metric in METRICS:
        np.testing.assert_array_equal(turned.full[metric], every.full[metric][:, [0, 3]])


def test_every_episode_ticks(traces: TraceSet):
    ticks: list[Measurement | None] = []
    measure([traces], {"some": Some()}, tick=lambda: ticks.append(None))
    assert len(ticks) == 3


def test_nan_scores_are_an_error_that_names_where(traces: TraceSet):
    with pytest.raises(KvenvError, match=r"agent broken gave NaN scores in layer 3, episode 1 of"):
        measure([traces], {"oracle": plugins.load("agent", "oracle")(), "broken": Broken()})


def test_a_scorer_of_another_model_is_an_error(
    tiny_traces: Callable[..., TraceSet], traces: TraceSet, tmp_path: Path
):
    other = tiny_traces(tmp_path / "other", fingerprint="other")
    scorer = plugins.load("agent", "kvp")(steps=1).fit([other])
    with pytest.raises(KvenvError, match="trained on tiny and cannot score tiny"):
        measure([traces], {"kvp": scorer})
    with pytest.raises(KvenvError, match="different models"):
        measure([traces, other], {"some": Some()})


@pytest.mark.parametrize(
    ("sets", "heads", "message"),
    [
        (0, None, "no trace sets given"),
        (1, [(1, 0), (2, 0)], r"heads \[\(2, 0\)\] are not recorded"),
        (1, [(1, 0)], "no head"),
    ],
)
def test_nothing_to_measure_is_an_error(traces: TraceSet, sets: int, heads: Any, message: str):
    with pytest.raises(KvenvError, match=message):
        measure([traces] * sets, {"some": Some()}, heads)


def test_a_prompt_of_sinks_alone_is_an_error(tiny_traces: Callable[..., TraceSet], tmp_path: Path):
    traces = tiny_traces(tmp_path / "short", [(9, 1), (4, 1)])
    with pytest.raises(KvenvError, match=r"episode 1 of .*short has 4 prompt tokens"):
        measure([traces], {"some": Some()})
