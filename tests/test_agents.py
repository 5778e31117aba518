"""The contract that every file in agents/ keeps, and what each heuristic's formula says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scipy import stats

from kvenv import plugins
from kvenv.learning.agent import Agent
from kvenv.scorers.base import NEEDS, Scorer
from kvenv.trace import TraceSet

AGENTS = sorted(plugins.available("agent"))
LAYER = 3
Inputs = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def traces(tiny_traces: Callable[..., TraceSet], tmp_path_factory: pytest.TempPathFactory):
    return tiny_traces(tmp_path_factory.mktemp("traces") / "tiny")


@pytest.fixture(scope="module")
def scorer_of(traces: TraceSet) -> Callable[[str], Scorer]:
    """A scorer by its agent's name, after hardly any training."""
    return lambda name: fit(name, traces)


def fit(name: str, traces: TraceSet) -> Scorer:
    plugin = plugins.load("agent", name)
    agent = plugin(steps=2) if plugin.trains else plugin()
    assert isinstance(agent, Agent)
    return agent.fit([traces] if plugin.trains else [])


def inputs(batch: int = 3, n: int = 11, dtype: torch.dtype = torch.float32) -> Inputs:
    """What a cache or an evaluation can give: 2 KV heads and 4 query heads of 8."""
    noise = torch.Generator().manual_seed(batch * 1000 + n)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=noise).to(dtype)

    return {
        "keys": normal(batch, 2, n, 8),
        "values": normal(batch, 2, n, 8),
        "positions": torch.arange(n).mul(3).expand(batch, 2, n),
        "queries": normal(batch, 4, 6, 8),
        "past_attention": torch.rand(batch, 2, n, generator=noise),
        "utility": torch.rand(batch, 2, n, generator=noise),
    }


def score(scorer: Scorer, given: Inputs) -> torch.Tensor:
    wanted = {"keys", "values", "positions", *scorer.needs}
    return scorer.score(LAYER, **{name: given[name] for name in wanted})


@pytest.mark.parametrize("name", AGENTS)
class TestContract:
    def test_the_scorer_says_what_it_is(self, name: str, scorer_of, traces: TraceSet):
        scorer = scorer_of(name)
        assert isinstance(scorer, Scorer)
        assert scorer.needs <= NEEDS
        assert isinstance(scorer.pointwise, bool)
        assert scorer.heads is None or scorer.heads == set(traces.heads)

    @pytest.mark.parametrize(("batch", "n"), [(3, 11), (1, 1), (2, 40)])
    def test_scores_are_a_float32_number_for_each_token(
        self, name: str, scorer_of, batch: int, n: int
    ):
        scores = score(scorer_of(name), inputs(batch, n))
        assert scores.shape == (batch, 2, n)
        assert scores.dtype == torch.float32
        assert not scores.isnan().any()
        assert not scores.requires_grad

    def test_zeros_and_large_numbers_give_no_nan(self, name: str, scorer_of):
        for factor in (0.0, 1e4):
            given = inputs()
            given |= {part: given[part] * factor for part in ("keys", "values", "queries")}
            assert not score(scorer_of(name), given).isnan().any()

    def test_a_token_of_a_pointwise_scorer_needs_no_company(self, name: str, scorer_of):
        scorer, given = scorer_of(name), inputs(n=12)
        some = torch.tensor([7, 0, 3, 11])
        per_token = set(given) - {"queries"}
        fewer = given | {part: given[part][:, :, some] for part in per_token}
        together, alone = score(scorer, given)[:, :, some], score(scorer, fewer)
        same = torch.allclose(together, alone, rtol=1e-5, atol=1e-6)
        assert same == scorer.pointwise

    def test_rows_of_a_batch_do_not_see_each_other(self, name: str, scorer_of):
        scorer, given = scorer_of(name), inputs()
        batch = score(scorer, given)
        for row in range(len(batch)):
            one = score(scorer, {part: x[row : row + 1] for part, x in given.items()})
            torch.testing.assert_close(one[0], batch[row])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_scored_as_the_same_numbers_in_full(
        self, name: str, scorer_of, dtype: torch.dtype
    ):
        scorer, given = scorer_of(name), inputs(dtype=dtype)
        full = {part: x.float() if x.is_floating_point() else x for part, x in given.items()}
        scores = score(scorer, given)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, score(scorer, full))

    def test_scores_are_the_same_every_time_and_draw_no_global_noise(
        self, name: str, scorer_of, traces: TraceSet
    ):
        scorer, given = scorer_of(name), inputs()
        kept = {part: x.clone() for part, x in given.items()}
        before = torch.random.get_rng_state()
        first, second = score(scorer, given), score(scorer, given)
        again = score(fit(name, traces), given)
        assert torch.equal(first, second)
        assert torch.equal(first, again)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert all(torch.equal(given[part], x) for part, x in kept.items())

    def test_scores_tell_tokens_apart(self, name: str, scorer_of):
        scores = score(scorer_of(name), inputs(n=40))
        assert all(len(row.unique()) > 20 for row in scores.flatten(0, 1))


def uniforms(layer: int = 0, n: int = 20_000, first: int = 0, **options: int) -> torch.Tensor:
    scorer = plugins.load("agent", "random")(**options)
    positions = torch.arange(first, first + n).expand(1, 2, n)
    nothing = torch.zeros(1, 2, n, 1)
    return scorer.score(layer, nothing, nothing, positions)[0]


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


def test_knorm_keeps_small_keys():
    keys = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]]).view(1, 1, 3, 2)
    scores = plugins.load("agent", "knorm")().score(0, keys, keys, torch.arange(3).view(1, 1, 3))
    assert scores.flatten().tolist() == [-5, -1, -10]


def test_keydiff_keeps_the_key_that_points_away():
    keys = torch.tensor([[1.0, 0.0], [100.0, 0.1], [-1.0, 0.2]]).view(1, 1, 3, 2)
    scores = plugins.load("agent", "keydiff")().score(0, keys, keys, torch.arange(3).view(1, 1, 3))
    unit = torch.nn.functional.normalize(keys, dim=-1)
    mean = unit.mean(-2)
    expected = -(unit @ mean.transpose(-1, -2)).squeeze(-1) / mean.norm(dim=-1)
    torch.testing.assert_close(scores, expected)
    assert scores.argmax() == 2


def test_streaming_keeps_the_sinks_then_the_newest():
    positions = torch.tensor([[[9, 2, 0, 3, 5]]])
    keys = torch.zeros(1, 1, 5, 1)
    scores = plugins.load("agent", "streaming")(sinks=2).score(0, keys, keys, positions)
    assert scores.argsort(descending=True, stable=True).flatten().tolist() == [2, 0, 4, 3, 1]


def test_the_oracle_is_the_utility():
    given = inputs()
    assert torch.equal(score(plugins.load("agent", "oracle")(), given), given["utility"])


def test_an_agent_file_of_ones_own_keeps_the_contract_too(tmp_path: Path):
    path = tmp_path / "newest.py"
    path.write_text(
        "from kvenv.learning.agent import Heuristic\n\n"
        "class Newest(Heuristic):\n"
        "    def score(self, layer, keys, values, positions, **needs):\n"
        "        return positions.float()\n"
    )
    scorer = plugins.load("agent", str(path))().fit([])
    assert isinstance(scorer, Scorer)
    assert isinstance(scorer, Agent)
    assert score(scorer, inputs(n=4))[0, 0].tolist() == [0, 3, 6, 9]
