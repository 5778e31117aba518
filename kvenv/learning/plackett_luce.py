"""Plackett-Luce policies over rankings: sampling, log-probabilities and policy gradients.

A Plackett-Luce policy with scores s draws a ranking by taking tokens one after another, each with
probability exp(s_i) / (sum of exp(s) over the tokens still left). Adding Gumbel noise to the
scores and sorting draws one ranking at the cost of a sort (Gumbel top-k; Kool et al. 2019,
arXiv 1903.06059).

Averaged over every budget, a ranking's reward is linear in the ranks: a token of mass m at rank k
is in the caches of the budgets k..n and adds m (n - k + 1) / n. Under Plackett-Luce a token comes
before another with probability sigmoid(s_i - s_j), so the expected rank is 1 + sum over j != i of
sigmoid(s_j - s_i), and with it the expected reward and its gradient have a closed form.
"""

from __future__ import annotations

from typing import Literal

import torch

from kvenv.errors import KvenvError

Credit = Literal["expected", "reward_to_go", "plain"]

PARTNERS = 2048
"""Tokens that each token of a longer prompt is compared with in `expected_gradient`."""
_PAIRS = 2**20, 2**27
"""Pairs of tokens held at once, on a CPU (they stay in its cache) and on a GPU."""


def sample_rankings(scores: torch.Tensor, samples: int, generator: torch.Generator) -> torch.Tensor:
    """Draw rankings.

    Args:
        scores: (..., n).
        samples: K, rankings to draw for each row.
        generator: the source of noise.

    Returns:
        (K, ..., n) int64, best token first.
    """
    shape = (samples, *scores.shape)
    noise = torch.empty(shape, dtype=scores.dtype, device=scores.device)
    noise.exponential_(generator=generator).log_().neg_()  # standard Gumbel
    return (scores + noise).argsort(dim=-1, descending=True)


def log_probabilities(scores: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The log-probability of each choice of a ranking, given the choices before it.

    log p_j = s_(j) - log(sum over m >= j of exp(s_(m))), with s_(j) the score of the j-th token of
    the ranking; their sum is the ranking's log-probability.

    Args:
        scores: (..., n).
        order: rankings, (..., n) int64, broadcast against the scores.

    Returns:
        (..., n), differentiable in the scores.
    """
    picked = scores.expand(order.shape).gather(-1, order)
    left = picked.flip(-1).logcumsumexp(-1).flip(-1)
    return picked - left


def shares(utility: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A utility (..., n) divided by its sum over tokens; zeros where a head has no utility."""
    return (utility / utility.sum(-1, keepdim=True).clamp_min(1e-30)).to(dtype)


def expected_reward(scores: torch.Tensor, utility: torch.Tensor) -> torch.Tensor:
    """The mean reward, over all budgets, of the rankings that a Plackett-Luce policy draws.

    E[R] = sum over i of m_i (1 - (1 / n) sum over j != i of sigmoid(s_j - s_i)), with m the utility
    divided by its sum. Differentiable; O(n^2) memory.

    Args:
        scores: (..., n).
        utility: (..., n), non-negative.

    Returns:
        (...). A head with no utility at all has (n + 1) / 2n, what chance would give.
    """
    n = scores.shape[-1]
    mass = shares(utility, scores.dtype)
    mass = torch.where(mass.sum(-1, keepdim=True) > 0, mass, 1 / n)
    before = torch.sigmoid(scores.unsqueeze(-2) - scores.unsqueeze(-1)).sum(-1) - 0.5  # not itself
    return (mass * (1 - before / n)).sum(-1)


def expected_gradient(
    scores: torch.Tensor, utility: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """The gradient of minus `expected_reward`, without autograd and without sampled rankings.

    With D_ij = sigmoid'(s_i - s_j) = (e^((s_i - s_j) / 2) + e^((s_j - s_i) / 2))^-2 the gradient of
    E[R] in s_i is (1 / n) sum over j of (m_i - m_j) D_ij. Prompts of more than `PARTNERS` tokens
    compare each with as many others, drawn anew each time (unbiased).

    Args:
        scores: (..., n).
        utility: (..., n), non-negative.
        generator: the source of the partners drawn.

    Returns:
        (..., n), to be handed to ``scores.backward(gradient)``.
    """
    with torch.no_grad():
        n = scores.shape[-1]
        mass = shares(utility, scores.dtype).reshape(-1, n)
        flat = scores.reshape(-1, n)
        middle = (flat.amax(-1, keepdim=True) + flat.amin(-1, keepdim=True)) / 2
        half = ((flat - middle) / 2).clamp(-40, 40)  # beyond, exp would leave float32
        up, down = half.exp(), (-half).exp()
        others = torch.arange(n, device=flat.device)
        if n > PARTNERS:
            others = torch.randperm(n, generator=generator, device=flat.device)[:PARTNERS]
        weights = torch.stack([torch.ones_like(mass), mass], -1)[:, others]
        gradient = torch.empty_like(flat)
        rows = max(1, _PAIRS[flat.is_cuda] // (n * len(others)))
        for start in range(0, len(flat), rows):
            part = slice(start, start + rows)
            left = torch.stack([up[part], down[part]], -1)
            right = torch.stack([down[part][:, others], up[part][:, others]], -2)
            pairs = torch.bmm(left, right).square_().reciprocal_()
            sums = torch.bmm(pairs, weights[part])
            gradient[part] = sums[..., 1] - mass[part] * sums[..., 0]
        return (gradient / len(others)).view(scores.shape)


def advantages(curves: torch.Tensor, credit: Credit) -> torch.Tensor:
    """Leave-one-out advantages of each choice of each sampled ranking.

    ``plain`` credits every choice with the whole reward, the mean of r(b) over all budgets.
    ``reward_to_go`` credits choice j with the budgets b >= j alone: what the cache holds at smaller
    budgets was settled before that choice.

    Args:
        curves: retention r(b) of K rankings, (K, ..., n).
        credit: which of the two.

    Returns:
        (K, ..., n): the return minus the mean return of the K - 1 other rankings.
    """
    samples, n = curves.shape[0], curves.shape[-1]
    if credit == "plain":
        returns = curves.mean(-1, keepdim=True).expand(curves.shape)
    else:
        returns = curves.flip(-1).cumsum(-1).flip(-1) / n
    return (returns - returns.mean(0)) * (samples / (samples - 1))


def policy_gradient(
    scores: torch.Tensor,
    utility: torch.Tensor,
    samples: int,
    credit: Credit,
    generator: torch.Generator,
) -> torch.Tensor:
    """The gradient of minus the expected reward, in closed form or by sampled rankings.

    `expected_gradient` for the credit ``expected``; for the others REINFORCE with the leave-one-out
    baseline:

    The gradient of sum over j of adv_j * log p_j with respect to the score of the token at rank k
    is adv_k - exp(s_(k)) * (sum over j <= k of adv_j / Z_j), Z_j = sum over m >= j of exp(s_(m)):
    two cumulative sums, no autograd graph over the K sorted copies.

    Args:
        scores: (..., n).
        utility: (..., n), non-negative.
        samples: K >= 2; of no use to the credit ``expected``.
        credit: ``expected``, or see `advantages`.
        generator: the source of noise.

    Returns:
        (..., n), to be handed to ``scores.backward(gradient)``; averaged over the K rankings.

    Raises:
        KvenvError: on fewer than two rankings.
    """
    if credit == "expected":
        return expected_gradient(scores, utility, generator)
    if samples < 2:
        raise KvenvError(f"samples is {samples}: the leave-one-out baseline needs at least 2")
    with torch.no_grad():
        order = sample_rankings(scores, samples, generator)
        mass = shares(utility, scores.dtype)
        curves = mass.expand(order.shape).gather(-1, order).cumsum(-1)
        advantage = advantages(curves, credit)
        # Shifting by the row's maximum changes no probability and keeps exp in range.
        weight = (scores - scores.amax(-1, keepdim=True)).exp().clamp_min(1e-30)
        picked = weight.expand(order.shape).gather(-1, order)
        left = picked.flip(-1).cumsum(-1).flip(-1)
        by_rank = advantage - picked * (advantage / left).cumsum(-1)
        by_token = torch.zeros_like(by_rank).scatter_(-1, order, by_rank)
        return -by_token.mean(0)
