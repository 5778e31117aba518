"""Plackett-Luce policies over rankings: sampling, log-probabilities and policy gradients.

A Plackett-Luce policy with scores s draws a ranking by taking tokens one after another, each with
probability exp(s_i) / (sum of exp(s) over the tokens still left). Adding Gumbel noise to the
scores and sorting draws one ranking at the cost of a sort (Gumbel top-k; Kool et al. 2019,
arXiv 1903.06059).
"""

from __future__ import annotations

from typing import Literal

import torch

from kvenv.errors import KvenvError

Credit = Literal["reward_to_go", "plain"]


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
    """REINFORCE with the leave-one-out baseline: the gradient of minus the expected reward.

    The gradient of sum over j of adv_j * log p_j with respect to the score of the token at rank k
    is adv_k - exp(s_(k)) * (sum over j <= k of adv_j / Z_j), Z_j = sum over m >= j of exp(s_(m)):
    two cumulative sums, no autograd graph over the K sorted copies.

    Args:
        scores: (..., n).
        utility: (..., n), non-negative.
        samples: K >= 2.
        credit: see `advantages`.
        generator: the source of noise.

    Returns:
        (..., n), to be handed to ``scores.backward(gradient)``; averaged over the K rankings.

    Raises:
        KvenvError: on fewer than two rankings.
    """
    if samples < 2:
        raise KvenvError(f"samples is {samples}: the leave-one-out baseline needs at least 2")
    with torch.no_grad():
        order = sample_rankings(scores, samples, generator)
        mass = utility / utility.sum(-1, keepdim=True).clamp_min(1e-30)
        mass = mass.to(scores.dtype)
        curves = mass.expand(order.shape).gather(-1, order).cumsum(-1)
        advantage = advantages(curves, credit)
        # Shifting by the row's maximum changes no probability and keeps exp in range.
        weight = (scores - scores.amax(-1, keepdim=True)).exp().clamp_min(1e-30)
        picked = weight.expand(order.shape).gather(-1, order)
        left = picked.flip(-1).cumsum(-1).flip(-1)
        by_rank = advantage - picked * (advantage / left).cumsum(-1)
        by_token = torch.zeros_like(by_rank).scatter_(-1, order, by_rank)
        return -by_token.mean(0)
