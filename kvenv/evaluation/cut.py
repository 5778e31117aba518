"""Cut once: a prompt's cache is evicted from before anything that follows is seen."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from kvenv.errors import KvenvError
from kvenv.evaluation.cutlayer import CutLayer, own_masks
from kvenv.evaluation.retention import kind_of, score_prompt
from kvenv.identity import fingerprint, full_attention_layers
from kvenv.recording.tokens import check_choice
from kvenv.rules import budget_tokens, compete, competition_floor, protect, ranking
from kvenv.scorers.base import Head, Scorer
from kvenv.scorers.calibration import Calibration
from kvenv.trace import EpisodeInfo, TraceSet, same_model

FLOAT32 = torch.finfo(torch.float32)

Allocation = Literal["uniform", "layerwise", "adaptive"]
"""Every head keeps the budget, or the heads of a layer, or all heads, compete for one total."""

Counts = int | Mapping[int, torch.Tensor]
"""Tokens for every head, or layer -> (A, H) tokens for each agent's heads."""


@dataclass(frozen=True)
class Prompt:
    """A recorded prompt as the model has read it and every agent has ranked it.

    Attributes:
        traces: the set it is from.
        info: its episode's attributes; n prompt tokens.
        future: (T,) the recorded tokens that follow.
        logits: (1, V) what the model expects after the prompt, all of it being there.
        cache: the model's own cache of the n tokens, one row; `whole` gives copies of it.
        orders: full-attention layer -> rankings (A, H, n) int64, a row an agent.
        masses: (A, heads, n) the attention that each token is expected to get, infinite where it
            always stays; None where every head is given the same budget.
    """

    traces: TraceSet
    info: EpisodeInfo
    future: torch.Tensor
    logits: torch.Tensor
    cache: Cache
    orders: Mapping[int, torch.Tensor]
    masses: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """A, the agents."""
        return len(next(iter(self.orders.values())))

    def whole(self) -> Cache:
        """A cache of one row from which nothing was evicted."""
        return copy.deepcopy(self.cache)

    def kept(self, layer: int, budget: int | torch.Tensor) -> torch.Tensor:
        """Positions of the tokens that each agent keeps, (A, H, b) int64, ascending.

        Of budgets that differ, (A, H) numbers of at least 1, b is the largest; -1 fills the first
        places of the others.
        """
        order = self.orders[layer]
        if isinstance(budget, int):
            return order[..., :budget].sort(dim=-1).values
        best = order[..., : int(budget.max())]
        beyond = torch.arange(best.shape[-1], device=best.device) >= budget.unsqueeze(-1)
        return best.masked_fill(beyond, -1).sort(dim=-1).values

    def counts(self, budget: int, allocation: Allocation, least: int) -> Counts:
        """How many tokens each head keeps of a budget, as an allocation has it.

        Args:
            budget: tokens a head, on average where heads compete.
            allocation: see `Allocation`.
            least: sinks and recent tokens together.

        Raises:
            KvenvError: if heads compete and there are no masses to compete by.
        """
        if allocation == "uniform":
            return budget
        if self.masses is None:
            raise KvenvError(f"allocation {allocation!r} needs masses: name it to the Cutter")
        layers = len(self.orders) if allocation == "layerwise" else 1
        groups = self.masses.unflatten(1, (layers, -1)).flatten(0, 1)
        total = budget * groups.shape[1]
        counts = compete(groups, total, competition_floor(budget, least))
        per_layer = counts.view(len(self.masses), len(self.orders), -1).unbind(1)
        return dict(zip(self.orders, per_layer, strict=True))

    def cut(self, budget: Counts) -> Cache:
        """A cache of A rows, a row an agent, whose heads each hold their best ``budget`` tokens.

        Where budgets differ, it is the results that are those of such a cache, not its memory, and
        `forward` alone feeds it.

        Layers without rankings (sliding windows and others that the model bounds itself) are the
        model's own. Nothing more is evicted from it: it grows with every token that it is fed.
        """
        rows = torch.zeros(self.rows, dtype=torch.int64)
        layers: list[Any] = list(self.cache.layers)
        for number, layer in enumerate(layers):
            if number in self.orders:
                kept = self.kept(number, budget if isinstance(budget, int) else budget[number])
                absent = None if isinstance(budget, int) else kept < 0
                kept = kept.clamp_min(0)
                keys, values = _gather(layer.keys, kept), _gather(layer.values, kept)
                layers[number] = CutLayer(keys, values, self.info.n - kept.shape[-1], absent)
            else:
                layers[number] = copy.deepcopy(layer)
                layers[number].reorder_cache(rows)
        return Cache(layers=layers)


def _gather(states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The tokens ``kept`` (A, H, b) of states (1, H, n, d): (A, H, b, d)."""
    where = kept.unsqueeze(-1).expand(-1, -1, -1, states.shape[-1])
    return states.expand(len(kept), -1, -1, -1).gather(2, where)


class Cutter:
    """Reads recorded prompts with a model, each to be cut as every agent would cut it.

    This is the protocol of kvpress and SnapKV: the prompt is read in full, each head's cache is
    cut once to its budget, and what follows (a question, a text) meets what is left and is kept
    whole. Scores come from the trace, so an agent may need what decoding could not give it.

    Args:
        model: the model that the sets were recorded from.
        sets: trace sets with every full-attention layer.
        scorers: agent -> scorer of every head.
        budgets: as fractions of the prompt.
        sinks: the first tokens, kept by every agent.
        recent: the last tokens, kept by every agent.
        allocations: how heads share the budget, each measured for every agent.
        calibrations: agent -> what heads compete by; of those not named, the scorer's own.

    Attributes:
        agents: their names, in the order of the rows of `cuts`: under each allocation all of them,
            "NAME (ALLOCATION)" where it is not uniform.
        kinds: agent -> learned, heuristic or oracle.
        oracle: the agent that ranks by the recorded future, if there is one.

    Raises:
        KvenvError: if the sets are of another model or lack layers, a scorer is of another model
            or lacks heads, or a budget cannot hold sinks and recent of some prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sets: Sequence[TraceSet],
        scorers: Mapping[str, Scorer],
        *,
        budgets: Sequence[float],
        sinks: int = 4,
        recent: int = 16,
        allocations: Sequence[Allocation] = ("uniform",),
        calibrations: Mapping[str, Calibration] | None = None,
    ) -> None:
        check_recorded(model, sets)
        if not scorers:
            raise KvenvError("no agents given: name at least one")
        layers = full_attention_layers(model.config)
        heads = [(layer, head) for layer in layers for head in range(sets[0].model.kv_heads)]
        for traces in sets:
            if missing := sorted(set(layers) - set(traces.model.layers)):
                raise KvenvError(
                    f"{traces.path} lacks the full-attention layers {missing}, which a cut needs: "
                    "record it without --layers"
                )
        for name, scorer in scorers.items():
            if check := getattr(scorer, "check_model", None):
                check(sets[0].model)
            _check_covers(name, scorer, heads)
        self.model, self.sets, self.sinks, self.recent = model, sets, sinks, recent
        self.budgets = tuple(dict.fromkeys(map(float, budgets)))
        self.allocations = tuple(dict.fromkeys(allocations))
        for allocation in self.allocations or ("",):
            check_choice("allocation", allocation, get_args(Allocation))
        self._compete = self.allocations != ("uniform",)
        self._calibrations = calibrations_of(scorers, calibrations) if self._compete else {}
        self.kinds = {
            row_name(name, allocation): kind_of(one)
            for allocation in self.allocations
            for name, one in scorers.items()
        }
        self.agents = tuple(self.kinds)
        self.oracle = next((n for n, kind in self.kinds.items() if kind == "oracle"), None)
        self._scorers, self._heads = scorers, heads
        self._check_budgets()

    def __len__(self) -> int:
        return sum(map(len, self.sets))

    def __iter__(self) -> Iterator[Prompt]:
        """Every prompt of every set, in order."""
        for traces in self.sets:
            for index in range(len(traces)):
                yield self.read(traces, index)

    @torch.inference_mode()
    def read(self, traces: TraceSet, index: int) -> Prompt:
        """Run the model over an episode's prompt and rank it with every scorer."""
        info = traces.info(index)
        tokens = torch.from_numpy(traces.tokens(index)).long().to(self.model.device)
        cache = DynamicCache(config=self.model.config)
        logits = forward(self.model, cache, tokens[None, : info.n], 0, keep=1)[:, -1]
        _, scores = score_prompt(traces, index, self._scorers, self._heads, self.model.device)
        orders = torch.stack([self._order(one) for one in scores.values()])
        per_layer = orders.unflatten(1, (-1, traces.model.kv_heads)).unbind(1)
        layers = dict.fromkeys(layer for layer, _ in self._heads)
        ranked = dict(zip(layers, per_layer, strict=True))
        masses = None
        if self._compete:
            masses = torch.stack([self._masses(name, one) for name, one in scores.items()])
        return Prompt(traces, info, tokens[info.n :], logits, cache, ranked, masses)

    def cuts(self, prompt: Prompt, share: float) -> Iterator[Cache]:
        """The caches of all `agents` at a share of the prompt, an allocation each."""
        least = self.sinks + self.recent
        budget = budget_tokens(share, prompt.info.n, least)
        for allocation in self.allocations:
            yield prompt.cut(prompt.counts(budget, allocation, least))

    def _order(self, scores: torch.Tensor) -> torch.Tensor:
        """Rankings (heads, n) from scores at the prompt's end, sinks and recent tokens first."""
        # Whatever a scorer says stays below what is protected.
        return ranking(protect(scores.clamp(FLOAT32.min, FLOAT32.max), self.sinks, self.recent))

    def _masses(self, name: str, scores: torch.Tensor) -> torch.Tensor:
        """What attention an agent expects of each token, (heads, n), infinite where protected."""
        each = scores.unflatten(0, (-1, self.sets[0].model.kv_heads))
        layers = dict.fromkeys(layer for layer, _ in self._heads)
        table = self._calibrations[name]
        found = [
            table.masses_of(layer, one.unsqueeze(0))[0]
            for layer, one in zip(layers, each, strict=True)
        ]
        return protect(torch.cat(found), self.sinks, self.recent)

    def _check_budgets(self) -> None:
        if not self.budgets:
            raise KvenvError("no budgets given: give fractions of the prompt such as 0.25")
        if self.sinks < 0 or self.recent < 0:
            raise KvenvError(
                f"sinks {self.sinks} and recent {self.recent} must be numbers of tokens: give 0 "
                "or more"
            )
        for traces in self.sets:
            for index in range(len(traces)):
                try:
                    for share in self.budgets:
                        budget_tokens(share, traces.info(index).n, self.sinks + self.recent)
                except KvenvError as error:
                    raise KvenvError(f"episode {index} of {traces.path}: {error}") from error


def row_name(agent: str, allocation: str) -> str:
    """What an agent is called under an allocation."""
    return agent if allocation == "uniform" else f"{agent} ({allocation})"


def calibrations_of(
    scorers: Mapping[str, Scorer], given: Mapping[str, Calibration] | None = None
) -> dict[str, Calibration]:
    """Every agent's calibration: the one given, or else the scorer's own.

    Raises:
        KvenvError: naming an agent that has none.
    """
    found = {}
    for name, scorer in scorers.items():
        table = (given or {}).get(name) or getattr(scorer, "calibration", None)
        if table is None:
            raise KvenvError(
                f"agent {name} has no calibration, which heads compete by: give --calibrate-on "
                "TRACES, or allocation uniform"
            )
        found[name] = table
    return found


def check_recorded(model: PreTrainedModel, sets: Sequence[TraceSet]) -> None:
    """Raise `KvenvError` unless every set was recorded from the model, by its fingerprint."""
    same_model(sets)
    recorded = sets[0].model
    if fingerprint(model) != recorded.fingerprint:
        raise KvenvError(
            f"{sets[0].path} was recorded from {recorded.id}, not {model.config._name_or_path}: "
            f"give --model {recorded.id}"
        )


@torch.inference_mode()
def forward(
    model: PreTrainedModel, cache: Cache, tokens: torch.Tensor, start: int, keep: int = 0
) -> torch.Tensor:
    """Feed a cache further tokens at their true positions.

    Args:
        model: the model.
        cache: grows by the tokens.
        tokens: (B, q).
        start: position of the first of them.
        keep: for how many of the last tokens logits are given; 0 for all.

    Returns:
        (B, keep or q, V) logits.
    """
    rows, q = tokens.shape
    positions = torch.arange(start, start + q, device=tokens.device).expand(rows, q)
    with own_masks(model, cache, q):
        return model(
            tokens,
            past_key_values=cache,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=keep,
        ).logits


def _check_covers(name: str, scorer: Scorer, heads: Sequence[Head]) -> None:
    missing = [] if scorer.heads is None else [head for head in heads if head not in scorer.heads]
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise KvenvError(
            f"agent {name} has no scores for {len(missing)} of the {len(heads)} heads (layer, KV "
            f"head) {shown}: train it on all heads, or leave it out"
        )
