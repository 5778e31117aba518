"""``kvenv record`` and ``kvenv inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from kvenv.commands.common import pick_device
from kvenv.display import console, print_summary
from kvenv.parsing import attributes_of
from kvenv.trace import TraceSet


def record(
    name: str,
    plugin: Any,
    out: Path,
    model: str = "smollm2-135m",
    episodes: int = 64,
    prompt_tokens: int = 512,
    future_tokens: int = 64,
    seed: int = 0,
    queries: Literal["future", "all"] = "future",
    generate: Literal["greedy", "sampled"] | None = None,
    layers: list[int] | None = None,
    stats: bool = False,
    shard_episodes: int = 4,
    dtype: str = "auto",
    device: str = "auto",
) -> None:
    """Run a model over a workload and write what its attention did to a trace set.

    Run the same command again after an interruption: it goes on where it was.

    Args:
        name: the workload.
        plugin: the workload's instance.
        out: the trace set's folder.
        model: smollm2-135m, gemma-3-270m, a checkpoint folder or a hub id.
        episodes: how many to record.
        prompt_tokens: length of the prompts, whose tokens may be evicted.
        future_tokens: length of what follows them.
        seed: of the workload's choices and of sampled generation.
        queries: keep the last 64 prompt queries and all future ones, or every one (sequential
            environments need that).
        generate: let the model write the future itself (a bare --generate means greedy).
        layers: record these full-attention layers only.
        stats: record the mean and covariance of the prompt's queries too (the agent expected needs
            them).
        shard_episodes: episodes a file.
        dtype: the model's number format, e.g. bfloat16; auto is the checkpoint's own.
        device: cpu, cuda, ...; auto takes a GPU if there is one.
    """
    from kvenv import models
    from kvenv.recording import recorder

    language_model, tokenizer = models.load(model, dtype=dtype, device=pick_device(device))
    traces = recorder.record(
        language_model,
        tokenizer,
        plugin,
        out,
        episodes=episodes,
        prompt_tokens=prompt_tokens,
        future_tokens=future_tokens,
        seed=seed,
        name=name,
        arguments=attributes_of(plugin),
        queries=queries,
        generate=generate,
        layers=layers,
        stats=stats,
        shard_episodes=shard_episodes,
        progress=True,
    )
    print_summary(traces)


def inspect(folder: str, verify: bool = False) -> None:
    """Show what a trace set holds: model, heads, episodes, tokens, bytes, workload.

    Args:
        folder: a trace set's folder, or the name of a packaged one (sample).
        verify: read every file and compare its checksum.
    """
    traces = TraceSet(folder)
    print_summary(traces)
    if verify:
        traces.verify()
        console.print(f"all {len(traces.manifest.shards)} shards match their checksums")
