"""Each heuristic against its definition, written slowly from whole attention matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvenv import plugins
from kvenv.errors import KvenvError
from kvenv.evaluation.retention import layer_inputs, measure
from kvenv.scorers.attention import recent_attention
from kvenv.trace import TraceSet

B, H, G, D = 2, 2, 3, 8
Episode = dict[str, torch.Tensor]


def agent(name: str, **options: Any) -> Any:
    return plugins.load("agent", name)(**options)


def episode(n: int, seed: int = 0, asked: int | None = None) -> Episode:
    """A prompt whose every query is known, and what a scorer gets of it: float32."""
    noise = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=noise)

    root = normal(B, H * G, D, D)
    return {
        "keys": normal(B, H, n, D) * 2,
        "values": normal(B, H, n, D),
        "positions": torch.arange(n).expand(B, H, n),
        "now": torch.full((B,), n - 1),
        "every": (every := normal(B, H * G, n, D) * 2),
        "queries": every[:, :, n - (asked or n) :],
        "query_mean": normal(B, H * G, D),
        "query_cov": root @ root.mT / D,
    }


def attention(given: Episode) -> torch.Tensor:
    """All of it, (B, Hq, n, n) float64."""
    keys = given["keys"].double().repeat_interleave(G, dim=1)
    logits = given["every"].double() @ keys.mT / math.sqrt(D)
    later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(later, -torch.inf).softmax(-1)


def score(scorer: Any, given: Episode, **more: torch.Tensor) -> torch.Tensor:
    wanted = {"keys", "values", "positions", "now", *scorer.needs}
    every = given | more
    return scorer.score(0, **{name: every[name] for name in wanted})


def ranking(scores: torch.Tensor) -> list[int]:
    return scores.argsort(descending=True, stable=True).tolist()


@given(
    n=st.integers(1, 40),
    window=st.integers(1, 50),
    kernel=st.sampled_from([1, 3, 5, 9]),
    asked=st.integers(1, 40),
)
def test_snapkv(n: int, window: int, kernel: int, asked: int) -> None:
    asked = min(asked, n)
    given = episode(n, asked=asked)
    scores = score(agent("snapkv", window=window, kernel=kernel), given)
    size = min(window, asked)
    split = n - size
    p, half = attention(given), kernel // 2
    for b in range(B):
        for h in range(H):
            row = scores[b, h]
            assert ranking(row)[:size] == list(range(n - 1, split - 1, -1))
            for i in range(split):
                near = range(max(0, i - half), min(split, i + half + 1))
                heads = range(h * G, (h + 1) * G)
                votes = [p[b, g, split:, j].mean() for g in heads for j in near]
                assert row[i] == pytest.approx(float(sum(votes)) / kernel / G, rel=1e-4)


@given(n=st.integers(1, 30), asked=st.integers(1, 30))
def test_tova(n: int, asked: int) -> None:
    given = episode(n, asked=min(asked, n))
    scores = score(agent("tova"), given)
    expected = attention(given)[:, :, -1, :-1].mean(1)
    for h in range(H):
        torch.testing.assert_close(scores[:, h, :-1].double(), expected, rtol=1e-4, atol=1e-6)
        assert (scores[:, h].argmax(-1) == n - 1).all()


def past(given: Episode) -> torch.Tensor:
    return attention(given).unflatten(1, (H, G)).sum((2, 3)).float()


@given(n=st.integers(1, 30))
def test_observed(n: int) -> None:
    given = episode(n)
    scores = score(agent("observed"), given, past_attention=past(given))
    p = attention(given)
    for h in range(H):
        for i in range(n):
            mean = p[:, h * G : (h + 1) * G, i:, i].mean((1, 2)) * G
            torch.testing.assert_close(scores[:, h, i].double(), mean, rtol=1e-4, atol=1e-6)


@given(n=st.integers(1, 80))
def test_recent(n: int) -> None:
    given = episode(n)
    weights = recent_attention(*(given[name] for name in ("queries", "keys", "positions")))
    scores = score(agent("recent"), given, recent_attention=weights)
    expected = attention(given)[:, :, -32:].unflatten(1, (H, G)).sum((2, 3))
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-6)


@given(n=st.integers(1, 30), seed=st.integers(0, 99))
def test_h2o_holds_as_many_of_the_newest_as_of_the_heaviest(n: int, seed: int) -> None:
    given = episode(n, seed)
    weight = past(given)
    scores = score(agent("h2o"), given, past_attention=weight)
    for row, heavy in zip(scores.flatten(0, 1), weight.flatten(0, 1), strict=True):
        order, heaviest = ranking(row), ranking(heavy)
        newest = list(range(n - 1, -1, -1))
        held = {len({*newest[:x], *heaviest[:x]}): {*newest[:x], *heaviest[:x]} for x in range(n)}
        for budget, tokens in held.items():
            assert set(order[:budget]) == tokens
        assert order[0] == n - 1


def test_h2o_shares_as_it_is_told() -> None:
    n = 400
    weight = torch.rand(1, 1, n, generator=torch.Generator().manual_seed(0))
    weight[..., 300:] = 0  # no token is both
    given = {name: part[:1, :1] for name, part in episode(n).items() if part.ndim > 1}
    given["now"] = torch.tensor([n - 1])
    for recent in (0.1, 0.5, 0.8):
        scores = score(agent("h2o", recent=recent), given, past_attention=weight)
        best = ranking(scores[0, 0])[:100]
        assert sum(place >= 300 for place in best) == pytest.approx(100 * recent, abs=1)


def spread(vectors: np.ndarray, following: np.ndarray) -> np.ndarray:
    low, high = following.min(0), following.max(0)
    deviation = ((vectors - low) / (high - low)).std(1, ddof=1)
    weights = np.exp(deviation - deviation.max())
    return weights / weights.sum()


@given(n=st.integers(1, 60), lag=st.integers(2, 12), sinks=st.integers(0, 5), cross=st.booleans())
def test_lagkv(n: int, lag: int, sinks: int, cross: bool) -> None:
    given = episode(n, seed=n)
    scores = score(agent("lagkv", lag=lag, sinks=sinks, cross_scoring=cross), given)
    chunks = max(0, (n - sinks) // lag)
    free = [] if chunks < 2 else list(range(sinks, sinks + (chunks - 1) * lag))
    order = [*range(min(sinks, n)), *(i for i in range(n - 1, sinks - 1, -1) if i not in free)]
    for b in range(B):
        for h in range(H):
            row = scores[b, h]
            assert ranking(row)[: len(order)] == order
            for start in free[::lag]:
                this, after = slice(start, start + lag), slice(start + lag, start + 2 * lag)
                parts = (given[name][b, h].double().numpy() for name in ("keys", "values"))
                expected = sum(spread(part[this], part[after]) for part in parts) / 2
                got = row[this].numpy()
                if cross:
                    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-6)
                else:  # places, but for what rounding may swap
                    np.testing.assert_allclose(np.sort(got), np.arange(lag) / lag, rtol=1e-6)
                    assert (np.diff(expected[got.argsort()]) > -1e-5).all()


def test_lagkv_takes_channels_that_never_change() -> None:
    given = episode(50)
    for name in ("keys", "values"):
        given[name][..., 3] = 1
    assert not score(agent("lagkv", lag=8, cross_scoring=True), given).isnan().any()


@pytest.mark.parametrize("use_vnorm", [True, False])
@pytest.mark.parametrize("epsilon", [0.0, 0.2])
@given(n=st.integers(1, 30), sinks=st.integers(0, 5))
def test_expected_is_the_mean_weight_of_normal_queries(
    n: int, sinks: int, use_vnorm: bool, epsilon: float
) -> None:
    given = episode(n)
    options = {"use_vnorm": use_vnorm, "epsilon": epsilon, "sinks": sinks}
    scores = score(agent("expected", **options), given)
    for b in range(B):
        for h in range(H):
            weights = np.zeros((G, n))
            for g in range(G):
                mean = given["query_mean"][b, h * G + g].double().numpy()
                covariance = given["query_cov"][b, h * G + g].double().numpy()
                for i in range(sinks, n):
                    key = given["keys"][b, h, i].double().numpy() / math.sqrt(D)
                    weights[g, i] = math.exp(key @ mean + key @ covariance @ key / 2)
            assert torch.isposinf(scores[b, h, :sinks]).all()
            if n <= sinks:
                continue
            expected = (weights / weights.sum(1, keepdims=True)).mean(0)
            if use_vnorm:
                expected = (expected + epsilon) * given["values"][b, h].double().norm(
                    dim=-1
                ).numpy()
            np.testing.assert_allclose(scores[b, h, sinks:].numpy(), expected[sinks:], rtol=1e-3)


def test_expected_without_the_covariance_takes_the_mean_query() -> None:
    given = episode(20)
    alone = score(agent("expected", use_covariance=False), given)
    point = score(agent("expected"), given, query_cov=torch.zeros(B, H * G, D, D))
    torch.testing.assert_close(alone, point)
    assert not torch.allclose(alone, score(agent("expected"), given))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("snapkv", {"window": 0}, "window is 0"),
        ("snapkv", {"kernel": 4}, "kernel is 4: give an odd"),
        ("snapkv", {"kernel": -1}, "kernel is -1"),
        ("h2o", {"recent": 0.0}, "recent is 0.0.*streaming"),
        ("h2o", {"recent": 1.0}, "recent is 1.0"),
        ("lagkv", {"lag": 0}, "lag is 0"),
        ("lagkv", {"sinks": -1}, "sinks is -1"),
        ("expected", {"sinks": -1}, "sinks is -1"),
    ],
)
def test_unusable_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(KvenvError, match=message):
        agent(name, **options)


NAMES = ("snapkv", "tova", "recent", "h2o", "observed", "lagkv", "expected")


def test_all_are_measured_on_traces(
    tiny_traces: Callable[..., TraceSet], tmp_path_factory: pytest.TempPathFactory
) -> None:
    traces = tiny_traces(tmp_path_factory.mktemp("traces") / "set", stats=True)
    results = measure([traces], {name: agent(name) for name in NAMES})
    assert [one.agent for one in results] == list(NAMES)
    needs = frozenset({"query_mean", "query_cov"})
    given = layer_inputs(traces, 1, 3, needs)
    for name in needs:
        np.testing.assert_array_equal(given[name][0], traces.read(1, f"stats/{name}", 3))


def test_a_set_without_statistics_says_how_to_get_them(
    tiny_traces: Callable[..., TraceSet], tmp_path_factory: pytest.TempPathFactory
) -> None:
    traces = tiny_traces(tmp_path_factory.mktemp("traces") / "set")
    with pytest.raises(KvenvError, match=r"set has no stats/query_cov: record it again with --st"):
        measure([traces], {"expected": agent("expected")})
