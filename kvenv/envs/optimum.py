"""The best that any policy can reach in a recorded stream, known only offline; and chance."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from kvenv.errors import KvenvError


def best_schedule(
    gains: np.ndarray, first: np.ndarray, capacity: int, guarded: np.ndarray
) -> float:
    """The largest sum of gains that tokens held over time can collect, exactly.

    At every period at most ``capacity`` tokens are held; a token may be held from its first period
    on, and once it went it never returns. Holding a token is a unit of flow along its chain of
    periods, entered at its first one and left for good, so the linear program has a whole-number
    optimum: the best schedule itself.

    Args:
        gains: (K, n), what holding a token over a period is worth.
        first: (n,), the period at which each token can first be held.
        capacity: tokens held at a period.
        guarded: (K, n) bool, tokens that must be held.

    Raises:
        KvenvError: if more tokens must be held than fit.
    """
    periods = np.arange(len(gains))[:, None]
    there = periods >= first
    if (guarded & there).sum(1).max(initial=0) > capacity:
        raise KvenvError(f"{capacity} slots cannot hold what must stay: give a larger budget")
    index = np.full(gains.shape, -1)
    index[there] = np.arange(there.sum())
    count = int(there.sum())
    if not count:
        return 0.0
    period, _ = np.nonzero(there)
    room = sparse.coo_matrix(
        (np.ones(count), (period, np.arange(count))), shape=(len(gains), count)
    )
    later = there[1:] & there[:-1]  # a token held now was held before
    now, before = index[1:][later], index[:-1][later]
    rows = np.arange(len(now))
    ones = np.ones(len(now))
    stays = sparse.coo_matrix(
        (np.r_[ones, -ones], (np.r_[rows, rows], np.r_[now, before])), shape=(len(now), count)
    )
    result = linprog(
        -gains[there],
        A_ub=sparse.vstack([room, stays]).tocsr(),
        b_ub=np.r_[np.full(len(gains), float(capacity)), np.zeros(len(now))],
        bounds=np.stack([guarded[there].astype(float), np.ones(count)], 1),
        method="highs",
    )
    if result.status != 0:
        raise KvenvError(f"the best schedule was not found ({result.message}): report this")
    return -float(result.fun)


def chance(gains: np.ndarray, first: np.ndarray, capacity: int, guarded: np.ndarray) -> float:
    """The expected sum of gains where the tokens that go are drawn uniformly, exactly.

    At every decision each token that may go stays with the same probability, whatever went
    before; the arguments are those of `best_schedule`.
    """
    held = np.zeros(gains.shape[1])
    total = 0.0
    for k, gain in enumerate(gains):
        held[first == k] = 1.0
        free = ~guarded[k] & (first <= k)
        fixed = held[guarded[k]].sum()
        many = held[free].sum()
        if fixed + many > capacity:
            held[free] *= max(capacity - fixed, 0.0) / many
        total += float(held @ gain)
    return total
