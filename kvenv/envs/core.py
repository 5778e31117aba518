"""What the environments compute, as pure functions: features, budgets, outcomes, output error.

As in `kvenv.utility`, every function takes numpy arrays or torch tensors and returns the kind it
was given, and torch does the work once, so that single environments, vector environments and
learners get the same bits from the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

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


def ranking(scores: np.ndarray) -> np.ndarray:
    """`kvenv.utility.ranking` of scores (N, M) without NaN; of float32 ones, several times as fast.

    Whole numbers with the score's bits above the token's place sort without ties, so that the
    fastest sort will do.
    """
    if scores.dtype != np.float32:
        return u.ranking(scores)
    bits = (0 - scores).view(np.int32)  # the highest first; 0 - x makes both zeros one
    ascending = (bits ^ (bits >> 31 & 0x7FFFFFFF)).astype(np.int64)  # as the floats are
    keys = ascending << 32 | np.arange(scores.shape[-1])
    keys.sort(-1)
    return keys & 0xFFFFFFFF


def rank_curve(utility: np.ndarray, scores: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Retention of a batch of rankings of different lengths, as `kvenv.utility.retention` has it.

    Args:
        utility: A, (N, M), zero from n on.
        scores: (N, M), -inf from n on.
        n: tokens of each row, (N,).

    Returns:
        (N, M) float64; entry b-1 is the share of A held by the first b tokens of the ranking.
    """
    order = ranking(scores)
    mass = np.take_along_axis(utility.astype(np.float64), order, -1).cumsum(-1)
    total = mass[:, -1:]
    chance = np.arange(1, mass.shape[-1] + 1) / n[:, None]
    return np.where(total > 0, mass / np.where(total > 0, total, 1.0), chance)


def budget_columns(
    budgets: Sequence[Budget] | None, n: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where the budgets of prompts of different lengths stand in their curves.

    Args:
        budgets: as `resolve_budgets` takes them; None is every one from 1 to n.
        n: tokens of each prompt, (N,).
        width: columns of the curves; that index, one too many, stands for no budget.

    Returns:
        (N, K) indices and (N,) how many of each row are budgets.
    """
    if budgets is None:
        every = np.arange(width)
        return np.where(every < n[:, None], every, width), n
    lengths, which = np.unique(n, return_inverse=True)
    tokens = np.array([resolve_budgets(budgets, m) for m in lengths.tolist()], dtype=np.int64)
    return tokens[which] - 1, np.full(len(n), tokens.shape[-1])


def mean_at(curve: np.ndarray, columns: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The mean of curves (N, M) over columns (N, K), of which ``count`` (N,) are valid, (N,).

    The same bits as `kvenv.utility.mean_over_budgets`: what is not valid adds zeros at the end.
    """
    padded = np.concatenate([curve, np.zeros((len(curve), 1))], -1)
    return np.take_along_axis(padded, columns, -1).cumsum(-1)[:, -1] / count


def closure(reward: np.ndarray, oracle: np.ndarray, random: np.ndarray) -> np.ndarray:
    """(reward - random) / (oracle - random), as `kvenv.utility.closure` has it."""
    best = oracle - random
    flat = best <= 1e-12
    return np.where(flat, 1.0, (reward - random) / np.where(flat, 1.0, best))


def attention(queries: np.ndarray, keys: np.ndarray, drop: int = 0) -> np.ndarray:
    """The attention that every token's queries pay to every token so far.

    Args:
        queries: (G, S, d), those of one KV head's group, after RoPE.
        keys: (S, d).
        drop: leave the first tokens out: the rest of each row then sums to 1, and the rows of those
            tokens themselves are zero.

    Returns:
        (G, S, S) float32: softmax(q.k / sqrt(d)) over positions up to the query's own, zero beyond.
    """
    q, k = torch.from_numpy(queries).float(), torch.from_numpy(keys).float()
    length = len(k)
    logits = q @ k.T * q.shape[-1] ** -0.5
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    rows = logits.masked_fill_(later, -torch.inf).softmax(-1)
    if drop:
        rows[..., :drop] = 0
        rows /= rows.sum(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return rows.numpy()


def triangle(rows: np.ndarray) -> np.ndarray:
    """Pack causal rows (..., S, S) one after another, row t as a zero and its t + 1 entries.

    The zero stands where `found` looks for an empty slot.

    Returns:
        (..., S (S + 3) / 2), see `row_start`.
    """
    length = rows.shape[-1]
    padded = np.zeros((*rows.shape[:-1], length + 1), rows.dtype)
    padded[..., 1:] = rows
    return padded[..., np.tril(np.ones((length, length + 1), dtype=bool), 1)]


def row_start(t: Any) -> Any:
    """Where row t of a packed `triangle` holds its entry for position 0."""
    return t * (t + 3) // 2 + 1


def protected(positions: np.ndarray, now: np.ndarray, sinks: int, recent: int) -> np.ndarray:
    """Which slots may not go: empty ones, sinks, and the last ``recent`` tokens.

    Args:
        positions: of the tokens in the slots, (N, W), -1 where a slot is empty.
        now: the newest token's position, (N,).
        sinks: first tokens of the text that are always kept.
        recent: last tokens that are always kept, the newest among them.
    """
    return (positions < sinks) | (positions > (now - recent)[:, None])


def lowest_slot(scores: np.ndarray, positions: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The slot that goes: of those not ``kept``, the lowest score; of equals, the latest token.

    Args:
        scores: (N, W).
        positions: (N, W).
        kept: (N, W) bool.

    Returns:
        (N,) indices.
    """
    worth = np.where(kept, np.inf, scores)
    lowest = worth == worth.min(-1, keepdims=True)
    return np.where(lowest, positions, -2).argmax(-1)


def output_change(weights: np.ndarray, values: np.ndarray, full: np.ndarray) -> np.ndarray:
    """How far the attention output moves when only some tokens are held.

    Args:
        weights: the attention that each query head pays to the tokens held, (N, G, W).
        values: of the tokens held, (N, W, d).
        full: the output over all tokens, (N, G, d).

    Returns:
        (N,) float64: ||o - o_full|| / ||o_full||, o being renormalised over what is held, averaged
        over the query heads.
    """
    tiny = np.finfo(np.float64).tiny
    weights = weights.astype(np.float64)
    share = weights.sum(-1, keepdims=True)
    held = weights @ values.astype(np.float64) / np.maximum(share, tiny)
    whole = full.astype(np.float64)
    size = np.sqrt((whole**2).sum(-1))
    return (np.sqrt(((held - whole) ** 2).sum(-1)) / np.maximum(size, tiny)).mean(-1)


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
