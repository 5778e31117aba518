"""Eviction while decoding: a bounded cache that is fed a text, or a conversation turn by turn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from kvenv.cache import EvictionCache
from kvenv.errors import KvenvError
from kvenv.evaluation.cut import Allocation, calibrations_of, check_recorded, row_name
from kvenv.evaluation.perplexity import losses, perplexity, ratio
from kvenv.scorers.base import Scorer
from kvenv.scorers.calibration import Calibration
from kvenv.trace import TraceSet

ROWS = 32
"""Most episodes fed at once."""


@dataclass(frozen=True)
class Feed:
    """Episodes that are fed together.

    Attributes:
        documents: of each of the B episodes.
        tokens: (B, S) prompt and future.
        turns: where each turn begins, the first at 0; empty for a text fed by steps.
        first: index of the first token whose loss counts.
    """

    documents: Sequence[str]
    tokens: torch.Tensor
    turns: Sequence[int]
    first: int

    def sizes(self, budget: int, step: int) -> list[int]:
        """Tokens of each forward pass: turns, or what the budget holds and then steps."""
        length = self.tokens.shape[1]
        if self.turns:
            return [end - begin for begin, end in pairwise([*self.turns, length])]
        return [budget, *[step] * -(-(length - budget) // step)]


class Streaming:
    """Perplexity under eviction while decoding, at fixed budgets in tokens a head.

    Agents that need the future (utility) cannot decode; they are left out and named in the result.

    Args:
        model: the model that the sets were recorded from.
        scorers: agent -> scorer.
        budgets: tokens a head.
        sinks: the first tokens, always kept.
        recent: the last tokens, always kept.
        step: tokens of a text fed at a time.
        refresh: tokens between two selections; None leaves it to the cache.
        allocations: how heads share the budget, each measured for every agent.
        calibrations: agent -> what heads compete by; of those not named, the scorer's own.

    Raises:
        KvenvError: if no agent can decode, one lacks heads or is of another model, a budget cannot
            hold sinks and recent, or there is no step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        scorers: Mapping[str, Scorer],
        budgets: Sequence[int],
        *,
        sinks: int = 4,
        recent: int = 16,
        step: int = 1,
        refresh: int | None = None,
        allocations: Sequence[Allocation] = ("uniform",),
        calibrations: Mapping[str, Calibration] | None = None,
    ) -> None:
        if not budgets:
            raise KvenvError("no token budgets given: give tokens a head such as 256")
        if step < 1:
            raise KvenvError(f"step is {step}: feed at least 1 token at a time")
        self._model, self._step = model, step
        self._budgets = list(dict.fromkeys(budgets))
        self._sinks, self._recent = sinks, recent
        self._refresh = refresh
        self._scorers = {n: one for n, one in scorers.items() if "utility" not in one.needs}
        self._left_out = {n: "needs utility" for n in scorers if n not in self._scorers}
        if not self._scorers:
            raise KvenvError(
                f"none of the agents {', '.join(scorers)} can decode: name one that needs no "
                "utility, which is known offline only"
            )
        self._calibrations = dict(calibrations or {})
        if set(allocations) - {"uniform"}:
            self._calibrations = calibrations_of(self._scorers, calibrations)
        self._rows: dict[str, tuple[str, Allocation]] = {
            row_name(name, allocation): (name, allocation)
            for allocation in dict.fromkeys(allocations)
            for name in self._scorers
        }
        for row in self._rows:
            for budget in self._budgets:
                try:
                    self._cache(row, budget, 1, 1)
                except KvenvError as error:
                    raise KvenvError(f"agent {row} cannot decode: {error}") from error

    def passes(self, batches: Sequence[Feed]) -> int:
        """How often `run` will tick."""
        return len(batches) * (1 + len(self._rows) * len(self._budgets))

    def texts(self, sets: Sequence[TraceSet], rows: int = ROWS) -> list[Feed]:
        """Whole episodes as texts, those of equal length together.

        Of each, the tokens after the first max(budgets) count: the same ones at every budget.

        Raises:
            KvenvError: on sets of another model, or an episode that no budget makes evict.
        """
        check_recorded(self._model, sets)
        most = max(self._budgets)
        alike: defaultdict[int, list[tuple[TraceSet, int]]] = defaultdict(list)
        for traces in sets:
            for index in range(len(traces)):
                length = traces.info(index).S
                if length <= most:
                    raise KvenvError(
                        f"episode {index} of {traces.path} has {length} tokens, none after the "
                        f"first {most}: give smaller token budgets, or record longer episodes"
                    )
                alike[length].append((traces, index))
        groups = [
            one[i : i + rows] for _, one in sorted(alike.items()) for i in range(0, len(one), rows)
        ]
        return [self._batch(group, (), most) for group in groups]

    def conversations(self, sets: Sequence[TraceSet]) -> list[Feed]:
        """Recorded conversations, one by one; all tokens after the first turn count.

        Raises:
            KvenvError: on sets of another model, if no episode tells where its turns begin, or if
                one tells it wrongly.
        """
        check_recorded(self._model, sets)
        found = []
        for traces in sets:
            for index in range(len(traces)):
                turns = traces.info(index).metadata.get("turns")
                if turns is not None:
                    _check_turns(traces, index, turns)
                    found.append(self._batch([(traces, index)], turns, turns[1]))
        if not found:
            raise KvenvError(
                "no episode tells where its turns begin: record conversations with `kvenv record "
                "chat`, anew if the set is from an older kvenv"
            )
        return found

    @torch.inference_mode()
    def run(
        self, batches: Sequence[Feed], tick: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        """Feed every batch to the full cache and to each agent's at each budget.

        Args:
            batches: from `texts` or `conversations`.
            tick: called after every pass over a batch.

        Returns:
            A "streaming" or "conversation" section of an evaluation, without the step.
        """
        done = tick or (lambda: None)
        full: list[float] = []
        own: dict[tuple[str, int], list[float]] = defaultdict(list)
        for batch in batches:
            ids, first = batch.tokens.to(self._model.device), batch.first
            whole = DynamicCache(config=self._model.config)
            full += losses(self._model, whole, ids, first=first).mean(-1).tolist()
            done()
            for name in self._rows:
                for budget in self._budgets:
                    cache = self._cache(name, budget, *ids.shape)
                    sizes = batch.sizes(budget, self._step)
                    fed = losses(self._model, cache, ids, sizes, first=first)
                    own[name, budget] += fed.mean(-1).tolist()
                    done()
        documents = [document for batch in batches for document in batch.documents]
        baseline = np.array(full)

        def figures(values: np.ndarray) -> dict[str, Any]:
            return {
                **perplexity(values, documents),
                "versus_full": ratio(values, baseline, documents),
            }

        return {
            "sinks": self._sinks,
            "recent": self._recent,
            "documents": len(set(documents)),
            "tokens": sum(len(b.documents) * (b.tokens.shape[1] - b.first) for b in batches),
            "full": perplexity(baseline, documents),
            "agents": {
                name: {str(b): figures(np.array(own[name, b])) for b in self._budgets}
                for name in self._rows
            },
            "left_out": self._left_out,
        }

    def _cache(self, row: str, budget: int, rows: int, length: int) -> EvictionCache:
        name, allocation = self._rows[row]
        return EvictionCache(
            self._model,
            self._scorers[name],
            budget=budget,
            sinks=self._sinks,
            recent=self._recent,
            refresh=self._refresh,
            allocation=allocation,
            calibration=self._calibrations.get(name),
            attention_mask=torch.ones(rows, length, dtype=torch.int64),
        )

    @staticmethod
    def _batch(episodes: Sequence[tuple[TraceSet, int]], turns: Sequence[int], first: int) -> Feed:
        documents = [traces.info(index).document for traces, index in episodes]
        rows = [torch.from_numpy(traces.tokens(index)).long() for traces, index in episodes]
        return Feed(documents, torch.stack(rows), turns, first)


def _check_turns(traces: TraceSet, index: int, turns: Sequence[int]) -> None:
    length = traces.info(index).S
    whole = all(isinstance(turn, int) for turn in turns)
    rising = whole and all(a < b for a, b in pairwise([*turns, length]))
    if len(turns) < 2 or turns[0] != 0 or not rising:
        raise KvenvError(
            f'episode {index} of {traces.path} has "turns" {list(turns)}: they must be two or more '
            f"token offsets, rising from 0 and below its {length} tokens; mend the workload"
        )
