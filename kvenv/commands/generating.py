"""``kvenv generate``."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from kvenv.commands.common import pick_device
from kvenv.display import console
from kvenv.errors import KvenvError
from kvenv.rules import budget_tokens
from kvenv.scorers import Calibration, load_scorer
from kvenv.trace import TraceSet


def generate(
    prompt: str | None = None,
    model: str = "smollm2-135m",
    agent: str = "knorm",
    budget: int | float = 128,
    fallback: str | None = None,
    sinks: int = 4,
    recent: int = 16,
    refresh: int | None = None,
    allocation: Literal["uniform", "layerwise", "adaptive"] = "uniform",
    threshold: float | None = None,
    calibration: Path | None = None,
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
        budget: tokens each head may keep, or a share of the prompt such as 0.25.
        fallback: heuristic for heads that the agent has no scorer for.
        sinks: first tokens that are always kept.
        recent: last tokens that are always kept.
        refresh: tokens between two selections.
        allocation: give every head the budget (uniform), or let the heads of a layer (layerwise)
            or of the model (adaptive) compete for the total by the attention they expect.
        threshold: keep no token that is expected to get less attention than this.
        calibration: what `kvenv calibrate` wrote, for an agent that has none of its own.
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
    from kvenv import models
    from kvenv.cache import EvictionCache
    from kvenv.evaluation.decoding import answer, encode, from_episode

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
        question = from_episode(TraceSet(traces), episode, language_model)
        console.print(question.note, style="dim", markup=False, highlight=False)
    else:
        question = encode(_prompt_text(prompt or ""), tokenizer, chat=not raw)
    cache = EvictionCache(
        language_model,
        scorer,
        budget=budget,
        sinks=sinks,
        recent=recent,
        refresh=refresh,
        allocation=allocation,
        threshold=threshold,
        calibration=Calibration.load(calibration) if calibration else None,
        backend=backend,
        block=block,
        fallback=spare,
    )
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sample": sample, "seed": seed}
    run = partial(answer, language_model, tokenizer, question, **options, stream=True)
    prompt_tokens = question.cut or question.tokens.shape[1]
    tokens = budget_tokens(budget, prompt_tokens, sinks + recent)
    results = {}
    if compare:
        console.rule("full cache")
        results["full"] = run()
        console.rule(f"{agent}, {tokens} tokens a head")
    ours = run(cache)
    results[agent] = ours
    if not compare:
        memory = f"{ours.nbytes / 2**20:.2f} MiB"
        console.print(f"[dim]{ours.kept:.0f} of {ours.seen} tokens a head kept, {memory}[/dim]")
        return
    table = Table("cache", "tokens a head", "memory", "tokens/s", "answer", title="side by side")
    for label, result in results.items():
        memory = f"{result.nbytes / 2**20:.2f} MiB"
        right = question.judge(result.text)
        table.add_row(label, f"{result.kept:.0f}", memory, f"{result.rate:.1f}", right)
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
