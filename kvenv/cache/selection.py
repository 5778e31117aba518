"""The one decision: score what is held as it looks from now, and keep the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvenv.cache.policy import Policy
from kvenv.cache.slots import Slots, Tokens
from kvenv.rules import compete, protected, worth
from kvenv.scorers.attention import recent_attention

Given = Mapping[str, Tensor]
"""What is known of queries, (B, ...) by the name under which a scorer takes it."""


def scores_of(policy: Policy, layer: int, tokens: Tokens, now: Tensor, given: Given) -> Tensor:
    """Scores (B, H, m) float32 of one layer's tokens, each head's among themselves; 0 beyond.

    Scorers may look at all tokens that they are given, so one is asked once for every number of
    tokens that a head holds. Where heads differ in it, one that averages over heads sees as many
    tokens of the others.

    Args:
        policy: the cache's.
        layer: the model's own number.
        tokens: what is held.
        now: (B,) position of each row's newest token.
        given: what scorers need.
    """
    scorer, present = policy.scorer, tokens.present
    positions = tokens.positions.where(present, 0)
    if scorer.pointwise(layer):
        scores = scorer.score(layer, tokens.keys, tokens.values, positions, now)
    else:
        scores = torch.zeros(present.shape, device=present.device)
        counts = tokens.counts.unsqueeze(-1)
        for n in counts.unique().tolist():
            if not n:
                continue
            first = (slice(None), slice(None), slice(n))
            needs = dict(given)
            if tokens.past is not None:
                needs["past_attention"] = tokens.past[first]
            if "recent_attention" in scorer.needs:
                needs["recent_attention"] = recent_attention(
                    given["queries"], tokens.keys[first], positions[first]
                )
            states = tokens.keys[first], tokens.values[first], positions[first]
            found = scorer.score(layer, *states, now, **needs)
            scores[first] = torch.where(counts == n, found, scores[first])
    return scores


def keep(policy: Policy, layers: Sequence[int], scores: Sequence[Tensor], worths: Tensor) -> Tensor:
    """How many tokens each head keeps, (B, L * H).

    Args:
        policy: the cache's.
        layers: L layers whose heads compete, by the model's own numbers.
        scores: of each, (B, H, m).
        worths: of all, (B, L * H, m): +inf where a token always stays, -inf where there is none.
    """
    if not policy.competes:
        return (worths > -torch.inf).sum(-1).clamp(max=policy.kept)
    if policy.calibration is None:
        raise RuntimeError("heads compete without a calibration")
    pairs = zip(layers, scores, strict=True)
    masses = torch.cat([policy.calibration.masses_of(layer, one) for layer, one in pairs], 1)
    masses = worth(masses, worths == torch.inf, worths > -torch.inf)
    if policy.threshold is not None:
        masses = masses.masked_fill(masses < policy.threshold, -torch.inf)
    if policy.allocation == "uniform":
        return (masses > -torch.inf).sum(-1).clamp(max=policy.kept)
    return compete(masses, worths.shape[1] * policy.kept, policy.floor)


def decide(
    policy: Policy, layers: Sequence[int], scores: Sequence[Tensor], guarded: Tensor, there: Tensor
) -> tuple[Tensor, Tensor]:
    """Which tokens stay.

    Args:
        policy: the cache's.
        layers: L layers that are decided on together.
        scores: of each, (B, H, m).
        guarded: (B, L * H, m), which always stay.
        there: (B, L * H, m), where there is a token.

    Returns:
        Indices (B, L * H, k) of those that stay, in order, and how many of them count, (B, L * H).
        Of tokens of equal worth the earlier stay.
    """
    worths = worth(torch.cat(list(scores), 1), guarded, there)
    counts = keep(policy, layers, scores, worths)
    return order_of(policy, worths, counts), counts


def order_of(policy: Policy, worths: Tensor, counts: Tensor) -> Tensor:
    """Places (B, heads, k), ascending, of each head's ``counts`` best by ``worths``."""
    best = worths.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(best.shape[-1], device=best.device).expand_as(best)
    stays = torch.zeros_like(worths, dtype=torch.bool).scatter(
        -1, best, rank < counts.unsqueeze(-1)
    )
    most = int(counts.max()) if policy.competes else min(policy.kept, best.shape[-1])
    order = (~stays).to(torch.uint8).argsort(dim=-1, stable=True)
    return order[..., :most]


def guards(policy: Policy, tokens: Tokens, now: Tensor) -> Tensor:
    """Which tokens (B, H, m) always stay."""
    recent = now.view(-1, 1, 1)
    return protected(tokens.positions, recent, policy.sinks, policy.recent) & tokens.present


def starts_of(counts: Tensor, policy: Policy) -> Tensor:
    """Where heads' slots begin if each has its tokens (B, heads) and R more, (B, heads) int32."""
    if not policy.competes:
        first = torch.arange(counts.shape[1], device=counts.device, dtype=torch.int32)
        return (first * policy.tokens).expand(counts.shape)
    room = counts + policy.interval
    return (room.cumsum(-1) - room).int()


def total_of(asked: int, policy: Policy, before: int, full: int) -> int:
    """Slots a row if the row that wants most asks for so many.

    Args:
        asked: slots that are needed.
        policy: the cache's.
        before: slots a row now.
        full: slots a row without a threshold.
    """
    if policy.threshold is None:
        return full
    # Memory follows the text, but not every token of it.
    return before if 0.75 * before <= asked <= before else min(full, math.ceil(asked * 1.1))


def relocate(slots: Slots, rows: Tensor | None, order: Tensor, counts: Tensor, to: Tensor) -> None:
    """Have heads hold some of their tokens, in slots from ``to`` on; in place.

    Args:
        slots: of L layers of H heads.
        rows: of the batch; None for all.
        order: (rows, L * H, k) tokens that stay, by place in their head.
        counts: (rows, L * H) how many of them.
        to: (rows, L * H) new first slots.
    """
    total = slots.keys.shape[1]
    old = slots.starts if rows is None else slots.starts.index_select(1, rows)
    old = old.transpose(0, 1).flatten(1)
    j = torch.arange(order.shape[-1], device=order.device)
    inside = j < counts.unsqueeze(-1)
    target = (to.unsqueeze(-1) + j).where(inside, total).long()
    sources = torch.arange(total + 1, device=order.device).repeat(len(order), 1)
    sources.scatter_(1, target.flatten(1), (old.unsqueeze(-1) + order).flatten(1))
    slots.move(rows, sources[:, :total])
    place(slots, rows, counts, to)


def place(slots: Slots, rows: Tensor | None, counts: Tensor, to: Tensor) -> None:
    """Note where the heads of some rows begin and how many tokens (rows, L * H) they hold."""
    layers, _, heads = slots.lengths.shape
    for buffer, flat in ((slots.starts, to), (slots.lengths, counts)):
        new = flat.int().unflatten(1, (layers, heads)).transpose(0, 1)
        if rows is None:
            buffer.copy_(new)
        else:
            buffer.index_copy_(1, rows, new)
