"""Each learning signal is the gradient of the loss that it states."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvenv import rules as ut
from kvenv.learning import objectives

FLOOR = 0.01
Signal = Callable[[torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]
SIGNALS: dict[str, Signal] = {
    "pairwise": lambda scores, utility, noise: objectives.pairwise(scores, utility, 3, noise),
    "listwise": lambda scores, utility, _: objectives.listwise(scores, utility),
    "regression": lambda scores, utility, _: objectives.regression(scores, utility, FLOOR),
}
shapes = st.tuples(st.integers(1, 3), st.integers(1, 30))
seeds = st.integers(0, 2**31)
every = pytest.mark.parametrize("signal", SIGNALS.values(), ids=SIGNALS)


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=noise(seed), dtype=torch.float64)


def by_autograd(loss: Callable[[torch.Tensor], torch.Tensor], scores: torch.Tensor) -> torch.Tensor:
    leaf = scores.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


def logistic(ahead: torch.Tensor) -> torch.Tensor:
    return torch.logaddexp(-ahead, torch.zeros_like(ahead))


def share(utility: torch.Tensor) -> torch.Tensor:
    return utility / utility.sum(-1, keepdim=True)


@given(shapes, seeds, st.integers(1, 4), st.floats(0.1, 50))
def test_pairwise_is_the_weighted_logistic_loss_of_pairs(
    shape: tuple[int, int], seed: int, pairs: int, spread: float
):
    scores, utility = spread * doubles(*shape, seed=seed), doubles(*shape, seed=seed + 1).square()
    n, mass = shape[1], share(utility) * shape[1]

    def loss(s: torch.Tensor) -> torch.Tensor:
        source, total = noise(seed), torch.zeros(()).double()
        for _ in range(pairs):
            for i, j in enumerate(torch.randperm(n, generator=source).tolist()):
                heavier = mass[:, i] >= mass[:, j]
                ahead = torch.where(heavier, s[:, i] - s[:, j], s[:, j] - s[:, i])
                total = total + ((mass[:, i] - mass[:, j]).abs() * logistic(ahead)).sum()
        return total / (pairs * n)

    given_ = objectives.pairwise(scores, utility, pairs, noise(seed))
    torch.testing.assert_close(given_, by_autograd(loss, scores), rtol=1e-9, atol=1e-13)


def test_pairwise_meets_every_pair_equally_often():
    scores, utility, draws = doubles(7), doubles(7, seed=1).square(), 4000
    mass = share(utility) * 7
    gap = mass.unsqueeze(-1) - mass

    def loss(s: torch.Tensor) -> torch.Tensor:
        return (gap.abs() * logistic(gap.sign() * (s.unsqueeze(-1) - s))).mean(-1).mean()

    source = noise()
    many = torch.stack([objectives.pairwise(scores, utility, 1, source) for _ in range(draws)])
    error = many.std(0) / draws**0.5
    assert ((many.mean(0) - by_autograd(loss, scores)).abs() < 5 * error).all()


@given(shapes, seeds, st.floats(0.1, 50))
def test_listwise_is_the_cross_entropy(shape: tuple[int, int], seed: int, spread: float):
    scores, utility = spread * doubles(*shape, seed=seed), doubles(*shape, seed=seed + 1).square()
    wanted = by_autograd(lambda s: -(share(utility) * s.log_softmax(-1)).sum(), scores)
    torch.testing.assert_close(objectives.listwise(scores, utility), wanted, rtol=1e-9, atol=1e-13)


@given(shapes, seeds, st.floats(1e-6, 10))
def test_regression_is_half_the_squared_error(shape: tuple[int, int], seed: int, floor: float):
    scores, utility = doubles(*shape, seed=seed), doubles(*shape, seed=seed + 1).square()
    target = (share(utility) * shape[1] + floor).log()
    wanted = by_autograd(lambda s: ((s - target).square() / 2).mean(-1).sum(), scores)
    given_ = objectives.regression(scores, utility, floor)
    torch.testing.assert_close(given_, wanted, rtol=1e-9, atol=1e-13)


def test_nothing_pulls_where_the_loss_is_least():
    utility = doubles(3, 12).square() + 0.1
    assert objectives.listwise(share(utility).log() + 5, utility).abs().max() < 1e-12
    best = (share(utility) * 12 + FLOOR).log()
    assert objectives.regression(best, utility, FLOOR).abs().max() < 1e-12
    # Pairs are never far enough apart: the pull fades, and keeps its sign.
    faint = objectives.pairwise(1e3 * best, utility, 3, noise())
    assert faint.abs().max() < 1e-4 < objectives.pairwise(best, utility, 3, noise()).abs().max()


@every
def test_following_it_finds_the_order(signal: Signal):
    utility = torch.tensor([[0.1, 4.0, 0.5, 2.0, 1.0], [3.0, 2.0, 1.0, 0.2, 0.0]])
    scores, source = torch.zeros(2, 5), noise()
    for _ in range(400):
        scores -= signal(scores, utility, source)
    assert torch.equal(ut.ranking(scores), ut.ranking(utility))


@every
def test_a_scale_of_the_utility_does_not_count(signal: Signal):
    scores, utility = doubles(3, 20), doubles(3, 20, seed=1).square()
    wanted = signal(scores, utility, noise())
    torch.testing.assert_close(signal(scores, 1e-4 * utility, noise()), wanted)


@pytest.mark.parametrize("name", ["pairwise", "listwise"])
def test_a_shift_of_the_scores_does_not_count(name: str):
    scores, utility = doubles(3, 20), doubles(3, 20, seed=1).square()
    gradient = SIGNALS[name](scores, utility, noise())
    shifted = SIGNALS[name](scores + doubles(3, 1, seed=2), utility, noise())
    torch.testing.assert_close(shifted, gradient)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(3).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["listwise", "regression"])
def test_the_order_of_the_tokens_does_not_count(name: str):
    scores, utility = doubles(3, 20), doubles(3, 20, seed=1).square()
    order = torch.randperm(20, generator=noise())
    moved = SIGNALS[name](scores[:, order], utility[:, order], noise())
    torch.testing.assert_close(moved, SIGNALS[name](scores, utility, noise())[:, order])


@every
def test_rows_do_not_mix(signal: Signal):
    scores, utility = doubles(3, 20), doubles(3, 20, seed=1).square()
    alone = [signal(scores[i : i + 1], utility[i : i + 1], noise()) for i in range(3)]
    torch.testing.assert_close(signal(scores, utility, noise()), torch.cat(alone))


@every
def test_extreme_scores_and_utilities_stay_finite_in_the_scores_type(signal: Signal):
    scores = torch.linspace(-1e4, 1e4, 30).repeat(3, 1).requires_grad_()
    utility = torch.stack([torch.zeros(30), torch.ones(30), 10.0 ** -torch.arange(30)]).double()
    gradient = signal(scores, utility, noise())
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()
    assert not gradient.requires_grad


@pytest.mark.parametrize("name", ["pairwise", "listwise"])
def test_a_head_without_utility_does_not_pull(name: str):
    assert not SIGNALS[name](doubles(2, 9), torch.zeros(2, 9), noise()).any()


def test_draws_come_from_the_generator_alone():
    before = torch.random.get_rng_state()
    scores, utility = doubles(2, 20), doubles(2, 20, seed=1).square()
    one, again, other = (objectives.pairwise(scores, utility, 1, noise(s)) for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)
