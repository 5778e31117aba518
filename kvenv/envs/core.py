"""What the environments compute, as pure functions: features, budgets, outcomes, output error.

As in `kvenv.rules`, every function takes numpy arrays or torch tensors and returns the kind it
was given, and torch does the work once, so that single environments, vector environments and
learners get the same bits from the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from kvenv import rules as u
from kvenv.errors import KvenvError
from kvenv.rules import Array, Budget


def feature_count(head_dim: int) -> int:
    """F, the columns that `features` gives each token."""
    return 2 * head_dim + 2


def features(framed: np.ndarray, values: np.ndarray, ages: np.ndarray) -> np.ndarray:
    """What an agent sees of tokens, one row each; the one layout of all environments.

    Args:
        framed: keys in the frame of now, (..., m, d).
        values: (..., m, d).
        ages: now - position, (..., m) integers; negative where there is no token.

    Returns:
        (..., m, 2d + 2) float32, columns: key (d), value (d), log2(1 + age) / 16, and 1. Rows
        without a token hold zeros only.
    """
    d = framed.shape[-1]
    rows = np.zeros((*framed.shape[:-1], feature_count(d)), np.float32)
    rows[..., :d] = framed
    rows[..., d : 2 * d] = values
    rows[..., 2 * d] = np.log2(1.0 + ages.clip(0)) / 16
    rows[..., 2 * d + 1] = 1.0
    rows[ages < 0] = 0.0
    return rows


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
        KvenvError: naming the budget that is neither a number of tokens in 1..n nor a share in
            (0, 1].
    """
    if budgets is None:
        return None
    if isinstance(budgets, (str, bytes)) or not isinstance(budgets, Sequence | np.ndarray):
        raise KvenvError(f"budgets {budgets!r} is not a list: give e.g. [0.25] or [64, 128]")
    return u.check_budgets([u.budget_tokens(budget, n) for budget in budgets], n)


def ranking(scores: np.ndarray) -> np.ndarray:
    """`kvenv.rules.ranking` of scores (N, M) without NaN; of float32 ones, several times as fast.

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
    """Retention of a batch of rankings of different lengths, as `kvenv.rules.retention` has it.

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

    The same bits as `kvenv.rules.mean_over_budgets`: what is not valid adds zeros at the end.
    """
    padded = np.concatenate([curve, np.zeros((len(curve), 1))], -1)
    return np.take_along_axis(padded, columns, -1).cumsum(-1)[:, -1] / count


def normalized_score(reward: np.ndarray, oracle: np.ndarray, random: np.ndarray) -> np.ndarray:
    """(reward - random) / (oracle - random), as `kvenv.rules.normalized_score` has it."""
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
