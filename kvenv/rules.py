"""From future attention to reward: rankings, retention, reward, protection, who stays; all pure.

Every function takes numpy arrays or torch tensors and returns the kind it was given. The work is
done once, by torch in float64 with sequential sums, so that an environment (numpy), a vector
environment and a learner (torch) get the same bits from the same numbers.

Words: ``n`` prompt tokens; ``utility`` A (..., n) >= 0 is the attention each receives from the
future; ``scores`` (..., n), higher = keep. Leading dimensions broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import numpy as np
import torch

from kvenv.errors import KvenvError

Array = TypeVar("Array", np.ndarray, torch.Tensor)

Budget = int | float
"""An int is a number of tokens, a float in (0, 1] a share of the prompt."""

SINKS = 4
"""Tokens left out by the *sink-free* variants: attention sinks hold most of the mass."""

FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Budgets, as fractions of the prompt, at which results are reported."""


def _torch(array: np.ndarray | torch.Tensor) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array
    # torch takes neither read-only nor reversed arrays.
    plain = array.flags.writeable and min(array.strides, default=0) >= 0
    return torch.from_numpy(array if plain else array.copy())


def _like(tensor: torch.Tensor, template: Array) -> Array:
    return cast("Array", tensor.numpy() if isinstance(template, np.ndarray) else tensor)


def ranking(scores: Array) -> Array:
    """Token indices from most to least worth keeping, (..., n) int64.

    Ties keep the earlier token first.
    """
    return _like(torch.argsort(_torch(scores), dim=-1, descending=True, stable=True), scores)


def retention_of(utility: Array, order: Array) -> Array:
    """Retention r(b) of rankings for every budget b = 1..n.

    Args:
        utility: A, (..., n), non-negative.
        order: rankings, (..., n) int64: permutations of 0..n-1.

    Returns:
        (..., n) float64; entry b-1 is the share of A held by the first b tokens of the ranking.
        A head with no utility at all has retention b/n, what chance would give.
    """
    mass, index = torch.broadcast_tensors(_torch(utility).double(), _torch(order))
    curve = mass.gather(-1, index).cumsum(-1)
    total, n = curve[..., -1:], curve.shape[-1]
    chance = torch.arange(1, n + 1, dtype=torch.float64, device=curve.device) / n
    return _like(torch.where(total > 0, curve / total, chance), utility)


def retention(utility: Array, scores: Array) -> Array:
    """`retention_of` for the ranking that ``scores`` sort into, (..., n) float64."""
    return retention_of(utility, ranking(scores))


def mean_over_budgets(curve: Array, budgets: Sequence[int] | None = None) -> Array:
    """Reward: the mean of retention curves (..., n) over ``budgets`` (default: every b, 1..n)."""
    values = _torch(curve)
    if budgets is not None:
        values = values[..., [b - 1 for b in check_budgets(budgets, values.shape[-1])]]
    # A sequential sum: the same bits whatever the batch shape or memory layout.
    return _like(values.cumsum(-1)[..., -1] / values.shape[-1], curve)


def reward(utility: Array, scores: Array, budgets: Sequence[int] | None = None) -> Array:
    """Retention averaged over budgets, (...) float64 (KVP's reward)."""
    return mean_over_budgets(retention(utility, scores), budgets)


def random_reward(n: int, budgets: Sequence[int] | None = None) -> float:
    """The expected reward of a random ranking: the mean of b/n, (n+1)/2n over all budgets."""
    chosen = range(1, n + 1) if budgets is None else check_budgets(budgets, n)
    return float(sum(chosen) / (len(chosen) * n))


def oracle_reward(utility: Array, budgets: Sequence[int] | None = None) -> Array:
    """The reward of sorting by the utility itself: the most any ranking can get."""
    return reward(utility, utility, budgets)


def normalized_score(utility: Array, scores: Array, budgets: Sequence[int] | None = None) -> Array:
    """(reward - random) / (oracle - random), (...) float64: 0 is chance, 1 is perfect.

    Where every ranking is equally good (oracle = random) normalized score is 1.
    """
    a = _torch(utility)
    rewards = reward(a, _torch(scores), budgets), oracle_reward(a, budgets)
    return _like(normalized_score_of(*rewards, a.shape[-1], budgets), utility)


def normalized_score_of(
    reward: Array, oracle: Array, n: int, budgets: Sequence[int] | None = None
) -> Array:
    """`normalized_score` of rewards that are known already, (...) float64.

    Args:
        reward: the rankings', (...).
        oracle: the `oracle_reward` of the same utilities, (...).
        n: tokens that were ranked.
        budgets: which both rewards are over.
    """
    chance = random_reward(n, budgets)
    gain, best = (_torch(one) - chance for one in (reward, oracle))
    # 1e-12 is rounding noise of float64 sums in [0, 1]; below it there is nothing to win.
    flat = best <= 1e-12
    return _like(torch.where(flat, 1.0, gain / best.masked_fill(flat, 1.0)), reward)


def without_sinks(array: Array, sinks: int = SINKS) -> Array:
    """Drop the first ``sinks`` tokens (last axis): utilities and scores for sink-free figures."""
    return array[..., sinks:]


def emphasise(utility: Array, share: float, sinks: int = SINKS) -> Array:
    """A utility whose retention is a blend of the plain and the sink-free one, (..., n) float64.

    Attention sinks hold most of the mass, so the reward hardly tells the other tokens apart.
    Retention is linear in the utility: with A' the utility whose first ``sinks`` entries are zero,
    (1 - share) A / sum(A) + share A' / sum(A') rewards a ranking with (1 - share) of its retention
    of A plus share of its retention of A'.

    Args:
        utility: A, (..., n), non-negative.
        share: how much the sink-free part counts, 0 to 1.
        sinks: tokens that it leaves out.
    """
    whole = _torch(utility).double()
    rest = whole.clone()
    rest[..., :sinks] = 0
    parts = [part / part.sum(-1, keepdim=True).clamp_min(1e-300) for part in (whole, rest)]
    return _like((1 - share) * parts[0] + share * parts[1], utility)


def protect(scores: Array, sinks: int = 0, recent: int = 0) -> Array:
    """Scores with the first ``sinks`` and the last ``recent`` tokens raised to +inf."""
    guarded = _torch(scores).clone()
    n = guarded.shape[-1]
    guarded[..., : min(sinks, n)] = torch.inf
    guarded[..., max(n - recent, 0) :] = torch.inf
    return _like(guarded, scores)


def budget_tokens(budget: Budget, n: int, least: int = 1) -> int:
    """A budget in tokens of a prompt of n: the one place where budgets are read.

    Args:
        budget: an int is a number of tokens; a float in (0, 1] is a share of the prompt.
        n: the prompt's tokens.
        least: what the cache keeps in any case, sinks and recent tokens; at least 1.

    Returns:
        At least 1. A share is at most n; a number of tokens is taken as it is.

    Raises:
        KvenvError: naming the budget, if it is neither or holds less than ``least``.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | float | np.number):
        raise KvenvError(
            f"budget {budget!r} is not a number: give tokens such as 256, or a share of the prompt "
            "such as 0.25"
        )
    if isinstance(budget, int | np.integer):
        tokens, told = int(budget), f"budget {int(budget)}"
        if tokens < 1:
            raise KvenvError(f"budget {tokens} holds no token: give 1 or more, or a share")
    else:
        share = float(budget)
        if not 0 < share <= 1:
            raise KvenvError(
                f"budget {share:g} is not in (0, 1]: give a share of the prompt such as 0.25, or a "
                "whole number of tokens such as 256"
            )
        tokens = min(n, max(1, round(share * n)))
        told = f"budget {share:g} of {n} prompt tokens is {tokens}, which"
    if tokens < min(least, n):
        raise KvenvError(
            f"{told} cannot hold sinks and recent tokens, {least} together: raise it, or lower "
            "sinks or recent"
        )
    return tokens


def check_budgets(budgets: Sequence[int], n: int) -> list[int]:
    """The budgets as a list, each checked to lie in 1..n.

    Raises:
        KvenvError: naming the budget and the range it must lie in.
    """
    chosen = [int(b) for b in budgets]
    if not chosen:
        raise KvenvError("no budgets given: give at least one, or None for every budget 1..n")
    for b in chosen:
        if not 1 <= b <= n:
            raise KvenvError(f"budget {b} is outside 1..{n}, the prompt's {n} tokens")
    return chosen


def refresh_interval(budget: int, asked: int | None = None, least: int = 1) -> int:
    """R, the tokens between two selections: a selection keeps the best budget - R.

    Args:
        budget: tokens that a head holds at most.
        asked: R as the user gives it; None takes budget / 16, within 8 and 128, and at most half
            of what the budget leaves beside tokens that always stay.
        least: tokens that are kept in any case, sinks and recent ones; at least 1.

    Raises:
        KvenvError: if R tokens do not fit beside those that are always kept.
    """
    room = budget - max(least, 1)
    if asked is None:
        return max(1, min(max(8, min(budget // 16, 128)), room // 2))
    if isinstance(asked, bool) or not isinstance(asked, int | np.integer) or asked < 1:
        raise KvenvError(f"refresh {asked!r} is not a number of tokens: give 1 or more")
    if asked > max(room, 1):
        raise KvenvError(
            f"refresh {asked} does not fit: budget {budget} has room for {room} tokens beside the "
            f"{max(least, 1)} that always stay; lower refresh, sinks or recent, or raise the budget"
        )
    return int(asked)


def protected(positions: Array, now: Array, sinks: int, recent: int) -> Array:
    """Which tokens always stay: the first ``sinks`` and the last ``recent`` of the text.

    Args:
        positions: (..., n) integers; negative where there is no token.
        now: the newest token's position, broadcast to (..., n).
        sinks: first tokens.
        recent: last tokens, the newest among them.

    Returns:
        (..., n) bool; False where there is no token.
    """
    return cast("Array", (positions >= 0) & ((positions < sinks) | (positions > now - recent)))


def worth(scores: torch.Tensor, guarded: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Scores at the moment of deciding: guarded tokens at +inf, absent ones at -inf.

    What a scorer says lies between, whatever it is: NaN counts as lowest.
    """
    least, most = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
    total = scores.float().nan_to_num(nan=least, posinf=most, neginf=least).clamp(least, most)
    return total.masked_fill(guarded, torch.inf).masked_fill(~present, -torch.inf)


def competition_floor(kept: int, least: int) -> int:
    """Tokens that every head keeps where heads compete: a fifth of the average, rounded up.

    Args:
        kept: tokens that a head keeps on average.
        least: sinks and recent tokens, which always stay.
    """
    return max(least, -(-kept // 5))


def compete(
    masses: torch.Tensor, total: int | torch.Tensor, floor: int | torch.Tensor
) -> torch.Tensor:
    """How many tokens each head keeps where heads compete for one total by expected mass.

    Every head keeps its ``floor`` best; what is left of the total goes to the largest masses among
    all other tokens of all heads. A head then keeps its best tokens by its own ranking.

    Args:
        masses: (B, H, n) expected attention, `worth`'s +inf where a token always stays and -inf
            where there is none (or it is worth less than a threshold).
        total: tokens that the heads of a row may keep together; one number, or (B,).
        floor: tokens that each head keeps, if it has as many; one number, or (B,).

    Returns:
        (B, H) int64, at most as many as a head has; their sum is at most ``total``, and equal to
        it where there are enough tokens.
    """
    rows, heads, n = masses.shape
    place = torch.arange(n, device=masses.device)
    ordered = masses.sort(-1, descending=True).values
    least = torch.as_tensor(floor, device=masses.device).expand(rows).view(-1, 1, 1)
    first = (place < least) | (ordered == torch.inf)
    there = ordered > -torch.inf
    kept = (first & there).sum(-1)
    most = torch.as_tensor(total, device=masses.device).expand(rows)
    left = (most - kept.sum(-1)).clamp_min(0)
    rest = ordered.masked_fill(first, -torch.inf).flatten(1)
    best, index = rest.sort(dim=-1, descending=True, stable=True)
    wins = (torch.arange(heads * n, device=masses.device) < left.unsqueeze(1)) & (best > -torch.inf)
    return kept.scatter_add(1, index // n, wins.long())
