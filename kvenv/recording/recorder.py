"""Records a workload on a model into a trace set, resumable at any moment."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Self

import kvenv
from kvenv import identity, models
from kvenv.display import progress_bar
from kvenv.errors import KvenvError
from kvenv.recording.capture import capture
from kvenv.recording.workload import Sample, Workload
from kvenv.trace import EpisodeArrays, Manifest, TraceSet, TraceWriter

Generate = Literal["greedy", "sampled"]
QUERY_WINDOW = 64
"""Prompt queries kept beside the future's, unless all are asked for."""


def record(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    workload: Workload,
    out: str | Path,
    *,
    episodes: int,
    prompt_tokens: int,
    future_tokens: int,
    seed: int = 0,
    name: str = "",
    arguments: Mapping[str, Any] | None = None,
    queries: Literal["future", "all"] = "future",
    generate: Generate | None = None,
    layers: Sequence[int] | None = None,
    stats: bool = False,
    shard_episodes: int = 4,
    progress: bool = False,
) -> TraceSet:
    """Record episodes; run again with the same arguments to go on after an interruption.

    Args:
        model: the model to watch.
        tokenizer: its tokenizer.
        workload: where prompts and futures come from.
        out: the trace set's folder, created or resumed.
        episodes: how many to record.
        prompt_tokens: n, at most.
        future_tokens: T, at most.
        seed: of the workload's choices and of sampled generation.
        name: the workload's name, for the manifest.
        arguments: the workload's arguments, for the manifest.
        queries: "future" keeps the last 64 prompt queries and all future ones; "all" keeps every
            one, which the sequential environments need.
        generate: replace the workload's future by the model's own continuation.
        layers: full-attention layers to record; None means all of them.
        stats: record what the prompt's queries tell of later ones too, for the agent expected.
        shard_episodes: episodes a file; an interruption loses at most the file in hand.
        progress: show a progress bar.

    Returns:
        The recorded set.

    Raises:
        KvenvError: if the folder holds something else, the workload runs out, an episode exceeds
            the model's context, a number exceeds float16, or the disk is full.
    """
    for what, value in (
        ("episodes", episodes),
        ("prompt tokens", prompt_tokens),
        ("future tokens", future_tokens),
        ("shard episodes", shard_episodes),
    ):
        if value < 1:
            raise KvenvError(f"{what} is {value}: it must be at least 1")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt_tokens + future_tokens > limit:
        raise KvenvError(
            f"episodes of {prompt_tokens} + {future_tokens} tokens exceed the {limit}-token context"
            f" of {model.config._name_or_path}: shorten --prompt-tokens"
        )
    # Rotations are proved on the model anew at every start; resuming compares them.
    info = identity.describe(
        model,
        tokenizer,
        None if layers is None else list(layers),
        length=prompt_tokens + future_tokens,
    )
    manifest = Manifest(
        model=info,
        workload=name or type(workload).__name__.lower(),
        arguments={
            **(arguments or {}),
            "prompt_tokens": prompt_tokens,
            "future_tokens": future_tokens,
            "generate": generate,
        },
        seed=seed,
        episodes=episodes,
        queries=queries,
        stats=stats,
        libraries={
            "kvenv": kvenv.__version__,
            "torch": version("torch"),
            "transformers": transformers.__version__,
            "h5py": h5py.__version__,
            "hdf5": h5py.version.hdf5_version,
            "python": platform.python_version(),
        },
        shards=(),
    )
    bar = progress_bar("episodes", progress)
    with TraceWriter(out, manifest, shard_episodes) as writer, WriteBehind(writer) as behind, bar:
        task = bar.add_task("recording", total=episodes, completed=writer.done, note="")
        tokens = 0
        for index in range(writer.done, episodes):
            sample = workload.sample(
                index,
                tokenizer=tokenizer,
                rng=np.random.default_rng([seed, index]),
                prompt_tokens=prompt_tokens,
                future_tokens=future_tokens,
                seed=seed,
            )
            _check(sample, prompt_tokens, future_tokens, model, generate)
            if generate is not None:
                sample = continued(model, tokenizer, sample, future_tokens, generate, seed, index)
            behind.add(episode(model, sample, info.layers, queries, seed, stats))
            tokens += len(sample.prompt) + len(sample.future)
            rate = tokens / max(bar.tasks[task].elapsed or 0.0, 1e-3)
            bar.update(task, completed=index + 1, note=f"{rate:,.0f} tokens/s")
    return TraceSet(out)


def _check(
    sample: Sample,
    prompt_tokens: int,
    future_tokens: int,
    model: PreTrainedModel,
    generate: Generate | None,
) -> None:
    n, T = len(sample.prompt), len(sample.future)
    gave = f"workload gave {n} prompt and {T} future tokens for {sample.document!r}"
    if not n or not (T or generate):
        raise KvenvError(f"{gave}: both must have at least one")
    if n > prompt_tokens or future_tokens < T:
        raise KvenvError(f"{gave}, more than the {prompt_tokens} and {future_tokens} asked for")
    vocabulary = model.config.get_text_config().vocab_size
    wrong = [token for token in (*sample.prompt, *sample.future) if not 0 <= token < vocabulary]
    if wrong:
        raise KvenvError(
            f"workload gave token {wrong[0]} for {sample.document!r}: "
            f"{model.config._name_or_path} has tokens 0..{vocabulary - 1}"
        )


class WriteBehind:
    """Writes one episode while the next is computed, and reports what went wrong in between.

    Args:
        writer: the trace set; at most one episode waits for it.
    """

    def __init__(self, writer: TraceWriter) -> None:
        self._writer = writer
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=True)
        if kind is None:
            self.wait()

    def add(self, arrays: EpisodeArrays) -> None:
        """Hand an episode over; raises what the one before ran into."""
        self.wait()
        self._pending = self._thread.submit(self._writer.add, arrays)

    def wait(self) -> None:
        """Until the last episode is with the writer; raises what it ran into."""
        if self._pending is not None:
            self._pending.result()


def episode(
    model: PreTrainedModel,
    sample: Sample,
    layers: tuple[int, ...],
    queries: Literal["future", "all"],
    seed: int,
    stats: bool = False,
) -> EpisodeArrays:
    """Run the model over one sample and gather what a trace keeps of it."""
    n = len(sample.prompt)
    tokens = torch.tensor([*sample.prompt, *sample.future])
    window = None if queries == "all" else QUERY_WINDOW
    kept, _ = capture(model, tokens, n, layers=layers, query_window=window, stats=stats)
    return EpisodeArrays(
        tokens=tokens.numpy().astype(np.int32),
        keys=kept.stack("keys"),
        values=kept.stack("values"),
        queries=kept.stack("queries"),
        utility_sum=kept.stack("utility_sum"),
        utility_max=kept.stack("utility_max"),
        past_sum=kept.stack("past_sum"),
        past_window=kept.stack("past_window"),
        n=n,
        T=len(sample.future),
        document=sample.document,
        metadata=dict(sample.metadata),
        seed=seed,
        query_mean=kept.stack("query_mean") if stats else None,
        query_cov=kept.stack("query_cov") if stats else None,
    )


def continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    future_tokens: int,
    how: Generate,
    seed: int,
    index: int,
) -> Sample:
    """The sample with the model's own continuation as its future; a stop token ends it early."""
    future = models.continue_text(
        model,
        tokenizer,
        torch.tensor([sample.prompt]),
        future_tokens,
        sample=how == "sampled",
        seed=int(np.random.SeedSequence([seed, index]).generate_state(1)[0]),
    )
    facts = {**sample.metadata, "generated": how}
    return Sample(sample.prompt, future.tolist(), sample.document, facts)
