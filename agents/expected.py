"""Expected attention: what queries to come would attend to (Devoto et al., arXiv 2510.00636)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvenv.errors import KvenvError
from kvenv.learning.agent import Heuristic


@dataclass
class Expected(Heuristic):
    """Score = expected attention of normally distributed queries, times the value's norm.

    The queries after the prompt are taken to be normal with the prompt's own mean and covariance
    (`kvenv.scorers.query_stats`, recorded with ``--stats``), so that a key's expected weight is
    exp(k . mean / sqrt(d) + k^T cov k / 2d). Weights are normalised over the prompt, averaged over
    the query heads that share a KV head and multiplied by ||v||.

    As in kvpress: sinks stay, outside the normalisation, and the output projection, which the
    paper's derivation multiplies the value by, is left out.

    Args:
        sinks: first tokens that stay.
        use_covariance: False takes the mean query alone.
        use_vnorm: False leaves the values out.
        epsilon: added to the weights before the norm; a large one makes the norm decide.
    """

    sinks: int = 4
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = 0.0

    needs = frozenset({"query_mean", "query_cov"})

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise KvenvError(f"sinks is {self.sinks}: give at least 0 tokens")

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
        sink = positions < self.sinks
        d, heads = keys.shape[-1], keys.shape[1]
        asked = keys.float().unsqueeze(2)  # (B, H, 1, n, d), for the group's G query heads
        mean = needs["query_mean"].float().unflatten(1, (heads, -1))
        logits = (asked @ mean.unsqueeze(-1)).squeeze(-1) * d**-0.5
        if self.use_covariance:
            covariance = needs["query_cov"].float().unflatten(1, (heads, -1))
            logits = logits + (asked @ covariance * asked).sum(-1) / (2 * d)
        weights = logits.masked_fill(sink.unsqueeze(2), -torch.inf).softmax(-1).mean(2)
        if self.use_vnorm:
            weights = (weights + self.epsilon) * values.float().norm(dim=-1)
        return weights.masked_fill(sink, torch.inf)
