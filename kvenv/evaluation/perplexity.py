"""How well the model still predicts what follows once its cache was cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvenv.errors import KvenvError
from kvenv.evaluation.cut import Cutter, Prompt, forward
from kvenv.evaluation.statistics import interval

LOGITS = 2**26
"""Numbers of logits held at once, where the tokens of one pass may be split."""


class Perplexity:
    """The perplexity of each episode's recorded future after its prompt was cut once.

    The future's first token is left out: the whole prompt predicts it, whatever is evicted then.

    Args:
        cutter: agents, budgets and model.

    Raises:
        KvenvError: if the future of an episode has fewer than two tokens.
    """

    def __init__(self, cutter: Cutter) -> None:
        for traces in cutter.sets:
            for index in range(len(traces)):
                if (length := traces.info(index).T) < 2:
                    raise KvenvError(
                        f"episode {index} of {traces.path} has {length} future token: perplexity "
                        "needs two or more, record it with more future tokens"
                    )
        self._cutter = cutter
        self._documents: list[str] = []
        self._tokens = 0
        self._full: list[float] = []
        self._cut: list[list[list[float]]] = []  # (episodes, budgets, agents)

    @torch.inference_mode()
    def add(self, prompt: Prompt) -> None:
        """Measure one episode."""
        length, n = len(prompt.future), prompt.info.n

        def mean(cache: Cache, rows: int) -> list[float]:
            tokens = prompt.future.expand(rows, -1)
            return losses(self._cutter.model, cache, tokens, start=n).mean(-1).tolist()

        rows = prompt.rows
        self._full += mean(prompt.whole(), 1)
        self._cut.append(
            [
                [loss for cache in self._cutter.cuts(prompt, share) for loss in mean(cache, rows)]
                for share in self._cutter.budgets
            ]
        )
        self._documents.append(prompt.info.document)
        self._tokens += length - 1

    def result(self) -> dict[str, Any]:
        """The "perplexity" section of an evaluation; ratios are minus 1 and paired by document."""
        names, documents = self._cutter.agents, self._documents
        full, cut = np.array(self._full), np.array(self._cut)
        oracle = None if self._cutter.oracle is None else names.index(self._cutter.oracle)

        def figures(budget: int, agent: int) -> dict[str, Any]:
            own, best = cut[:, budget, agent], None
            if oracle not in (None, agent):
                best = ratio(own, cut[:, budget, oracle], documents)
            versus_full = ratio(own, full, documents)
            return {
                **perplexity(own, documents),
                "versus_full": versus_full,
                "versus_oracle": best,
            }

        budgets = [str(fraction) for fraction in self._cutter.budgets]
        return {
            "protocol": "cut once",
            "sinks": self._cutter.sinks,
            "recent": self._cutter.recent,
            "tokens": self._tokens,
            "documents": len(set(documents)),
            "full": perplexity(full, documents),
            "agents": {
                name: {budget: figures(row, column) for row, budget in enumerate(budgets)}
                for column, name in enumerate(names)
            },
        }


@torch.inference_mode()
def losses(
    model: PreTrainedModel,
    cache: Cache,
    tokens: torch.Tensor,
    sizes: Sequence[int] | None = None,
    *,
    start: int = 0,
    first: int = 1,
) -> torch.Tensor:
    """Negative log-likelihoods of tokens that a cache is fed.

    Args:
        model: the model.
        cache: holds what came before.
        tokens: (B, S).
        sizes: how many tokens each forward pass feeds, S in all; None: as many as keep the logits
            within `LOGITS` numbers.
        start: position of the first token.
        first: index of the first token that counts, at least 1.

    Returns:
        (B, S - first) float64, in nats.
    """
    rows, length = tokens.shape
    if sizes is None:
        size = max(1, LOGITS // (rows * model.config.get_text_config().vocab_size))
        sizes = [size] * -(-length // size)
    found: list[torch.Tensor] = []
    begin = 0
    for size in sizes:
        if begin >= length - 1:  # nothing left to predict
            break
        end = min(begin + size, length)
        told = max(begin, min(first - 1, end - 1))  # logits of nothing are not offered
        logits = forward(model, cache, tokens[:, begin:end], start + begin, end - told)
        targets = tokens[:, told + 1 : end + 1]
        if told >= first - 1 and targets.shape[1]:
            spread = logits[:, : targets.shape[1]].flatten(0, 1).float()
            loss = cross_entropy(spread, targets.flatten(), reduction="none")
            found.append(loss.view(rows, -1))
        begin = end
    return torch.cat(found, dim=-1).double()


def perplexity(values: np.ndarray, documents: Sequence[str]) -> dict[str, float]:
    """Perplexity of mean losses (E,): exp of their mean over documents, and of its interval."""
    return {key: float(np.exp(value)) for key, value in interval(values, documents).items()}


def ratio(values: np.ndarray, baseline: np.ndarray, documents: Sequence[str]) -> dict[str, float]:
    """How far perplexities lie above others of the same documents: their ratio minus 1."""
    paired = interval(values - baseline, documents)
    return {key: float(np.expm1(value)) for key, value in paired.items()}
