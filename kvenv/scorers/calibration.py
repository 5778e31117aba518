"""From scores to attention: how much a token of a given score is expected to get, head by head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from scipy.optimize import isotonic_regression

from kvenv import files
from kvenv.errors import KvenvError
from kvenv.rules import SINKS
from kvenv.scorers.base import Head

KNOTS = 64
"""Quantiles of a head's scores at which its table stands."""

LARGEST = float(np.finfo(np.float32).max)

FORMAT = "kvenv-calibration"


@dataclass(frozen=True, eq=False)
class Calibration:
    """A rising table for each head, from score to expected attention mass.

    Masses are absolute: what one future query is expected to give the token, summed over the
    group's query heads. Between knots they are interpolated, beyond them constant.

    Attributes:
        heads: H (layer, KV head) pairs.
        scores: (H, K) float32, ascending.
        masses: (H, K) float32, not negative, never falling.

    Raises:
        KvenvError: if they are anything else.
    """

    heads: tuple[Head, ...]
    scores: torch.Tensor
    masses: torch.Tensor

    def __post_init__(self) -> None:
        heads = tuple((int(layer), int(head)) for layer, head in self.heads)
        object.__setattr__(self, "heads", heads)
        x, y = self.scores, self.masses
        shape = len(heads) > 0 and x.shape == y.shape and x.ndim == 2 and len(x) == len(heads)
        whole = shape and bool(torch.isfinite(x).all() and torch.isfinite(y).all())
        rising = whole and bool((x.diff() >= 0).all() and (y.diff() >= 0).all() and (y >= 0).all())
        if not rising or len(set(heads)) < len(heads):
            raise KvenvError(
                "a calibration is not of rising, finite tables for distinct heads: calibrate again "
                "with `kvenv calibrate`"
            )

    def __repr__(self) -> str:
        return f"Calibration({len(self.heads)} heads, {self.scores.shape[1]} knots)"

    def rows(self, layer: int, kv_heads: int) -> torch.Tensor:
        """The tables of a layer's KV heads, (2, kv_heads, K): scores and masses.

        Raises:
            KvenvError: naming the heads that have none.
        """
        index = {head: row for row, head in enumerate(self.heads)}
        wanted = [(layer, head) for head in range(kv_heads)]
        if missing := [head for head in wanted if head not in index]:
            raise KvenvError(
                f"heads {missing} have no calibration: calibrate on traces of all heads with "
                "`kvenv calibrate`"
            )
        chosen = [index[head] for head in wanted]
        return torch.stack([self.scores[chosen], self.masses[chosen]])

    def masses_of(self, layer: int, scores: torch.Tensor) -> torch.Tensor:
        """Expected masses (B, H, n) float32 of a layer's scores (B, H, n)."""
        x, y = self.rows(layer, scores.shape[1]).to(scores.device)
        return interpolate(scores, x, y)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a safetensors file keeps; see `from_tensors`."""
        return {
            "calibration.heads": torch.tensor(self.heads, dtype=torch.int64),
            "calibration.scores": self.scores.contiguous(),
            "calibration.masses": self.masses.contiguous(),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Calibration | None:
        """A calibration out of a file's tensors, or None if it has none."""
        if "calibration.heads" not in tensors:
            return None
        try:
            heads = [(int(layer), int(head)) for layer, head in tensors["calibration.heads"]]
            numbers = (tensors[f"calibration.{name}"].float() for name in ("scores", "masses"))
            return cls(tuple(heads), *numbers)
        except (KeyError, TypeError, ValueError) as error:
            raise KvenvError(
                f"a calibration is damaged ({error!r}): calibrate again with `kvenv calibrate`"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write it to a file of its own, whole or not at all."""
        files.write(Path(path), save(self.tensors(), metadata={"format": FORMAT}))

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """What `save` wrote.

        Raises:
            KvenvError: if the file is missing, or none of those.
        """
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()
                found = cls.from_tensors({name: file.get_tensor(name) for name in names})
        except (OSError, SafetensorError) as error:
            raise KvenvError(
                f"{str(path)!r} is no calibration ({error}): give what `kvenv calibrate` wrote"
            ) from error
        if found is None:
            raise KvenvError(f"{str(path)!r} is no calibration: give what `kvenv calibrate` wrote")
        return found


def interpolate(scores: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Tables (H, K) at scores (B, H, n), (B, H, n) float32; infinite scores meet their ends."""
    given = scores.float().clamp(-LARGEST, LARGEST).transpose(0, 1).flatten(1).contiguous()
    above = torch.searchsorted(x.contiguous(), given).clamp(1, x.shape[1] - 1)
    low, high = (x.gather(1, at) for at in (above - 1, above))
    share = ((given - low) / (high - low).clamp_min(1e-30)).clamp(0, 1)
    found = torch.lerp(y.gather(1, above - 1), y.gather(1, above), share)
    batch, heads, n = scores.shape
    return found.view(heads, batch, n).transpose(0, 1)


def fit_calibration(
    heads: Sequence[Head],
    episodes: Iterable[tuple[torch.Tensor, torch.Tensor, int]],
    sinks: int = SINKS,
) -> Calibration:
    """Fit the tables on episodes.

    Scores are cut into `KNOTS` groups of equal size; each gives a knot, its mean score and its
    mean mass, which isotonic regression (pool adjacent violators) then makes rise.

    Args:
        heads: H (layer, KV head) pairs.
        episodes: for each, scores (H, n), utility (H, n) and T, the number of future queries.
        sinks: first tokens left out: caches keep them anyway, and their masses are like no others.

    Raises:
        KvenvError: if there is no token to fit on.
    """
    scores: list[np.ndarray] = []
    masses: list[np.ndarray] = []
    for score, utility, future in episodes:
        scores.append(score[:, sinks:].float().clamp(-LARGEST, LARGEST).cpu().numpy())
        masses.append((utility[:, sinks:].float() / future).cpu().numpy())
    count = sum(one.shape[1] for one in scores)
    if count < 2:
        raise KvenvError("no tokens to calibrate on: give recorded traces with longer prompts")
    x, y = np.concatenate(scores, 1), np.concatenate(masses, 1)
    ends = np.linspace(0, count, min(KNOTS, count) + 1).astype(int)
    tables = np.empty((2, len(heads), len(ends) - 1), np.float32)
    for row in range(len(heads)):
        order = np.argsort(x[row], kind="stable")
        sizes = np.diff(ends)
        sums = (np.add.reduceat(z[row][order].astype(np.float64), ends[:-1]) for z in (x, y))
        centre, mass = (total / sizes for total in sums)
        tables[0, row] = np.maximum.accumulate(centre)
        tables[1, row] = isotonic_regression(mass, weights=sizes).x
    tables[1] = np.maximum.accumulate(tables[1].clip(0), axis=1)
    return Calibration(tuple(heads), *torch.from_numpy(tables).unbind(0))
