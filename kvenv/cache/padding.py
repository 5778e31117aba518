"""How many pad tokens stand before each row's first true token, and how many a cache holds."""

from __future__ import annotations

import torch

from kvenv.errors import KvenvError

CURE = "pass attention_mask=inputs['attention_mask'] (all ones if nothing is padded)"


def _count_pads(attention_mask: torch.Tensor) -> list[int]:
    """Pad tokens at the head of every row of a 2D attention mask (B, S).

    Raises:
        KvenvError: if a row is not zeros followed by at least one one.
    """
    if attention_mask.ndim != 2:
        raise KvenvError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: give the tokenizer's own, "
            "(batch, tokens)"
        )
    valid = attention_mask.bool().cpu()
    wrong = ((valid[:, 1:] < valid[:, :-1]).any(-1) | ~valid.any(-1)).nonzero().flatten().tolist()
    if wrong:
        raise KvenvError(
            f"attention_mask row {wrong[0]} is not zeros and then ones: pad on the left "
            '(tokenizer.padding_side = "left")'
        )
    return (~valid).sum(-1).tolist()


class LeftPadding:
    """The left padding of every row of a batch, shared by all layers of one cache.

    A true position is the index in the padded sequence minus the row's padding; pad tokens get
    negative ones. Known rows are matched to the batch at the first update, where ``generate`` may
    have repeated each (beams, several return sequences).
    """

    def __init__(self, attention_mask: torch.Tensor | None = None) -> None:
        self.restart(attention_mask)

    def restart(self, attention_mask: torch.Tensor | None) -> None:
        """Forget the batch; ``attention_mask`` (B, S) is the next one's."""
        self._given = None if attention_mask is None else _count_pads(attention_mask)
        self._length = 0 if attention_mask is None else attention_mask.shape[1]
        self._rows: list[int] | None = None
        self._offsets: dict[torch.device, torch.Tensor] = {}

    def offset(self, rows: int, tokens: int, device: torch.device) -> torch.Tensor | int:
        """Index minus true position: (rows, 1, 1) int64 on ``device``, or 0 if nothing is padded.

        Args:
            rows: the batch size of this step.
            tokens: the tokens of this step.
            device: where the layer lives.
        """
        if self._rows is None:
            self._rows = self._match(rows, tokens)
        if rows != len(self._rows):
            raise KvenvError(
                f"the cache holds {len(self._rows)} rows and this step has {rows}: make a new "
                "EvictionCache for another batch"
            )
        if not any(self._rows):
            return 0
        if device not in self._offsets:
            self._offsets[device] = torch.tensor(self._rows, device=device).view(-1, 1, 1)
        return self._offsets[device]

    def leading(self, seen: int, held: int) -> list[int] | None:
        """Pads that lead each row when ``held`` of ``seen`` tokens are kept; None if none.

        Pads are the first to go, so what the kept tokens do not fill is the padding less all that
        was evicted. The model's own mask, cut to its last ``held`` columns, masks the same slots.
        """
        pads = [min(held, max(0, p - (seen - held))) for p in self._rows or []]
        return pads if any(pads) else None

    def repeat(self, repeats: int) -> None:
        """Follow ``batch_repeat_interleave``."""
        if self._rows is not None:
            self._set([p for p in self._rows for _ in range(repeats)])

    def select(self, indices: torch.Tensor) -> None:
        """Follow ``reorder_cache`` and ``batch_select_indices``."""
        if self._rows is not None:
            self._set(torch.tensor(self._rows)[indices.cpu()].tolist())

    def _set(self, rows: list[int]) -> None:
        self._rows, self._offsets = rows, {}

    def _match(self, rows: int, tokens: int) -> list[int]:
        if self._given is None:
            if rows > 1:
                raise KvenvError(f"a batch of {rows} rows and no attention_mask: {CURE}")
            return [0]
        if rows % len(self._given):
            raise KvenvError(
                f"attention_mask has {len(self._given)} rows and the batch {rows}: {CURE}"
            )
        if tokens > self._length:
            raise KvenvError(
                f"attention_mask covers {self._length} tokens and the prompt has {tokens}: {CURE}"
            )
        repeats = rows // len(self._given)
        return [p for p in self._given for _ in range(repeats)]
