"""LagKV: tokens that stand out against the chunk after them (Liang et al., arXiv 2504.04704)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvenv.errors import KvenvError
from kvenv.learning.agent import Heuristic

FLAT = 1e-6
"""Least range of a channel, where kvpress would divide by 0."""


@dataclass
class LagKV(Heuristic):
    """Score = spread over channels of a key and a value, relative to the next chunk's range.

    After the sinks, tokens form chunks of ``lag``. Each channel of a chunk is scaled by its least
    and largest value in the chunk after it; the standard deviation over a token's channels, after
    a softmax over its chunk, is averaged over key and value. Sinks, the last whole chunk and what
    follows it stay, as does everything in fewer than ``sinks + 2 * lag`` tokens: those rank first,
    sinks before all and then the newest.

    As in kvpress, the prompt is cut once and a token's score is its place within its chunk; the
    paper takes the best of each chunk as well, and goes on so while decoding. kvpress gives all
    the tokens that stay one score, so it leaves open which go first at small budgets.

    Args:
        sinks: first tokens that stay.
        lag: tokens a chunk.
        cross_scoring: compare tokens across chunks by their softmaxed spread.
    """

    sinks: int = 4
    lag: int = 128
    cross_scoring: bool = False

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise KvenvError(f"sinks is {self.sinks}: give at least 0 tokens")
        if self.lag < 1:
            raise KvenvError(f"lag is {self.lag}: give at least 1 token")

    def score(
        self,
        layer: int,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        now: Tensor,
        **needs: Tensor,
    ) -> Tensor:
        """(B, H, n) float32."""
        scores = 1 + positions.float()
        scores[..., : self.sinks] = torch.inf
        chunks = (keys.shape[2] - self.sinks) // self.lag
        if chunks < 2:
            return scores
        end = self.sinks + chunks * self.lag
        keys, values = (x[:, :, self.sinks : end] for x in (keys, values))
        spread = (self._spread(keys) + self._spread(values)) / 2
        if not self.cross_scoring:
            spread = spread.argsort(-1).argsort(-1).float() / self.lag
        scores[..., self.sinks : end - self.lag] = spread.flatten(-2)
        return scores

    def _spread(self, vectors: Tensor) -> Tensor:
        """(B, H, chunks - 1, lag): how much each token's channels spread, softmaxed."""
        parts = vectors.float().unflatten(2, (-1, self.lag))
        low, high = parts[:, :, 1:].aminmax(dim=-2, keepdim=True)
        scaled = (parts[:, :, :-1] - low) / (high - low).clamp(min=FLAT)
        return scaled.std(-1).softmax(-1)
