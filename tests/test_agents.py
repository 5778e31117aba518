"""The contract that every file in agents/ keeps, and what each heuristic's formula says."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from scipy import stats

from kvenv import plugins
from kvenv.learning.agent import Agent
from kvenv.scorers.base import Scorer
from kvenv.testing import check_agent
from kvenv.trace import TraceSet

AGENTS = sorted(plugins.available("agent"))
LAYER = 3
Inputs = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def fit(
    tiny_traces: Callable[..., TraceSet],
    quick_agent: Callable[..., Agent],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Scorer]:
    """A scorer by its agent's name, after hardly any training."""
    traces = tiny_traces(tmp_path_factory.mktemp("traces") / "tiny")
    return functools.cache(lambda name: quick_agent(name).fit([traces]))


def inputs(batch: int = 3, n: int = 11, dtype: torch.dtype = torch.float32) -> Inputs:
    """What a cache or an evaluation can give: 2 KV heads and 4 query heads of 8."""
    noise = torch.Generator().manual_seed(batch * 1000 + n)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=noise).to(dtype)

    return {
        "keys": normal(batch, 2, n, 8),
        "values": normal(batch, 2, n, 8),
        "positions": torch.arange(n).mul(3).expand(batch, 2, n),
        "now": torch.full((batch,), 3 * n - 3),
        "queries": normal(batch, 4, 6, 8),
        "past_attention": torch.rand(batch, 2, n, generator=noise),
        "recent_attention": torch.rand(batch, 2, n, generator=noise),
        "query_mean": normal(batch, 4, 8),
        "query_cov": torch.eye(8).expand(batch, 4, 8, 8),
        "utility": torch.rand(batch, 2, n, generator=noise),
    }


def score(scorer: Scorer, given: Inputs) -> torch.Tensor:
    wanted = {"keys", "values", "positions", "now", *scorer.needs}
    return scorer.score(LAYER, **{name: given[name] for name in wanted})


@pytest.mark.parametrize("name", AGENTS)
class TestContract:
    def test_it_is_kept(self, name: str, quick_agent):
        check_agent(quick_agent(name))

    def test_scores_tell_tokens_apart(self, name: str, fit):
        scores = score(fit(name), inputs(n=40))
        assert all(len(row.unique()) > 20 for row in scores.flatten(0, 1))


def test_ppo_keeps_the_contract_on_streams_too(quick_agent):
    check_agent(quick_agent("ppo", env="stream"))


def uniforms(layer: int = 0, n: int = 20_000, first: int = 0, **options: int) -> torch.Tensor:
    scorer = plugins.load("agent", "random")(**options)
    positions = torch.arange(first, first + n).expand(1, 2, n)
    nothing = torch.zeros(1, 2, n, 1)
    return scorer.score(layer, nothing, nothing, positions, positions[:, 0, -1])[0]


@pytest.mark.parametrize("options", [{}, {"layer": 29}, {"seed": 5}, {"first": 10**6}])
def test_random_is_uniform(options: dict[str, int]):
    for row in uniforms(**options):
        assert row.min() >= 0
        assert row.max() < 1
        assert stats.kstest(row.numpy(), "uniform").pvalue > 1e-4
        # Neighbouring positions are as unrelated as any others.
        assert abs(torch.corrcoef(torch.stack([row[1:], row[:-1]]))[0, 1]) < 0.03


def test_random_differs_by_head_layer_and_seed():
    rows = [
        *uniforms(),
        *uniforms(layer=1),
        *(uniforms(seed=seed)[0] for seed in (1, 2, 4096, 2**40, -1)),
        uniforms(layer=2, seed=1)[0],
    ]
    related = torch.corrcoef(torch.stack(rows)) - torch.eye(len(rows))
    assert related.abs().max() < 0.03


def test_random_goes_by_position_not_by_place():
    assert torch.equal(uniforms(first=100, n=50), uniforms(n=150)[:, 100:])


def three() -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of three tokens, and now."""
    return torch.arange(3).view(1, 1, 3), torch.tensor([2])


def test_knorm_keeps_small_keys():
    keys = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]]).view(1, 1, 3, 2)
    scores = plugins.load("agent", "knorm")().score(0, keys, keys, *three())
    assert scores.flatten().tolist() == [-5, -1, -10]


def test_keydiff_keeps_the_key_that_points_away():
    keys = torch.tensor([[1.0, 0.0], [100.0, 0.1], [-1.0, 0.2]]).view(1, 1, 3, 2)
    scores = plugins.load("agent", "keydiff")().score(0, keys, keys, *three())
    unit = torch.nn.functional.normalize(keys, dim=-1)
    mean = unit.mean(-2)
    expected = -(unit @ mean.transpose(-1, -2)).squeeze(-1) / mean.norm(dim=-1)
    torch.testing.assert_close(scores, expected)
    assert scores.argmax() == 2


def test_streaming_keeps_the_sinks_then_the_newest():
    positions, now = torch.tensor([[[0, 2, 3, 5, 9]]]), torch.tensor([9])
    keys = torch.zeros(1, 1, 5, 1)
    scores = plugins.load("agent", "streaming")(sinks=2).score(0, keys, keys, positions, now)
    assert scores.argsort(descending=True, stable=True).flatten().tolist() == [0, 4, 3, 2, 1]


def test_the_oracle_is_the_utility():
    given = inputs()
    assert torch.equal(score(plugins.load("agent", "oracle")(), given), given["utility"])
