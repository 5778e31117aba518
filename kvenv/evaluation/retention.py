"""How much of the future's attention each agent's ranking keeps, on held-out episodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from kvenv import rules as ut
from kvenv.errors import KvenvError
from kvenv.scorers.base import Head, Scorer
from kvenv.scorers.bundle import NetworkScorer
from kvenv.trace import TraceSet, same_model
from kvenv.trace.batches import choose_heads

METRICS = ("reward", "normalized_score", *(f"retention@1/{round(1 / f)}" for f in ut.FRACTIONS))
"""What is measured for every (episode, head), once with the sinks and once without.

The reward, retention averaged over all budgets, is the area under the budget curve.
"""

BUDGETS = (1 / 64, *(step / 32 for step in range(1, 33)))
"""Where the budget curve is kept, as fractions of the prompt."""

STATES = ("keys", "values", "positions", "now")
"""What every scorer is given."""

Kind = Literal["learned", "oracle", "heuristic"]


def kind_of(scorer: Scorer) -> Kind:
    """What a scorer is in a comparison: trained networks, one that sees the future, or the rest."""
    if "utility" in scorer.needs:
        return "oracle"
    return "learned" if isinstance(scorer, NetworkScorer) else "heuristic"


@dataclass(frozen=True)
class Measurement:
    """One agent's figures over episodes and heads.

    Attributes:
        agent: its name.
        kind: "learned", "oracle" or "heuristic".
        heads: H (layer, KV head) pairs.
        documents: the document of each of the E episodes.
        full: metric -> (E, H) float64, over all tokens.
        sink_free: the same with the first 4 tokens left out.
        curves: "full" and "sink_free" -> (E, H, m) float32, retention at each of `BUDGETS`.
    """

    agent: str
    kind: Kind
    heads: Sequence[Head]
    documents: Sequence[str]
    full: Mapping[str, np.ndarray]
    sink_free: Mapping[str, np.ndarray]
    curves: Mapping[str, np.ndarray]


def measure(
    traces: Sequence[TraceSet],
    scorers: Mapping[str, Scorer],
    heads: Sequence[Head] | None = None,
    tick: Callable[[], None] | None = None,
    device: str | torch.device = "cpu",
) -> list[Measurement]:
    """Rank every recorded prompt with every scorer and measure what the rankings keep.

    One episode and layer is in memory at a time. All agents are measured on the same heads:
    those that are recorded and that every scorer covers.

    Args:
        traces: held-out sets, all of one model.
        scorers: name -> scorer.
        heads: restrict to these.
        tick: called after every episode.
        device: where scores and rankings are computed; sums differ in rounding between devices.

    Raises:
        KvenvError: on sets of different models, a scorer of another model, heads that are not
            recorded or that the scorers do not share, NaN scores, a prompt of sinks alone, or a
            device that is not there.
    """
    chosen = shared_heads(traces, scorers, heads)
    figures: dict[str, list[np.ndarray]] = {name: [] for name in scorers}
    curves: dict[str, list[np.ndarray]] = {name: [] for name in scorers}
    documents: list[str] = []
    for traces_ in traces:
        for index in range(len(traces_)):
            info = traces_.info(index)
            if info.n <= ut.SINKS:
                raise KvenvError(
                    f"episode {index} of {traces_.path} has {info.n} prompt tokens: sink-free "
                    f"figures need more than {ut.SINKS}, record longer prompts"
                )
            documents.append(info.document)
            utility, scores = score_prompt(traces_, index, scorers, chosen, device)
            full, free = _Yardstick(utility), _Yardstick(ut.without_sinks(utility))
            for name in scorers:
                order = ut.ranking(scores[name])
                both = torch.stack([full(order), free(_order_without_sinks(order))]).cpu().numpy()
                figures[name].append(both[..., : len(METRICS)].copy())
                curves[name].append(both[..., len(METRICS) :].astype(np.float32))
            if tick is not None:
                tick()

    def measurement(name: str, scorer: Scorer) -> Measurement:
        tables = np.moveaxis(np.stack(figures.pop(name)), (1, 3), (0, 1))  # (2, metrics, E, H)
        full, free = (dict(zip(METRICS, table, strict=True)) for table in tables)
        curve = np.stack(curves.pop(name), axis=1)  # (2, E, H, m)
        both = {"full": curve[0], "sink_free": curve[1]}
        return Measurement(name, kind_of(scorer), chosen, documents, full, free, both)

    return [measurement(name, scorer) for name, scorer in scorers.items()]


def shared_heads(
    traces: Sequence[TraceSet], scorers: Mapping[str, Scorer], heads: Sequence[Head] | None = None
) -> list[Head]:
    """The heads, as recorded, that are asked for (None: all) and that every scorer covers.

    Raises:
        KvenvError: on sets of different models, a scorer of another model, or if there is none.
    """
    same_model(traces)
    for scorer in scorers.values():
        if check := getattr(scorer, "check_model", None):
            check(traces[0].model)
    chosen = choose_heads(traces, heads)
    for scorer in scorers.values():
        if scorer.heads is not None:
            chosen = [head for head in chosen if head in scorer.heads]
    if not chosen:
        raise KvenvError(
            f"no head is covered by all of {', '.join(scorers)}: measure them one by one, or give "
            "other --heads"
        )
    return chosen


def score_prompt(
    traces: TraceSet,
    index: int,
    scorers: Mapping[str, Scorer],
    heads: Sequence[Head],
    device: str | torch.device = "cpu",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Every scorer's scores of a prompt at its end, read one layer at a time.

    Args:
        traces: where the episode is.
        index: which one.
        scorers: name -> scorer.
        heads: H (layer, KV head) pairs, recorded and covered by the scorers.
        device: where to compute.

    Returns:
        The utility (H, n) float32, and name -> scores (H, n), in the order of ``heads``.

    Raises:
        KvenvError: on NaN scores, or a device that is not there.
    """
    device = _usable(device)
    needs = frozenset({"utility"}).union(*(scorer.needs for scorer in scorers.values()))
    shape = (len(heads), traces.info(index).n)
    utility = torch.empty(shape, device=device)
    scores = {name: torch.empty(shape, device=device) for name in scorers}
    for layer in sorted({layer for layer, _ in heads}):
        rows = [row for row, head in enumerate(heads) if head[0] == layer]
        picked = [heads[row][1] for row in rows]
        inputs = layer_inputs(traces, index, layer, needs)
        data = {name: tensor.to(device) for name, tensor in inputs.items()}
        utility[rows] = data["utility"][0, picked].float()
        for name, scorer in scorers.items():
            extra = {need: data[need] for need in scorer.needs}
            with torch.no_grad():
                given = scorer.score(layer, *(data[name] for name in STATES), **extra)[0, picked]
            if torch.isnan(given).any():
                raise KvenvError(
                    f"agent {name} gave NaN scores in layer {layer}, episode {index} of "
                    f"{traces.path}: mend its score()"
                )
            scores[name][rows] = given.to(device, torch.float32)
    return utility, scores


def layer_inputs(
    traces: TraceSet,
    index: int,
    layer: int,
    needs: frozenset[str] = frozenset(),
    length: int | None = None,
) -> dict[str, torch.Tensor]:
    """One layer of an episode as a scorer takes it: batch of one, all KV heads.

    Args:
        traces: where the episode is.
        index: which one.
        layer: in the model's own numbers.
        needs: what to read beyond keys, values and positions.
        length: tokens to read; None is the prompt, the only part that needs are known of.

    Raises:
        KvenvError: if the set was recorded without query statistics that are needed.
    """
    info = traces.info(index)
    n = info.n if length is None else length
    keys = torch.from_numpy(traces.read(index, "keys", layer)[None, :, :n])
    data = {
        "keys": keys,
        "values": torch.from_numpy(traces.read(index, "values", layer)[None, :, :n]),
        "positions": torch.arange(n).expand(1, keys.shape[1], n),
        "now": torch.tensor([n - 1]),
    }
    if "utility" in needs:
        data["utility"] = torch.from_numpy(traces.read(index, "utility/sum", layer)[None])
    if "queries" in needs:
        queries = traces.read(index, "queries", layer)
        data["queries"] = torch.from_numpy(queries[None, :, : queries.shape[1] - info.T])
    for need, field in (("past_attention", "past/sum"), ("recent_attention", "past/window")):
        if need in needs:
            data[need] = torch.from_numpy(traces.read(index, field, layer)[None])
    for need in sorted(needs & {"query_mean", "query_cov"}):
        data[need] = torch.from_numpy(traces.read(index, f"stats/{need}", layer)[None])
    return data


class _Yardstick:
    """What rankings of one prompt are measured against, so that it is computed once for all."""

    def __init__(self, utility: torch.Tensor) -> None:
        n = utility.shape[-1]
        self._utility = utility
        self._at = [ut.budget_tokens(fraction, n) - 1 for fraction in (*ut.FRACTIONS, *BUDGETS)]
        self._best = ut.oracle_reward(utility)

    def __call__(self, order: torch.Tensor) -> torch.Tensor:
        """The metrics and the curve of rankings (H, n), side by side: (H, 6 + m) float64."""
        curves = ut.retention_of(self._utility, order)
        reward = ut.mean_over_budgets(curves)
        columns = [reward, ut.normalized_score_of(reward, self._best, curves.shape[-1])]
        return torch.cat([torch.stack(columns, -1), curves[:, self._at]], -1)


def _order_without_sinks(order: torch.Tensor) -> torch.Tensor:
    """Rankings (H, n) of all tokens as rankings (H, n - 4) of those after the sinks."""
    return order[order >= ut.SINKS].view(len(order), -1) - ut.SINKS


def _usable(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:  # how torch says that a device is not there
        raise KvenvError(
            f"device {str(device)!r} cannot be used: give cpu, or one that PyTorch finds on this "
            "machine"
        ) from error
