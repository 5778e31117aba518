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

    def match(self, rows: int, tokens: int) -> None:
        """Match the known rows to the batch of a first step of ``tokens`` tokens.

        Raises:
            KvenvError: if they cannot be its.
        """
        if self._rows is None:
            self._rows = self._match(rows, tokens)

    @property
    def length(self) -> int:
        """Tokens that the mask covers; 0 without one."""
        return self._length

    def pads(self, rows: int) -> list[int]:
        """Pads of each of ``rows`` rows, which are matched."""
        return self._rows or [0] * rows

    def repeat(self, repeats: int) -> None:
        """Follow ``batch_repeat_interleave``."""
        if self._rows is not None:
            self._rows = [p for p in self._rows for _ in range(repeats)]

    def select(self, indices: torch.Tensor) -> None:
        """Follow ``reorder_cache`` and ``batch_select_indices``."""
        if self._rows is not None:
            self._rows = torch.tensor(self._rows)[indices.cpu()].tolist()

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
