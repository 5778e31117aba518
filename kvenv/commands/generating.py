"""``kvenv generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from rich.table import Table

from kvenv.commands.common import pick_device
from kvenv.display import console
from kvenv.errors import KvenvError
from kvenv.scorers import load_scorer
from kvenv.trace import TraceSet


def generate(
    prompt: str | None = None,
    model: str = "smollm2-135m",
    agent: str = "knorm",
    budget: float = 128,
    fallback: str | None = None,
    sinks: int = 4,
    recent: int = 16,
    allocation: Literal["uniform", "heads", "global"] = "uniform",
    backend: Literal["auto", "torch", "triton"] = "auto",
    block: int | None = None,
    max_new_tokens: int = 128,
    raw: bool = False,
    sample: bool = False,
    seed: int = 0,
    traces: str | None = None,
    episode: int = 0,
    compare: bool = False,
    dtype: str = "auto",
    device: str = "auto",
) -> None:
    """Decode a prompt in a bounded cache that evicts by an agent's ranking.

    Args:
        prompt: the text; @FILE reads it from a file, - from standard input.
        model: smollm2-135m, gemma-3-270m, a checkpoint folder or a hub id.
        agent: a heuristic's or a shipped trained agent's name, or a bundle's folder.
        budget: tokens each head may keep; below 1, a share of the prompt.
        fallback: heuristic for heads that the agent has no scorer for.
        sinks: first tokens that are always kept.
        recent: last tokens that are always kept.
        allocation: give every head the budget (uniform), or divide it among the heads of a layer
            (heads) or of the model (global) by what each gains of it.
        backend: triton, torch, or auto: triton on an NVIDIA GPU.
        block: read the prompt in blocks of so many tokens; a head then never holds more than its
            budget and a block.
        max_new_tokens: when to stop at the latest.
        raw: give the prompt as it is, without the model's chat template.
        sample: draw tokens as the model's generation settings say instead of the likeliest.
        seed: of the sampling.
        traces: take the prompt from this trace set's --episode instead.
        episode: which one.
        compare: decode with the full cache too, and show both answers and memories.
        dtype: the model's number format.
        device: cpu, cuda, ...; auto takes a GPU if there is one.
    """
    from kvenv.evaluation.decoding import Decoding, decode, encode, from_episode
    from kvenv.recording import models

    if (prompt is None) == (traces is None):
        raise KvenvError(
            'give a prompt, e.g. kvenv generate "Why is the sky blue?", or --traces with --episode'
        )
    scorer = load_scorer(agent)
    spare = load_scorer(fallback) if fallback else None
    language_model, tokenizer = models.load(model, dtype=dtype, device=pick_device(device))
    if check := getattr(scorer, "check_model", None):
        check(language_model)
    if traces is not None:
        task = from_episode(TraceSet(traces), episode, tokenizer, language_model)
        console.print(task.note, style="dim", markup=False, highlight=False)
    else:
        task = encode(_prompt_text(prompt or ""), tokenizer, chat=not raw)
    settings = Decoding(
        budget=budget,
        sinks=sinks,
        recent=recent,
        allocation=allocation,
        backend=backend,
        block=block,
        max_new_tokens=max_new_tokens,
        sample=sample,
        seed=seed,
    )
    results = {}
    if compare:
        console.rule("full cache")
        results["full"] = decode(language_model, tokenizer, task, settings, None, stream=True)
        console.rule(f"{agent}, {settings.tokens(task)} tokens a head")
    ours = decode(language_model, tokenizer, task, settings, scorer, fallback=spare, stream=True)
    results[agent] = ours
    if not compare:
        memory = f"{ours.nbytes / 2**20:.2f} MiB"
        console.print(f"[dim]{ours.kept} of {ours.seen} tokens a head kept, {memory}[/dim]")
        return
    table = Table("cache", "tokens a head", "memory", "tokens/s", "answer", title="side by side")
    for label, result in results.items():
        memory = f"{result.nbytes / 2**20:.2f} MiB"
        answer = task.judge(result.text)
        table.add_row(label, str(result.kept), memory, f"{result.rate:.1f}", answer)
    console.print(table)


def _prompt_text(prompt: str) -> str:
    if prompt == "-":
        return sys.stdin.read()
    if prompt.startswith("@"):
        try:
            return Path(prompt[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise KvenvError(
                f"prompt file {prompt[1:]!r} cannot be read ({reason}): give a text file"
            ) from error
    return prompt
