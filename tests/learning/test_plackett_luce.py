from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvenv import rules as ut
from kvenv.errors import KvenvError
from kvenv.learning import plackett_luce as pl

CREDITS: tuple[pl.Credit, ...] = ("reward_to_go", "plain")  # the sampled ones


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_rankings(n: int) -> torch.Tensor:
    """(n!, n)."""
    return torch.tensor(list(permutations(range(n))))


def probability(scores: list[float], order: tuple[int, ...]) -> float:
    """Of a ranking, from the definition: one choice after another."""
    weight = np.exp(np.asarray(scores, np.float64))
    product = 1.0
    for place, token in enumerate(order):
        product *= weight[token] / weight[list(order[place:])].sum()
    return product


def exact_gradient(scores: torch.Tensor, utility: torch.Tensor) -> torch.Tensor:
    """Of minus the expected reward, over all n! rankings."""
    leaf = scores.clone().requires_grad_()
    orders = all_rankings(len(scores))
    rewards = ut.mean_over_budgets(ut.retention_of(utility, orders))
    (-(pl.log_probabilities(leaf, orders).sum(-1).exp() * rewards).sum()).backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("scores", [[0.0, 0.0, 0.0], [1.5, 0.0, -1.0], [100.5, 99.0, 101.0]])
def test_rankings_are_drawn_as_often_as_they_should_be(scores: list[float]):
    draws = 30_000
    noise = torch.Generator().manual_seed(1)
    orders = pl.sample_rankings(torch.tensor(scores), draws, noise)
    assert orders.shape == (draws, 3)
    chi_square = 0.0
    for order in permutations(range(3)):
        seen = int((orders == torch.tensor(order)).all(-1).sum())
        wanted = draws * probability(scores, order)
        chi_square += (seen - wanted) ** 2 / wanted
    assert chi_square < 25.7  # 5 degrees of freedom: above it once in 10,000 seeds


def test_rows_and_samples_are_drawn_independently():
    orders = pl.sample_rankings(torch.zeros(2, 3, 50), 4, torch.Generator().manual_seed(0))
    assert orders.shape == (4, 2, 3, 50)
    assert orders.dtype == torch.int64
    assert (orders.sort(-1).values == torch.arange(50)).all()
    rows = orders.flatten(0, 2)
    assert len(rows.unique(dim=0)) == len(rows)


def test_draws_come_from_the_generator_alone():
    before = torch.random.get_rng_state()
    first, again, other = (
        pl.sample_rankings(torch.zeros(20), 2, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_log_probabilities_are_those_of_the_definition(scores: list[float], random):
    order = tuple(random.sample(range(len(scores)), len(scores)))
    tensor = torch.tensor(scores, dtype=torch.float64)
    steps = pl.log_probabilities(tensor, torch.tensor(order))
    assert steps.shape == tensor.shape
    assert float(steps.sum()) == pytest.approx(np.log(probability(scores, order)), rel=1e-9)
    assert (steps <= 1e-12).all()
    assert float(steps[-1]) == pytest.approx(0, abs=1e-12)  # the last token has no rival


@pytest.mark.parametrize("n", [1, 2, 5])
def test_probabilities_of_all_rankings_add_up_to_one(n: int):
    logs = pl.log_probabilities(doubles(3, 1, n), all_rankings(n)[None].expand(3, -1, -1))
    torch.testing.assert_close(logs.sum(-1).exp().sum(-1), torch.ones(3).double())


@pytest.mark.parametrize("credit", CREDITS)
def test_the_baseline_is_the_mean_of_the_others(credit: pl.Credit):
    curves = torch.rand(5, 2, 7, generator=torch.Generator().manual_seed(0)).double()
    advantage = pl.advantages(curves, credit)
    for k in range(5):
        for j in range(7):
            returns = curves.mean(-1) if credit == "plain" else curves[..., j:].sum(-1) / 7
            others = [returns[m] for m in range(5) if m != k]
            torch.testing.assert_close(advantage[k, :, j], returns[k] - torch.stack(others).mean(0))


@pytest.mark.parametrize("credit", CREDITS)
def test_advantages_sum_to_nothing_and_equal_rankings_have_none(credit: pl.Credit):
    curves = torch.rand(4, 3, 6).double()
    torch.testing.assert_close(pl.advantages(curves, credit).sum(0), torch.zeros(3, 6).double())
    same = pl.advantages(curves[:1].expand(4, -1, -1), credit)
    torch.testing.assert_close(same, torch.zeros(4, 3, 6).double())


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("samples", [2, 7])
def test_the_gradient_is_autograds_of_advantage_times_log_probability(
    credit: pl.Credit, samples: int
):
    scores, utility = doubles(3, 12).requires_grad_(), doubles(3, 12, seed=1).square()
    gradient = pl.policy_gradient(
        scores, utility, samples, credit, torch.Generator().manual_seed(5)
    )
    assert gradient.shape == scores.shape
    assert not gradient.requires_grad

    order = pl.sample_rankings(scores.detach(), samples, torch.Generator().manual_seed(5))
    advantage = pl.advantages(ut.retention_of(utility, order), credit)
    loss = -(advantage * pl.log_probabilities(scores, order)).sum() / samples
    loss.backward()
    assert scores.grad is not None
    assert scores.grad.abs().max() > 1e-3
    torch.testing.assert_close(gradient, scores.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("utility", [[5.0, 1.0, 0.0, 2.0], [0.0, 0.0, 1.0, 0.0]])
def test_the_gradient_is_unbiased(
    monkeypatch: pytest.MonkeyPatch, credit: pl.Credit, utility: list[float]
):
    """Weighted over every pair of rankings of 4 tokens: the gradient of the expected reward."""
    scores, mass = doubles(4), torch.tensor(utility, dtype=torch.float64)
    orders = all_rankings(4)
    chance = pl.log_probabilities(scores, orders).sum(-1).exp()
    first, second = (
        part.flatten() for part in torch.meshgrid(*[torch.arange(24)] * 2, indexing="ij")
    )
    pairs = torch.stack([orders[first], orders[second]])  # (2, 576, 4)
    monkeypatch.setattr(pl, "sample_rankings", lambda *_: pairs)
    rows = (576, 4)
    gradients = pl.policy_gradient(
        scores.expand(rows), mass.expand(rows), 2, credit, torch.Generator()
    )
    expected = ((chance[first] * chance[second])[:, None] * gradients).sum(0)
    exact = exact_gradient(scores, mass)
    assert exact.abs().max() > 0.01
    torch.testing.assert_close(expected, exact, rtol=1e-9, atol=1e-12)


def test_reward_to_go_has_less_noise():
    scores, utility = doubles(40), doubles(40, seed=1).exp()
    spread = {}
    for credit in CREDITS:
        noise = torch.Generator().manual_seed(0)
        draws = [pl.policy_gradient(scores, utility, 4, credit, noise) for _ in range(200)]
        spread[credit] = torch.stack(draws).var(0).sum()
    assert spread["reward_to_go"] < 0.8 * spread["plain"]


@pytest.mark.parametrize("credit", CREDITS)
def test_a_gradient_moves_no_score_on_the_whole(credit: pl.Credit):
    # Adding a number to every score changes no ranking, so the gradient's entries cancel.
    noise = torch.Generator().manual_seed(0)
    gradient = pl.policy_gradient(doubles(3, 30), doubles(3, 30).square(), 4, credit, noise)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(3).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("credit", CREDITS)
def test_nothing_to_win_gives_no_gradient(credit: pl.Credit):
    noise = torch.Generator().manual_seed(0)
    for utility in (torch.zeros(2, 9), torch.full((2, 9), 3.0)):
        gradient = pl.policy_gradient(torch.randn(2, 9), utility, 4, credit, noise)
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("credit", CREDITS)
def test_scores_far_apart_give_finite_gradients(credit: pl.Credit):
    scores = torch.linspace(-500, 500, 30)
    noise = torch.Generator().manual_seed(0)
    gradient = pl.policy_gradient(scores, torch.rand(30), 4, credit, noise)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("samples", [0, 1])
@pytest.mark.parametrize("credit", CREDITS)
def test_too_few_rankings_are_an_error(credit: pl.Credit, samples: int):
    with pytest.raises(KvenvError, match=f"samples is {samples}: .* at least 2"):
        pl.policy_gradient(doubles(5), doubles(5).square(), samples, credit, torch.Generator())


@pytest.mark.parametrize("credit", CREDITS)
def test_following_the_gradient_finds_the_order(credit: pl.Credit):
    utility = torch.tensor([[0.1, 4.0, 0.5, 2.0, 1.0], [3.0, 2.0, 1.0, 0.2, 0.0]])
    scores, noise = torch.zeros(2, 5), torch.Generator().manual_seed(0)
    for _ in range(300):
        scores -= 2.0 * pl.policy_gradient(scores, utility, 8, credit, noise)
    assert torch.equal(ut.ranking(scores), ut.ranking(utility))
