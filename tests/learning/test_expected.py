"""The closed form of a Plackett-Luce policy's mean reward, and its gradient."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvenv import rules as ut
from kvenv.learning import plackett_luce as pl


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=noise(seed), dtype=torch.float64)


def by_autograd(scores: torch.Tensor, utility: torch.Tensor) -> torch.Tensor:
    """The gradient of minus `expected_reward`, in float64."""
    leaf = scores.double().requires_grad_()
    (-pl.expected_reward(leaf, utility.double()).sum()).backward()
    assert leaf.grad is not None
    return leaf.grad


tokens = st.tuples(st.floats(-30, 30), st.floats(0, 100))


@given(st.lists(tokens, min_size=1, max_size=5).filter(lambda rows: sum(u for _, u in rows) > 1e-3))
def test_the_reward_is_the_mean_over_all_rankings(rows: list[tuple[float, float]]):
    scores, utility = torch.tensor(rows, dtype=torch.float64).T
    weights = scores.exp().tolist()
    mean = 0.0
    for order in permutations(range(len(rows))):
        chance = 1.0
        for place, token in enumerate(order):
            chance *= weights[token] / sum(weights[left] for left in order[place:])
        mean += chance * float(ut.mean_over_budgets(ut.retention_of(utility, torch.tensor(order))))
    assert float(pl.expected_reward(scores, utility)) == pytest.approx(mean, rel=1e-9)


@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 40),
    st.floats(0.01, 12),
    st.integers(0, 2**31),
)
def test_the_gradient_is_autograds(batch: list[int], n: int, spread: float, seed: int):
    scores = spread * doubles(*batch, n, seed=seed)
    utility = doubles(*batch, n, seed=seed + 1).square()
    gradient = pl.expected_gradient(scores.requires_grad_(), utility, noise())
    assert gradient.shape == scores.shape
    assert not gradient.requires_grad
    torch.testing.assert_close(
        gradient, by_autograd(scores.detach(), utility), rtol=1e-8, atol=1e-13
    )


def test_it_is_what_policy_gradient_gives_for_its_credit():
    scores, utility = doubles(3, 9), doubles(3, 9, seed=1).square()
    wanted = pl.expected_gradient(scores, utility, noise())
    assert wanted.abs().max() > 1e-3
    assert torch.equal(pl.policy_gradient(scores, utility, 0, "expected", noise()), wanted)


@pytest.mark.parametrize("credit", ["reward_to_go", "plain"])
def test_sampled_gradients_converge_to_it(credit: pl.Credit):
    scores, utility = doubles(2, 7), doubles(2, 7, seed=1).exp()
    rows, draws = (200, 2, 7), []
    source = noise()
    for _ in range(20):  # 200 independent estimates each
        estimates = pl.policy_gradient(scores.expand(rows), utility.expand(rows), 4, credit, source)
        draws.append(estimates)
    estimates = torch.cat(draws)
    error = estimates.std(0) / len(estimates) ** 0.5
    exact = pl.expected_gradient(scores, utility, noise())
    assert exact.abs().max() > 20 * error.max()
    assert ((estimates.mean(0) - exact).abs() < 5 * error).all()


@pytest.mark.parametrize("spread", [79.0, 81.0, 120.0, 159.0])
def test_scores_far_apart_keep_their_gradient_in_float32(spread: float):
    # Pairs of near scores at either end, where exp(s) itself would leave float32.
    scores = torch.tensor([[0.0, 0.5, spread / 2, spread - 0.5, spread]]) + 1000
    utility = torch.tensor([[5.0, 1.0, 2.0, 3.0, 0.5]])
    gradient = pl.expected_gradient(scores, utility, noise())
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(
        gradient.double(), by_autograd(scores, utility), rtol=1e-3, atol=1e-9
    )
    assert gradient[:, [0, 1, 3, 4]].abs().min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.0, 161.0, 1e3, 1e6, 1e30])
def test_any_scores_give_finite_gradients(spread: float, dtype: torch.dtype):
    scores = torch.linspace(-spread / 2, spread / 2, 31, dtype=dtype).repeat(3, 1)
    gradient = pl.expected_gradient(scores, torch.rand(3, 31, generator=noise()), noise())
    assert gradient.isfinite().all()
    assert pl.expected_reward(scores, torch.ones(3, 31)).isfinite().all()
    assert gradient.abs().max() <= 1  # no entry of the sum is above 1 / 4n


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_to_win_gives_no_gradient(dtype: torch.dtype):
    scores = doubles(2, 9).to(dtype)
    assert not pl.expected_gradient(scores, torch.zeros(2, 9), noise()).any()
    reward = pl.expected_reward(scores, torch.zeros(2, 9))
    torch.testing.assert_close(reward, torch.full((2,), ut.random_reward(9), dtype=dtype))
    even = pl.expected_gradient(scores, torch.full((2, 9), 3.0), noise())
    assert even.abs().max() < 1e-7
    assert not pl.expected_gradient(scores[:, :1], torch.ones(2, 1), noise()).any()


def test_neither_a_shift_of_the_scores_nor_a_scale_of_the_utility_counts():
    scores, utility = doubles(3, 20), doubles(3, 20, seed=1).square()
    gradient = pl.expected_gradient(scores, utility, noise())
    other = pl.expected_gradient(scores + doubles(3, 1, seed=2), 1e-6 * utility, noise())
    torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(3).double(), rtol=0, atol=1e-14)


def test_the_order_of_the_tokens_does_not_count():
    scores, utility, order = doubles(2, 20), doubles(2, 20, seed=1).square(), torch.randperm(20)
    gradient = pl.expected_gradient(scores, utility, noise())
    moved = pl.expected_gradient(scores[:, order], utility[:, order], noise())
    torch.testing.assert_close(moved, gradient[:, order])


@pytest.mark.parametrize("held", [1, 40, 250, 10**6])
def test_how_many_pairs_are_held_at_once_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, held: int
):
    scores, utility = doubles(7, 10), doubles(7, 10, seed=1).square()
    wanted = by_autograd(scores, utility)
    monkeypatch.setattr(pl, "_PAIRS", (held, held))
    torch.testing.assert_close(pl.expected_gradient(scores, utility, noise()), wanted)


def test_partners_of_long_prompts_are_drawn_without_bias(monkeypatch: pytest.MonkeyPatch):
    """Averaged over every set of 2 partners out of 6 tokens it is the exact gradient."""
    monkeypatch.setattr(pl, "PARTNERS", 2)
    scores, utility = doubles(3, 6), doubles(3, 6, seed=1).square()
    draws = []
    for order in permutations(range(6)):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randperm", lambda *_, _o=order, **__: torch.tensor(_o))
            draws.append(pl.expected_gradient(scores, utility, noise()))
    exact = by_autograd(scores, utility)
    torch.testing.assert_close(torch.stack(draws).mean(0), exact, rtol=1e-10, atol=1e-14)
    assert (draws[0] - exact).abs().max() > 1e-3


def test_partners_come_from_the_generator_and_the_mean_of_many_is_close(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(pl, "PARTNERS", 8)
    scores, utility = doubles(2, 30), doubles(2, 30, seed=1).square()
    before = torch.random.get_rng_state()
    one, same, other = (pl.expected_gradient(scores, utility, noise(s)) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)
    source = noise()
    draws = torch.stack([pl.expected_gradient(scores, utility, source) for _ in range(2000)])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - by_autograd(scores, utility)).abs() < 5 * error).all()


def test_following_it_finds_the_order():
    utility = torch.tensor([[0.1, 4.0, 0.5, 2.0, 1.0], [3.0, 2.0, 1.0, 0.2, 0.0]])
    scores = torch.zeros(2, 5)
    for _ in range(300):
        scores -= 2.0 * pl.expected_gradient(scores, utility, noise())
    assert torch.equal(ut.ranking(scores), ut.ranking(utility))
    torch.testing.assert_close(
        pl.expected_reward(scores, utility), ut.oracle_reward(utility).float(), atol=0.02, rtol=0
    )
