"""What `kvenv.cache.kernels.admit` computes, in plain torch: needs no Triton and no GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kvenv.errors import KvenvError


def admit_reference(
    new_keys: Tensor,
    new_values: Tensor,
    new_positions: Tensor,
    new_scores: Tensor,
    new_worth: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scores: Tensor,
    worth: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    largest: int,
) -> None:
    """The same as `admit` in plain torch, by sorting; keys and values of any dtype.

    Raises:
        KvenvError: as for `check_shapes`.
    """
    new = (new_keys, new_values, new_positions, new_scores, new_worth)
    check_shapes(*new, keys, values, positions, scores, worth, offsets, lengths)
    rows, heads, q = new_positions.shape
    if new_positions.numel() == 0:
        return
    slots = positions.shape[1]
    place = torch.arange(largest, device=keys.device)
    capacity = offsets.diff()[:, None]
    slot = offsets[:-1, None] + place  # (H, largest)
    owned = place < capacity
    used = owned & (place < lengths[..., None])  # (B, H, largest)
    held = slot.clamp(max=slots - 1)

    candidate = torch.cat([used, new_positions >= 0], -1)
    position = torch.cat([positions[:, held], new_positions], -1).long()
    position = position.masked_fill(~candidate, 2**31)  # after every token
    number = torch.cat([worth[:, held], new_worth], -1) + 0.0  # no -0.0
    number = number.masked_fill(~candidate, -torch.inf)
    by_position = position.argsort(dim=-1)
    by_worth = number.gather(-1, by_position).argsort(dim=-1, descending=True, stable=True)
    best = by_position.gather(-1, by_worth)
    first = torch.arange(largest + q, device=keys.device) < capacity
    kept = candidate & torch.zeros_like(candidate).scatter(-1, best, first.expand_as(best))
    stays, arrives = kept.split([largest, q], -1)

    free = torch.where(owned & ~stays, slot, slots).sort(-1).values  # (B, H, largest)
    rank = (arrives.cumsum(-1) - 1).clamp(0, largest - 1)
    target = torch.where(arrives, free.gather(-1, rank), slots)
    source = target.new_full((rows, slots + 1), -1)  # the last place takes what nobody wants
    index = torch.arange(heads * q, device=keys.device).expand(rows, -1)
    source = source.scatter(1, target.flatten(1), index)[:, :slots]
    fresh = source >= 0
    origin = (
        torch.arange(rows, device=keys.device)[:, None],
        source.div(q, rounding_mode="floor").clamp(min=0),
        source % q,
    )
    for new, old in ((new_keys, keys), (new_values, values)):
        old.copy_(torch.where(fresh[..., None], new[origin], old))
    for new, old in ((new_positions, positions), (new_scores, scores)):
        old.copy_(torch.where(fresh, new[origin], old))
    lengths.copy_(kept.sum(-1))


def check_shapes(
    new_keys: Tensor,
    new_values: Tensor,
    new_positions: Tensor,
    new_scores: Tensor,
    new_worth: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scores: Tensor,
    worth: Tensor,
    offsets: Tensor,
    lengths: Tensor,
) -> None:
    """Refuse newcomers and slots that do not fit one another; see `admit` for their shapes.

    Raises:
        KvenvError: a shape, dtype or device differs, or slots are not contiguous; the message
            names the tensor.
    """
    if new_keys.ndim != 4 or keys.ndim != 3 or values.ndim != 3:
        raise KvenvError(
            f"admit takes new keys (B, H, q, D) and slots (B, T, D), not of "
            f"{tuple(new_keys.shape)} and {tuple(keys.shape)}"
        )
    rows, heads, q, size = new_keys.shape
    slots = keys.shape[1]
    block, place = (rows, heads, q), (rows, slots)
    same, whole, real = keys.dtype, torch.int32, torch.float32
    for name, tensor, shape, dtype in (
        ("new_keys", new_keys, (*block, size), same),
        ("new_values", new_values, (*block, values.shape[-1]), same),
        ("new_positions", new_positions, block, whole),
        ("new_scores", new_scores, block, real),
        ("new_worth", new_worth, block, real),
        ("keys", keys, (*place, size), same),
        ("values", values, (*place, values.shape[-1]), same),
        ("positions", positions, place, whole),
        ("scores", scores, place, real),
        ("worth", worth, place, real),
        ("offsets", offsets, (heads + 1,), whole),
        ("lengths", lengths, (rows, heads), whole),
    ):
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != keys.device:
            raise KvenvError(
                f"admit takes {name} of shape {shape}, {dtype} on {keys.device}, as the slots are, "
                f"not {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"
            )
        if not (name.startswith("new_") or tensor.is_contiguous()):
            raise KvenvError(f"admit takes {name} contiguous, not of strides {tensor.stride()}")
