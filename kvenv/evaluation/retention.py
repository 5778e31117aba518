"""How much of the future's attention each agent's ranking keeps, on held-out episodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvenv import utility as ut
from kvenv.errors import KvenvError
from kvenv.learning.episodes import choose_heads
from kvenv.scorers.base import Head, Scorer
from kvenv.trace import TraceSet, same_model

METRICS = ("reward", "closure", *(f"retention@1/{round(1 / f)}" for f in ut.FRACTIONS))
"""What is measured for every (episode, head), once with the sinks and once without."""


@dataclass(frozen=True)
class Measurement:
    """One agent's figures over episodes and heads.

    Attributes:
        agent: its name.
        heads: H (layer, KV head) pairs.
        documents: the document of each of the E episodes.
        full: metric -> (E, H) float64, over all tokens.
        sink_free: the same with the first 4 tokens left out.
    """

    agent: str
    heads: Sequence[Head]
    documents: Sequence[str]
    full: Mapping[str, np.ndarray]
    sink_free: Mapping[str, np.ndarray]


def measure(
    traces: Sequence[TraceSet],
    scorers: Mapping[str, Scorer],
    heads: Sequence[Head] | None = None,
    tick: Callable[[], None] | None = None,
) -> list[Measurement]:
    """Rank every recorded prompt with every scorer and measure what the rankings keep.

    One episode and layer is in memory at a time. All agents are measured on the same heads:
    those that are recorded and that every scorer covers.

    Args:
        traces: held-out sets, all of one model.
        scorers: name -> scorer.
        heads: restrict to these.
        tick: called after every episode.

    Raises:
        KvenvError: on sets of different models, a scorer of another model, heads that are not
            recorded or that the scorers do not share, NaN scores, or a prompt of sinks alone.
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
    layers = sorted({layer for layer, _ in chosen})
    needs = frozenset({"utility"}).union(*(scorer.needs for scorer in scorers.values()))
    results: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in scorers}
    free: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in scorers}
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
            rows: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {
                name: [] for name in scorers
            }
            for layer in layers:
                picked = [head for at, head in chosen if at == layer]
                data = layer_inputs(traces_, index, layer, needs)
                for name, scorer in scorers.items():
                    extra = {need: data[need] for need in scorer.needs}
                    with torch.no_grad():
                        scores = scorer.score(
                            layer, data["keys"], data["values"], data["positions"], **extra
                        )
                    if torch.isnan(scores[0, picked]).any():
                        raise KvenvError(
                            f"agent {name} gave NaN scores in layer {layer}, episode {index} of "
                            f"{traces_.path}: mend its score()"
                        )
                    rows[name].append((data["utility"][0, picked], scores[0, picked]))
            for name, parts in rows.items():
                utility, scores = (torch.cat(part) for part in zip(*parts, strict=True))
                results[name].append(_figures(utility, scores))
                free[name].append(_figures(ut.without_sinks(utility), ut.without_sinks(scores)))
            if tick is not None:
                tick()
    return [
        Measurement(name, chosen, documents, _stack(results[name]), _stack(free[name]))
        for name in scorers
    ]


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
    """
    info = traces.info(index)
    n = info.n if length is None else length
    keys = torch.from_numpy(traces.read(index, "keys", layer)[None, :, :n])
    data = {
        "keys": keys,
        "values": torch.from_numpy(traces.read(index, "values", layer)[None, :, :n]),
        "positions": torch.arange(n).expand(1, keys.shape[1], n),
    }
    if "utility" in needs:
        data["utility"] = torch.from_numpy(traces.read(index, "utility/sum", layer)[None])
    if "queries" in needs:
        queries = traces.read(index, "queries", layer)
        data["queries"] = torch.from_numpy(queries[None, :, : queries.shape[1] - info.T])
    if "past_attention" in needs:
        data["past_attention"] = torch.from_numpy(traces.read(index, "past/sum", layer)[None])
    return data


def _figures(utility: torch.Tensor, scores: torch.Tensor) -> dict[str, np.ndarray]:
    """The metrics of H heads, each (H,) float64."""
    n = utility.shape[-1]
    curves = ut.retention(utility, scores)
    reward = ut.mean_over_budgets(curves)
    values = [reward, ut.closure(utility, scores)]
    values += [curves[:, ut.budget_tokens(fraction, n) - 1] for fraction in ut.FRACTIONS]
    return {name: value.numpy() for name, value in zip(METRICS, values, strict=True)}


def _stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {metric: np.stack([row[metric] for row in rows]) for metric in METRICS}
