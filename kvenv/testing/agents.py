"""What every agent must do: see `kvenv.learning.agent.Agent`."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvenv import commands
from kvenv.errors import KvenvError
from kvenv.files import sha256
from kvenv.learning.agent import Agent
from kvenv.learning.run import Run
from kvenv.scorers import Head, NetworkScorer, Scorer
from kvenv.testing.calling import calling, check_options, fresh, required_options
from kvenv.testing.scorers import Probe, check_scorer, same
from kvenv.trace import EpisodeArrays, Manifest, ModelInfo, TraceSet, TraceWriter


def check_agent(agent: Agent | type[Agent], traces: Sequence[TraceSet] | None = None) -> None:
    """Check that an agent does what `kvenv.learning.agent.Agent` says.

    - `trains` is a bool of the class, and `fit` takes (traces, heads, run) by place; a heuristic's
      takes no traces too.
    - Every option (argument of ``__init__``) has a type and is none of ``kvenv train``'s own; a
      heuristic's options have defaults.
    - What `fit` returns for all heads and for some passes `check_scorer`. A learned scorer has just
      the heads that were asked for, a heuristic's at least those.
    - A learned scorer is a `NetworkScorer` of the traces' model that gives the same scores after
      saving and loading; its training and metrics are JSON-safe.
    - Two fits with the same options give equal scores.
    - `fit` changes neither the traces nor a global random generator.

    `fit` is called three times; make one that learns short, e.g. ``check_agent(KVP(steps=2))``.

    Args:
        agent: the class, or an instance with the options to check.
        traces: sets to fit on; None: four small random episodes with utilities of 0 among them.

    Raises:
        KvenvError: naming the first point that is broken, the value and the cure.
    """
    plugin = agent if isinstance(agent, type) else type(agent)
    name = plugin.__name__
    if not callable(getattr(plugin, "fit", None)):
        raise KvenvError(f"{name} is no agent: give it fit(traces, heads=None, run=None)")
    trains = getattr(plugin, "trains", None)
    if not isinstance(trains, bool):
        raise KvenvError(
            f"{name}.trains is {trains!r}: say trains = True if fit() learns from traces, trains = "
            "False if not"
        )
    check_options(plugin, commands.train)
    if not trains and (required := required_options(plugin)):
        raise KvenvError(
            f"{name} has options without a default ({', '.join(required)}), but `kvenv evaluate` "
            "makes a heuristic without any: give each a default"
        )
    with tempfile.TemporaryDirectory(prefix="kvenv-", ignore_cleanup_errors=True) as scratch:
        sets = [_small_set(Path(scratch) / "traces")] if traces is None else list(traces)
        before = [_contents(each) for each in sets]
        _check_fits(agent, trains, sets, Path(scratch))
        if [_contents(each) for each in sets] != before:
            raise KvenvError(f"{name}.fit changed the traces it was given: change copies instead")


def _check_fits(agent: Any, trains: bool, sets: list[TraceSet], scratch: Path) -> None:
    recorded = sorted(set.intersection(*(set(each.heads) for each in sets)))
    some = recorded[::-2]  # in an order of their own
    scorer = _fit(agent, sets if trains else [])
    _check_result(agent, scorer, recorded, sets[0].model)
    again = _fit(agent, sets if trains else [])
    if isinstance(scorer, NetworkScorer):
        _check_saving(agent, scorer, scratch / "bundle")
    if not _agree(scorer, again, recorded, sets[0].model):
        raise KvenvError(
            f"{_name(agent)}.fit gave other scores the second time: draw every random number from "
            "generators seeded by an option, and keep nothing between fits"
        )
    part = _fit(agent, sets, some, Run(checkpoint=scratch / "checkpoint"))
    _check_result(agent, part, some, sets[0].model)


def _fit(
    agent: Any, sets: list[TraceSet], heads: list[Head] | None = None, run: Run | None = None
) -> Scorer:
    which = f"{'all' if heads is None else 'some'} heads of {len(sets)} trace sets"
    cure = "see kvenv.learning.agent.Agent.fit"
    with calling(f"{_name(agent)}()", "make it an instance that can be copied and fitted"):
        instance = fresh(agent)
    with calling(f"{_name(agent)}.fit for {which}", cure):
        return instance.fit(sets, None if heads is None else list(heads), run)


def _check_result(agent: Any, scorer: Scorer, heads: list[Head], model: ModelInfo) -> None:
    name = _name(agent)
    if agent.trains:
        if not isinstance(scorer, NetworkScorer):
            raise KvenvError(
                f"{name}.fit gave a {type(scorer).__name__}, which cannot be saved: return a "
                "kvenv.scorers.NetworkScorer, or say trains = False if it learns nothing"
            )
        if scorer.heads != set(heads):
            raise KvenvError(
                f"{name}.fit was asked for heads {heads} and gave {sorted(scorer.heads or ())}: "
                "learn those alone (kvenv.trace.batches.choose_heads)"
            )
        if scorer.model.fingerprint != model.fingerprint:
            raise KvenvError(
                f"{name}'s scorer has model {scorer.model.id} ({scorer.model.fingerprint}): give it"
                f" that of the traces, traces[0].model, here {model.id} ({model.fingerprint})"
            )
    elif not hasattr(scorer, "score"):
        raise KvenvError(
            f"{name}.fit gave a {type(scorer).__name__}: return a scorer, a heuristic itself"
        )
    check_scorer(scorer, heads, model.head_dim, model.kv_heads, model.query_heads)


def _check_saving(agent: Any, scorer: NetworkScorer, folder: Path) -> None:
    name = _name(agent)
    with calling(f"saving {name}'s scorer", "see kvenv.scorers.NetworkScorer"):
        scorer.save_pretrained(folder)
        loaded = NetworkScorer.from_pretrained(folder)
    if not _agree(scorer, loaded, scorer.network.heads, scorer.model):
        raise KvenvError(
            f"{name}'s scorer gives other scores once saved and loaded: keep what it learned in "
            "its network's weights, mean and std, and do not override score()"
        )


def _agree(one: Scorer, other: Scorer, heads: Sequence[Head], model: ModelInfo) -> bool:
    """Whether two scorers give equal scores."""
    sizes = (model.head_dim, model.kv_heads, model.query_heads)
    first, second = (Probe.of(scorer, heads, *sizes) for scorer in (one, other))
    given = first.inputs(2, 40)
    return all(
        same(first.ask(layer, given, "40 tokens"), second.ask(layer, given, "40 tokens"))
        for layer in sorted({layer for layer, _ in heads})
    )


def _name(agent: Any) -> str:
    return agent.__name__ if isinstance(agent, type) else type(agent).__name__


def _contents(traces: TraceSet) -> tuple[Any, ...]:
    """Everything of a set that code could change: its files' hashes and what is in memory."""
    infos = [copy.deepcopy(traces.info(i)) for i in range(len(traces))]
    hashes = [sha256(traces.path / shard.file) for shard in traces.manifest.shards]
    return traces.manifest.dumps(), infos, hashes


def _small_set(folder: Path) -> TraceSet:
    """Random episodes of two layers of a model with 2 KV and 6 query heads of 10."""
    model = ModelInfo("small", "small", "llama", "bytes", 4, 2, 6, 10, layers=(1, 3))
    lengths = ((40, 6), (24, 5), (33, 7), (17, 9))
    rng = np.random.default_rng(0)
    with TraceWriter(folder, Manifest(model, "random", {}, 0, len(lengths), "all", {})) as writer:
        for index, (n, T) in enumerate(lengths):
            keys, values, queries = (
                rng.normal(size=(2, heads, n + T, 10)).astype(np.float16) for heads in (2, 2, 6)
            )
            total, largest, past, window = (
                rng.exponential(size=(4, 2, 2, n)).astype(np.float32) ** 3
            )
            total[..., 5], largest[..., 5] = 0, 0  # attention may underflow
            writer.add(
                EpisodeArrays(
                    tokens=rng.integers(0, 256, n + T).astype(np.int32),
                    keys=keys,
                    values=values,
                    queries=queries,
                    utility_sum=total,
                    utility_max=largest,
                    past_sum=past,
                    past_window=window,
                    n=n,
                    T=T,
                    document=f"document {index}",
                    metadata={"index": index},
                    seed=index,
                )
            )
    return TraceSet(folder)
