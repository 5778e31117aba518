"""What the ``kvenv`` commands do; their typed arguments and docstrings make the command line."""

from __future__ import annotations

import json as jsonlib
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from kvenv.display import console, print_results, print_summary, progress_bar
from kvenv.errors import KvenvError
from kvenv.parsing import attributes_of
from kvenv.scorers import Head, load_scorer
from kvenv.trace import TraceSet, packaged


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
        shard_episodes: episodes a file.
        dtype: the model's number format, e.g. bfloat16; auto is the checkpoint's own.
        device: cpu, cuda, ...; auto takes a GPU if there is one.
    """
    from kvenv.recording import models, recorder

    language_model, tokenizer = models.load(model, dtype=dtype, device=_device(device))
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


def train(
    name: str,
    plugin: Any,
    traces: str,
    out: Path,
    validation: str | None = None,
    heads: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: Path | None = None,
    evaluate_every: int = 100,
    checkpoint_every: int = 100,
) -> None:
    """Train an agent on recorded traces and export it as a bundle.

    Args:
        name: the agent.
        plugin: the agent's instance.
        traces: trace sets to train on, separated by commas.
        out: the bundle's folder.
        validation: held-out trace sets; without, a tenth of the training documents is held out.
        heads: train these only, as layer:head,layer:head.
        resume: go on from the checkpoint of a run that was stopped.
        overwrite: replace a bundle that is there already.
        tensorboard: folder for TensorBoard logs.
        evaluate_every: steps between measurements on held-out documents.
        checkpoint_every: steps between checkpoints.
    """
    from kvenv.learning.run import Run
    from kvenv.scorers.bundle import NetworkScorer, is_bundle

    if not plugin.trains:
        raise KvenvError(f"agent {name!r} learns nothing: use it by name, e.g. --agents {name}")
    if out.exists() and not is_bundle(out):
        raise KvenvError(f"{str(out)!r} exists and is not a bundle: choose another --out")
    if out.exists() and not overwrite:
        raise KvenvError(
            f"{str(out)!r} holds a bundle already: choose another --out, or add --overwrite"
        )
    checkpoint = out.parent / f"{out.name}.checkpoint"
    began = time.monotonic()
    scorer = plugin.fit(
        _trace_sets(traces),
        parse_heads(heads) if heads else None,
        Run(
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            resume=resume,
            validation=_trace_sets(validation) if validation else (),
            evaluate_every=evaluate_every,
            tensorboard=tensorboard,
            progress=True,
        ),
    )
    seconds = time.monotonic() - began
    if not isinstance(scorer, NetworkScorer):
        raise KvenvError(
            f"agent {name!r} gave a {type(scorer).__name__}, which cannot be saved: its fit() must "
            "return a kvenv.scorers.bundle.NetworkScorer"
        )
    scorer.save_pretrained(out)
    shutil.rmtree(checkpoint, ignore_errors=True)
    figures = ", ".join(
        f"{key.replace('_', '-')} {f'{value:.3f}' if isinstance(value, float) else value}"
        for key, value in scorer.metrics.items()
    )
    console.print(
        f"trained {len(scorer.network.heads)} heads in {seconds:.0f} s; "
        f"held out: {figures or 'nothing'}; wrote {out}",
        markup=False,
        soft_wrap=True,
    )


def evaluate(
    traces: str,
    agents: str,
    heads: str | None = None,
    json: Path | None = None,
) -> None:
    """Measure how much of the future's attention each agent's ranking keeps.

    Prints retention at budgets 1/16, 1/8, 1/4, 1/2 and averaged over all, and closure, with and
    without the first 4 tokens, with 95 % bootstrap intervals over documents.

    Args:
        traces: held-out trace sets, separated by commas.
        agents: names of heuristics and folders of bundles, separated by commas.
        heads: measure these only, as layer:head,layer:head.
        json: write all figures, with their provenance, to this file.
    """
    from kvenv.evaluation import statistics
    from kvenv.evaluation.retention import measure

    sets = _trace_sets(traces)
    given = _names(agents, "agents")
    names = [Path(agent).name for agent in given]
    scorers = {
        name if names.count(name) == 1 else agent: load_scorer(agent)
        for name, agent in zip(names, given, strict=True)
    }
    chosen = parse_heads(heads) if heads else None
    with progress_bar("episodes") as progress:
        bar = progress.add_task("measuring", total=sum(len(t) for t in sets), note="")
        measurements = measure(sets, scorers, chosen, lambda: progress.advance(bar))
    result = {
        "format": "kvenv-evaluation",
        "version": 1,
        **statistics.provenance(),
        "model": sets[0].model.id,
        "traces": [t.manifest.origin for t in sets],
        **statistics.summarise(measurements),
    }
    print_results(result)
    if json is not None:
        write_json(json, result)


def generate(
    prompt: str | None = None,
    model: str = "smollm2-135m",
    agent: str = "knorm",
    budget: float = 128,
    fallback: str | None = None,
    sinks: int = 4,
    recent: int = 16,
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
        agent: a heuristic's name or a bundle's folder.
        budget: tokens each head may keep; below 1, a share of the prompt.
        fallback: heuristic for heads that the agent has no scorer for.
        sinks: first tokens that are always kept.
        recent: last tokens that are always kept.
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
    language_model, tokenizer = models.load(model, dtype=dtype, device=_device(device))
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


def dataset(
    environment: Literal["rank", "stream", "evict"],
    traces: str,
    agent: str,
    episodes: int = 100,
    budget: float | None = None,
    sinks: int = 0,
    recent: int = 0,
    sink_free: bool = False,
    layer: int | None = None,
    head: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Play an agent in an environment and keep its episodes as a Minari dataset.

    The returns of the random and the oracle agents on the same episodes are kept beside them, as
    what a normalised score of 0 and 1 means.

    Args:
        environment: rank, stream or evict.
        traces: trace sets, separated by commas; stream and evict need all queries.
        agent: a heuristic's name or a bundle's folder.
        episodes: how many to play.
        budget: tokens each head may keep; below 1, a share of the prompt. Without, rank averages
            over every budget, and stream and evict keep 64.
        sinks: first tokens that are always kept.
        recent: last tokens that are always kept.
        sink_free: attention to the first 4 tokens does not count.
        layer: play this one only.
        head: play this KV head only.
        seed: of the first episode; each has its own.
        out: the folder of all datasets; without, Minari's own (MINARI_DATASETS_PATH).
        overwrite: replace a dataset of that name.
    """
    import gymnasium as gym

    from kvenv.datasets import dataset_id, write_dataset
    from kvenv.evaluation.play import ScorerPolicy

    # Absolute, so that the dataset finds its traces from any folder; an id stays one.
    sets = [t if t in packaged() else str(Path(t).absolute()) for t in _names(traces, "traces")]
    made: dict[str, Any] = {"layer": layer, "head": head, "sinks": sinks, "recent": recent}
    if budget is not None:
        tokens = budget if budget < 1 else round(budget)
        made |= {"budgets": [tokens]} if environment == "rank" else {"budget": tokens}
    env = gym.make(
        f"kvenv/{environment.capitalize()}-v0",
        traces=sets if len(sets) > 1 else sets[0],
        sink_free=sink_free,
        **made,
    )
    player, worst, best = (
        ScorerPolicy(load_scorer(name), env) for name in (agent, "random", "oracle")
    )
    written = write_dataset(
        env,
        Path(agent).name,
        player,
        episodes=episodes,
        seed=seed,
        references=(worst, best),
        root=out,
        overwrite=overwrite,
        progress=True,
    )
    facts = written.storage.metadata
    returns = [sum(episode.rewards) for episode in written.iterate_episodes()]
    console.print(
        f"wrote {dataset_id(env, Path(agent).name)}: {written.total_episodes} episodes, "
        f"{written.total_steps} steps; mean return {sum(returns) / len(returns):.3f} "
        f"(random {facts['ref_min_score']:.3f}, oracle {facts['ref_max_score']:.3f})",
        markup=False,
        soft_wrap=True,
    )


def bench(
    what: Literal["record", "env"],
    model: str | None = None,
    tokens: list[int] | None = None,
    sizes: list[str] | None = None,
    num_envs: list[int] | None = None,
    repeats: int = 5,
    json: Path | None = None,
) -> None:
    """Measure kvenv against its baseline, both in this process, and print the ratio.

    record: recording an episode, against a plain forward pass over the same tokens, one that skips
    the logits nobody reads (as the recorder does), and output_attentions=True; time, peak memory.
    env: stepping vector environments, against Gymnasium's SyncVectorEnv and stable-baselines3's
    DummyVecEnv over single ones, and a bare copy of the observations; steps a second.

    Args:
        what: record or env.
        model: record: smollm2-135m (default), gemma-3-270m, a checkpoint folder or a hub id.
        tokens: record: episode lengths, prompt and future together; default 1024,2048.
        sizes: env: of an observation, small (2 KiB), medium (32) or large (256); default all.
        num_envs: env: environments stepped together; default 1,8,64,256.
        repeats: timed runs of each; the median counts.
        json: write all figures, with their provenance, to this file.
    """
    from kvenv.evaluation.statistics import provenance

    foreign = (
        {"sizes": sizes, "num-envs": num_envs}
        if what == "record"
        else {"model": model, "tokens": tokens}
    )
    if given := [f"--{name}" for name, value in foreign.items() if value is not None]:
        raise KvenvError(f"bench {what} takes no {' or '.join(given)}: leave it out")
    if what == "record":
        from kvenv.recording.bench import run

        figures = run(model or "smollm2-135m", tokens or [1024, 2048], repeats, console)
    else:
        from kvenv.envs import bench

        figures = bench.run(
            sizes or list(bench.SIZES), num_envs or bench.NUM_ENVS, repeats, console
        )
    result = {**provenance(), **figures}
    if json is not None:
        write_json(json, result)


def parse_heads(text: str) -> list[Head]:
    """Heads as the command line writes them, layer:head,layer:head.

    >>> parse_heads("0:0,10:1")
    [(0, 0), (10, 1)]
    """
    heads = []
    for part in text.split(","):
        layer, colon, head = part.strip().partition(":")
        if not (colon and layer.isdigit() and head.isdigit()):
            raise KvenvError(f"heads {text!r}: write them as layer:head,layer:head, e.g. 0:0,10:1")
        heads.append((int(layer), int(head)))
    return heads


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write figures to a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(jsonlib.dumps(result, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise KvenvError(
            f"{str(path)!r} could not be written: {error.strerror}; choose another --json"
        ) from error
    console.print(f"wrote {path}", markup=False, soft_wrap=True)


def _names(text: str, what: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise KvenvError(f"--{what} {text!r} names nothing: give names separated by commas")
    return names


def _trace_sets(text: str) -> list[TraceSet]:
    return [TraceSet(name) for name in _names(text, "traces")]


def _device(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


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
