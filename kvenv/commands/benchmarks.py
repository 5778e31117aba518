"""``kvenv bench``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from kvenv.commands.common import parse_heads, pick_device, trace_sets, write_json
from kvenv.display import console
from kvenv.errors import KvenvError

OPTIONS = {
    "record": ("model", "tokens", "repeats", "device"),
    "env": ("sizes", "num_envs", "repeats"),
    "learners": (
        *("traces", "validation", "heads", "learners", "steps", "ppo_steps"),
        *("target", "sink_free_target", "device"),
    ),
    "cache": ("parts", "contexts", "budgets", "batches", "minutes", "sweep", "picture"),
}
"""What is measured -> which options it takes."""


def bench(
    what: Literal["record", "env", "learners", "cache"],
    model: str | None = None,
    tokens: list[int] | None = None,
    sizes: list[str] | None = None,
    num_envs: list[int] | None = None,
    repeats: int | None = None,
    traces: str | None = None,
    validation: str | None = None,
    heads: str | None = None,
    learners: list[str] | None = None,
    steps: int | None = None,
    ppo_steps: int | None = None,
    target: float | None = None,
    sink_free_target: float | None = None,
    device: str | None = None,
    parts: list[str] | None = None,
    contexts: list[int] | None = None,
    budgets: list[int] | None = None,
    batches: list[int] | None = None,
    minutes: float | None = None,
    sweep: bool = False,
    picture: Path | None = None,
    json: Path | None = None,
) -> None:
    """Measure kvenv against its baseline, both in this process, and print the ratio.

    record: recording an episode, against a plain forward pass over the same tokens, one that skips
    the logits nobody reads (as the recorder does), and output_attentions=True; time, peak memory.
    env: stepping vector environments, against Gymnasium's SyncVectorEnv and stable-baselines3's
    DummyVecEnv over single ones, and a bare copy of the observations; steps a second.
    learners: training kvp, against other learning signals and stable-baselines3's PPO, on the same
    heads and traces; seconds of training a head until held-out closure reaches a target.
    cache: the eviction cache on an NVIDIA GPU: its kernels against float64 and against a copy's
    bandwidth, and decoding against transformers' full caches; figures are written as they come.

    Args:
        what: record, env, learners or cache.
        model: record: smollm2-135m (default), gemma-3-270m, a checkpoint folder or a hub id.
        tokens: record: episode lengths, prompt and future together; default 1024,2048.
        sizes: env: of an observation, small (2 KiB), medium (32) or large (256); default all.
        num_envs: env: environments stepped together; default 1,8,64,256.
        repeats: record, env: timed runs of each; the median counts; default 5.
        traces: learners: trace sets to train on, separated by commas.
        validation: learners: held-out trace sets; without, a tenth of the training documents.
        heads: learners: train these only, as layer:head,layer:head.
        learners: learners: which; default kvp,kvp-sampled,kvp-plain,pairwise,listwise,regression
            and ppo, which trains one head after another: give it few heads.
        steps: learners: optimiser steps of all but ppo; default 1000.
        ppo_steps: learners: timesteps of ppo for each head; default 6144.
        target: learners: closure to reach; default what the weakest but ppo has at its end.
        sink_free_target: learners: sink-free closure to reach; default likewise.
        device: record, learners: cpu, cuda, ...; default cpu for record, for learners a GPU if
            there is one. ppo takes the CPU.
        parts: cache: of correctness, kernels, decoding and real (SmolLM2); default all.
        contexts: cache: tokens of text before decoding; default 1024,4096,8192,32768,131072.
        budgets: cache: tokens per head; default 512,2048,8192.
        batches: cache: rows that decode; default 1,4,16.
        minutes: cache: after which nothing more is begun; default 6.
        sweep: cache: try other tiles for the attention kernel, too.
        picture: cache: draw tokens a second and memory over context into this file.
        json: write all figures, with their provenance, to this file.
    """
    options: dict[str, Any] = {
        name: value for name, value in locals().items() if name not in ("what", "json")
    }
    from kvenv.evaluation.statistics import provenance

    foreign = [
        f"--{name.replace('_', '-')}"
        for name, value in options.items()
        if value not in (None, False) and name not in OPTIONS[what]
    ]
    if foreign:
        raise KvenvError(f"bench {what} takes no {' or '.join(foreign)}: leave it out")
    repeats = 5 if repeats is None else repeats
    if what == "record":
        from kvenv.recording.bench import run

        figures = run(
            model or "smollm2-135m",
            tokens or [1024, 2048],
            repeats,
            console,
            device=pick_device(device or "cpu"),
        )
    elif what == "env":
        from kvenv.envs import bench

        figures = bench.run(
            sizes or list(bench.SIZES), num_envs or bench.NUM_ENVS, repeats, console
        )
    elif what == "cache":
        figures = _cache(options, json)
    else:
        figures = _learners(options)
    result = {**provenance(), **figures}
    if json is not None:
        write_json(json, result)


def _learners(options: dict[str, Any]) -> dict[str, Any]:
    from kvenv.learning.bench import Settings, run

    if options["traces"] is None:
        raise KvenvError("bench learners learns from traces: give --traces")
    targets = {"closure": options["target"], "sink_free": options["sink_free_target"]}
    given = {name: options[name] for name in ("learners", "steps", "ppo_steps")}
    settings = Settings(
        **{name: value for name, value in given.items() if value is not None},
        targets={metric: value for metric, value in targets.items() if value is not None},
        device=pick_device(options["device"] or "auto"),
    )
    return run(
        trace_sets(options["traces"]),
        trace_sets(options["validation"]) if options["validation"] else (),
        parse_heads(options["heads"]) if options["heads"] else None,
        settings,
        console,
    )


def _cache(options: dict[str, Any], json: Path | None) -> dict[str, Any]:
    from kvenv.cache.bench import Grid, Settings, run
    from kvenv.cache.bench.picture import draw
    from kvenv.evaluation.statistics import provenance

    facts = provenance()

    def save(figures: Mapping[str, Any]) -> None:
        if json is not None:
            write_json(json, {**facts, **figures})

    def given(*names: str) -> dict[str, Any]:
        return {name: options[name] for name in names if options[name] is not None}

    settings = Settings(
        **given("parts", "minutes", "sweep"), grid=Grid(**given("contexts", "batches", "budgets"))
    )
    figures = run(settings, console, save)
    if options["picture"] is not None:
        draw(figures, options["picture"])
    return figures
