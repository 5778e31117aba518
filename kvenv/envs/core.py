"""What the environments compute, as pure functions: features, budgets, outcomes, output error.

As in `kvenv.utility`, every function takes numpy arrays or torch tensors and returns the kind it
was given, and torch does the work once, so that single environments, vector environments and
learners get the same bits from the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, cast

import numpy as np
import torch

from kvenv import utility as u
from kvenv.errors import KvenvError
from kvenv.utility import Array

Budget = int | float
"""An int is a number of tokens, a float in (0, 1] a fraction of the prompt."""


def feature_count(head_dim: int) -> int:
    """F, the columns that `features` gives each token."""
    return 2 * head_dim + 3


def features(keys: Array, values: Array, positions: Array, n: int, max_tokens: int) -> Array:
    """What an agent sees of cached tokens, one row each, padded to a fixed number of rows.

    Args:
        keys: (..., m, d) as the cache holds them, after RoPE; m <= max_tokens.
        values: (..., m, d).
        positions: (..., m) integers, the tokens' places in the sequence.
        n: the length by which positions are divided: the prompt's.
        max_tokens: rows of the result.

    Returns:
        (..., max_tokens, 2d + 3) float32, columns: key (d), value (d), position / n,
        log2(1 + position) / 16, and 1.0. Rows from m on are padding and hold zeros only.
    """
    k, v, p = _tensor(keys), _tensor(values), _tensor(positions)
    *lead, m, d = k.shape
    if m > max_tokens:
        raise KvenvError(f"{m} tokens do not fit into max_tokens={max_tokens}: raise max_tokens")
    place = p.double()
    rows = torch.zeros((*lead, max_tokens, feature_count(d)), dtype=torch.float32, device=k.device)
    filled = rows[..., :m, :]
    filled[..., :d] = k
    filled[..., d : 2 * d] = v
    filled[..., 2 * d] = place / n
    filled[..., 2 * d + 1] = torch.log2(1 + place) / 16
    filled[..., 2 * d + 2] = 1.0
    return _like(rows, keys)


def ranked_tokens(n: int, sink_free: bool = False) -> int:
    """How many tokens of an n-token prompt budgets count: all, or all but the sinks."""
    count = n - u.SINKS if sink_free else n
    if count < 1:
        raise KvenvError(
            f"a prompt of {n} tokens has none left without its {u.SINKS} sinks: "
            "use sink_free=False or longer prompts"
        )
    return count


def resolve_budgets(budgets: Sequence[Budget] | None, n: int) -> list[int] | None:
    """Budgets in tokens of an n-token prompt; None (every budget from 1 to n) stays None.

    Raises:
        KvenvError: naming the budget that is neither a number of tokens in 1..n nor a fraction
            in (0, 1].
    """
    if budgets is None:
        return None
    if isinstance(budgets, (str, bytes)) or not isinstance(budgets, Sequence | np.ndarray):
        raise KvenvError(f"budgets {budgets!r} is not a list: give e.g. [0.25] or [64, 128]")
    tokens: list[int] = []
    for budget in budgets:
        if isinstance(budget, bool) or not isinstance(budget, int | float | np.number):
            raise KvenvError(f"budget {budget!r} is not a number: give tokens or a fraction")
        whole = isinstance(budget, int | np.integer)
        tokens.append(int(budget) if whole else u.budget_tokens(float(budget), n))
    return u.check_budgets(tokens, n)


@dataclass(frozen=True)
class RankOutcome(Generic[Array]):
    """What a ranking is worth, each field with the leading dimensions of the scores.

    Attributes:
        reward: retention averaged over the budgets, (...) float64.
        closure: (reward - random) / (oracle - random), (...) float64.
        oracle: the reward of sorting by the utility itself, (...) float64.
        random: the expected reward of a random ranking, the same for every head.
        retention: retention at `kvenv.utility.FRACTIONS`, (..., 4) float64.
    """

    reward: Array
    closure: Array
    oracle: Array
    random: float
    retention: Array


def effective(
    utility: Array, scores: Array, sinks: int = 0, recent: int = 0, sink_free: bool = False
) -> tuple[Array, Array]:
    """The utility and scores that a ranking is judged by, (..., n) or (..., n - 4) each.

    The first ``sinks`` and last ``recent`` tokens are always kept; ``sink_free`` then leaves the
    first `kvenv.utility.SINKS` tokens out of both arrays.
    """
    guarded = u.protect(scores, sinks, recent)
    if not sink_free:
        return utility, guarded
    ranked_tokens(utility.shape[-1], sink_free)
    return u.without_sinks(utility), u.without_sinks(guarded)


def rank_outcome(
    utility: Array,
    scores: Array,
    budgets: Sequence[int] | None = None,
    sinks: int = 0,
    recent: int = 0,
    sink_free: bool = False,
) -> RankOutcome[Array]:
    """Judge the rankings that scores sort into.

    Args:
        utility: A, (..., n).
        scores: (..., n), higher = keep.
        budgets: in tokens, of n, or of n - 4 if ``sink_free``; None is every one.
        sinks: first tokens that are always kept.
        recent: last tokens that are always kept.
        sink_free: whether to leave the first four tokens out of the utility.
    """
    mass, guarded = effective(utility, scores, sinks, recent, sink_free)
    curve = u.retention(mass, guarded)
    n = curve.shape[-1]
    return RankOutcome(
        reward=u.mean_over_budgets(curve, budgets),
        closure=u.closure(mass, guarded, budgets),
        oracle=u.oracle_reward(mass, budgets),
        random=u.random_reward(n, budgets),
        retention=curve[..., [u.budget_tokens(f, n) - 1 for f in u.FRACTIONS]],
    )


def output_error(
    queries: Array,
    keys: Array,
    values: Array,
    scores: Array,
    budgets: Sequence[int],
) -> Array:
    """How far attention's output moves when the prompt is cut to the first b tokens of a ranking.

    Future query t attends to the prompt tokens kept and to all future tokens up to its own, with
    logits q.k / sqrt(d) and the softmax taken over those alone. The error is
    ||o - o_full|| / ||o_full||, averaged over the group's query heads and the future queries.

    Args:
        queries: (..., G, T, d), the future queries of one KV head's group, after RoPE.
        keys: (..., S, d) with S = n + T.
        values: (..., S, d).
        scores: (..., n), higher = keep.
        budgets: in tokens of the prompt, each in 1..n.

    Returns:
        (..., len(budgets)) float64, the mean relative error at each budget.
    """
    q, k, v = (_tensor(array).double() for array in (queries, keys, values))
    order = u.ranking(_tensor(scores))
    n, future, length = order.shape[-1], q.shape[-2], k.shape[-2]
    if n + future != length:
        raise KvenvError(
            f"{n} scores and {future} future queries do not add up to the {length} keys: "
            "give one score per prompt token and the future queries only"
        )
    chosen = u.check_budgets(budgets, n)
    heads = zip(
        q.reshape(-1, *q.shape[-3:]),
        k.reshape(-1, *k.shape[-2:]),
        v.reshape(-1, *v.shape[-2:]),
        order.reshape(-1, n),
        strict=True,
    )
    # One head at a time: a batched matrix product may sum in another order than a single one.
    errors = torch.stack([_head_output_error(*head, chosen) for head in heads])
    return _like(errors.reshape(*order.shape[:-1], len(chosen)), queries)


def _head_output_error(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor, budgets: list[int]
) -> torch.Tensor:
    """`output_error` of one head: q (G, T, d), k and v (S, d), order (n,) -> (len(budgets),)."""
    n, future, length = len(order), q.shape[-2], len(k)
    later = torch.ones(future, length, dtype=torch.bool, device=q.device).triu(n + 1)
    logits = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf)
    full = logits.softmax(-1) @ v
    size = full.norm(dim=-1).clamp_min(torch.finfo(full.dtype).tiny)
    errors = []
    for budget in budgets:
        cut = logits.index_fill(-1, order[budget:], -torch.inf).softmax(-1) @ v
        errors.append(((cut - full).norm(dim=-1) / size).mean())
    return torch.stack(errors)


def _tensor(array: np.ndarray | torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


def _like(tensor: torch.Tensor, template: Array) -> Array:
    return cast("Array", tensor.numpy() if isinstance(template, np.ndarray) else tensor)
