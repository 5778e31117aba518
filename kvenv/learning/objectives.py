"""Learning signals that rank without a policy: pairs, lists, and regression on log utility.

Each gives the gradient of its loss in the scores (..., n), as `kvenv.learning.fit` follows it.
"""

from __future__ import annotations

import torch

from kvenv.learning.plackett_luce import shares

PAIRS = 16
"""Partners that `pairwise` draws for each token, if not told otherwise."""
FLOOR = 1e-3
"""Mass, in shares of the mean, below which differences hardly count for `regression`."""


def pairwise(
    scores: torch.Tensor, utility: torch.Tensor, pairs: int, generator: torch.Generator
) -> torch.Tensor:
    """RankNet's logistic loss on random pairs, each weighted by its difference in mass.

    Burges et al. 2005, Learning to Rank using Gradient Descent. The loss of a pair is
    |m_i - m_j| log(1 + exp(-(s_i - s_j))) with m_i >= m_j, averaged over pairs.

    Args:
        scores: (..., n).
        utility: (..., n), non-negative; m is it divided by its sum, times n.
        pairs: partners drawn for each token.
        generator: the source of partners.

    Returns:
        (..., n).
    """
    with torch.no_grad():
        n = scores.shape[-1]
        mass = shares(utility, scores.dtype) * n
        gradient = torch.zeros_like(scores)
        for _ in range(pairs):
            partner = torch.randperm(n, generator=generator, device=scores.device)
            gap = mass - mass[..., partner]
            sign = gap.sign()
            pull = gap * torch.sigmoid(-sign * (scores - scores[..., partner]))
            gradient -= pull
            gradient[..., partner] += pull
        return gradient / (pairs * n)


def listwise(scores: torch.Tensor, utility: torch.Tensor) -> torch.Tensor:
    """ListNet's cross-entropy between the softmax of the scores and the mass: softmax(s) - m.

    Cao et al. 2007, Learning to Rank: From Pairwise Approach to Listwise Approach (top-one form).

    Args:
        scores: (..., n).
        utility: (..., n), non-negative; m is it divided by its sum.

    Returns:
        (..., n); zeros for a head with no utility, whose m is nothing to follow.
    """
    with torch.no_grad():
        mass = shares(utility, scores.dtype)
        return scores.softmax(-1) * mass.sum(-1, keepdim=True) - mass


def regression(scores: torch.Tensor, utility: torch.Tensor, floor: float) -> torch.Tensor:
    """Half the squared error of the scores against log(m + floor), averaged over tokens.

    Args:
        scores: (..., n).
        utility: (..., n), non-negative; m is it divided by its sum, times n.
        floor: mass, in shares of the mean, below which differences hardly count.

    Returns:
        (..., n).
    """
    with torch.no_grad():
        n = scores.shape[-1]
        target = (shares(utility, scores.dtype) * n + floor).log()
        return (scores - target) / n
