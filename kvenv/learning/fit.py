"""One training loop for all heads at once: read an episode, score it, follow the objective."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from kvenv import rules
from kvenv.display import progress_bar
from kvenv.errors import KvenvError
from kvenv.learning.run import Run, load_checkpoint, save_checkpoint
from kvenv.scorers.base import Head
from kvenv.scorers.bundle import NetworkScorer
from kvenv.scorers.calibration import Calibration, fit_calibration
from kvenv.scorers.network import Architecture, PerHeadMLP
from kvenv.trace import TraceSet, same_model
from kvenv.trace.batches import (
    HeadBatch,
    Index,
    Reader,
    choose_heads,
    deviation,
    hold_out,
    moments,
)

Objective = Callable[[torch.Tensor, torch.Tensor, torch.Generator, int], torch.Tensor]
"""(scores (H, n), utility (H, n), noise, step) -> gradient of the loss in the scores, (H, n)."""


@dataclass(frozen=True)
class Optimisation:
    """How the per-head networks are trained.

    Attributes:
        steps: optimiser steps.
        lr: AdamW's learning rate, falling to zero along a cosine.
        weight_decay: AdamW's.
        batch: episodes a step.
        seed: of the initial weights, the order of episodes and the objective's noise.
    """

    steps: int
    lr: float
    weight_decay: float
    batch: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise KvenvError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.seed < 0:
            raise KvenvError(f"seed is {self.seed}: it must be at least 0")
        if not 0 < self.lr < math.inf:
            raise KvenvError(f"lr is {self.lr}: it must be positive")
        if not 0 <= self.weight_decay < math.inf:
            raise KvenvError(f"weight_decay is {self.weight_decay}: it must be at least 0")

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def fit(
    agent: str,
    objective: Objective,
    traces: Sequence[TraceSet],
    heads: Sequence[Head] | None,
    architecture: Architecture,
    optimisation: Optimisation,
    options: Mapping[str, Any],
    run: Run | None = None,
) -> NetworkScorer:
    """Train one network per head on recorded episodes.

    Memory does not grow with the trace sets: episodes are read from disk as they are needed.
    Every random number comes from (seed, step), so a run that was killed and resumed ends with
    the weights of one that was not, on the same kind of device.

    Args:
        agent: the agent's name, for the bundle.
        objective: the learning signal.
        traces: training sets, all of one model.
        heads: which heads; None means every recorded one.
        architecture: of the networks.
        optimisation: of the loop.
        options: the agent's options, kept as provenance and checked on resuming.
        run: checkpoints, logs, progress, held-out documents and the device.

    Returns:
        The scorer. Its ``training["curve"]`` has the held-out figures by steps, and the seconds of
        training until each, without those that measuring took. Its `calibration` was fitted on the
        held-out episodes, or on the training ones where nothing is held out.

    Raises:
        KvenvError: on sets of different models, heads not recorded, a layer whose rotation cannot
            be stated, or a checkpoint of another run.
    """
    run = run or Run()
    device = torch.device(run.device)
    same_model([*traces, *run.validation])
    chosen = choose_heads(traces, heads)
    episodes, held_sets, held = hold_out(traces, run.validation, chosen)
    model = traces[0].model
    network = architecture.build(
        chosen, model.head_dim, torch.Generator().manual_seed(optimisation.seed)
    ).to(device)
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=optimisation.weight_decay)
    identity = {
        "agent": agent,
        "options": dict(options),
        "heads": [list(head) for head in chosen],
        "traces": [
            asdict(shard) for t in [*traces, *run.validation] for shard in t.manifest.shards
        ],
        "model": model.fingerprint,
    }
    identity = json.loads(json.dumps(identity))  # as a checkpoint will give it back
    start, spent, curve = _resume(run, network, optimiser, identity)
    read = Reader(traces, chosen, device)
    read_held = Reader(held_sets, chosen, device)
    if start == 0:
        mean, square = moments(read_inputs(e, architecture) for e in read.stream(episodes))
        network.mean.copy_(mean)
        network.std.copy_(deviation(mean, square))

    logger = run.logger()
    measured: dict[str, float] = {}
    began = time.monotonic() - spent
    steps, batch = optimisation.steps, optimisation.batch
    data = read.stream(_order(episodes, optimisation.seed, start * batch, steps * batch))
    with progress_bar("steps", run.progress) as progress:
        bar = progress.add_task(agent, total=steps, completed=start, note="")
        for step in range(start, steps):
            for group in optimiser.param_groups:
                group["lr"] = optimisation.rate(step)
            optimiser.zero_grad(set_to_none=True)
            noise = torch.Generator(device).manual_seed(optimisation.seed * 1_000_003 + step)
            for _ in range(batch):
                episode = next(data)
                scores = network(read_inputs(episode, architecture))
                gradient = objective(scores.detach(), episode.utility, noise, step)
                scores.backward(gradient.to(scores.dtype) / batch)
            optimiser.step()
            done = step + 1
            if held and (done % run.evaluate_every == 0 or done == steps):
                seconds = _seconds(began, device)
                measured = held_out_figures(network, architecture, read_held.stream(held))
                normalized_score, free = measured["normalized_score"], measured["sink_free"]
                curve.append({"step": done, "seconds": round(seconds, 4), **measured})
                note = f"normalized_score {normalized_score:.3f} sink-free {free:.3f}"
                progress.update(bar, note=note)
                if logger is not None:
                    for name, value in measured.items():
                        logger.record(f"held_out/{name}", value)
                    logger.record("train/lr", optimisation.rate(step))
                    logger.record("time/seconds", seconds)
                    logger.dump(done)
                began = time.monotonic() - seconds  # measuring is no training
            progress.update(bar, completed=done)
            if run.checkpoint is not None and done % run.checkpoint_every == 0 and done < steps:
                passed = {"step": done, "seconds": _seconds(began, device), "curve": curve}
                _checkpoint(run, network, optimiser, {**identity, **passed})
    if logger is not None:
        logger.close()

    training = {
        "agent": agent,
        "options": dict(options),
        "seed": optimisation.seed,
        "episodes": len(episodes),
        "held_out_episodes": len(held),
        "traces": [t.manifest.origin for t in traces],
        "device": _device_name(device),
        "seconds": round(_seconds(began, device), 1),
        "curve": curve,
    }
    seen = read_held.stream(held) if held else read.stream(episodes)
    calibration = calibrate(network, architecture, seen)
    network = network.cpu()
    return NetworkScorer(network, architecture, model, training, measured, calibration=calibration)


def read_inputs(episode: HeadBatch, architecture: Architecture) -> torch.Tensor:
    """The networks' inputs (H, n, F), as the prompt's last token sees its tokens."""
    return architecture.read(episode.framed(), episode.values)


@torch.no_grad()
def calibrate(
    network: PerHeadMLP, architecture: Architecture, data: Iterator[HeadBatch]
) -> Calibration:
    """What attention the networks' scores stand for, fitted on episodes."""
    scored = ((network(read_inputs(e, architecture)), e.utility, e.future) for e in data)
    return fit_calibration(network.heads, scored)


@torch.no_grad()
def held_out_figures(
    network: PerHeadMLP, architecture: Architecture, data: Iterator[HeadBatch]
) -> dict[str, float]:
    """Mean normalized score over episodes and heads, with and without the sinks."""
    full, free = [], []
    for episode in data:
        utility = episode.utility
        if utility.shape[-1] <= rules.SINKS:
            raise KvenvError(
                f"a held-out episode has {utility.shape[-1]} prompt tokens: sink-free figures "
                f"need more than {rules.SINKS}, record longer prompts"
            )
        scores = network(read_inputs(episode, architecture))
        full.append(rules.normalized_score(utility, scores).mean())
        rest = rules.without_sinks(utility), rules.without_sinks(scores)
        free.append(rules.normalized_score(*rest).mean())
    return {
        "normalized_score": float(torch.stack(full).mean()),
        "sink_free": float(torch.stack(free).mean()),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _order(episodes: Sequence[Index], seed: int, start: int, stop: int) -> Iterator[Index]:
    """Positions start..stop-1 of an endless walk: every pass visits all episodes in a new order."""
    order: np.ndarray = np.empty(0, int)
    epoch = -1
    for position in range(start, stop):
        if position // len(episodes) != epoch:
            epoch = position // len(episodes)
            order = np.random.default_rng([seed, epoch]).permutation(len(episodes))
        yield episodes[order[position % len(episodes)]]


def _seconds(began: float, device: torch.device) -> float:
    """Time since then, with all that the device was given to do done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.monotonic() - began


def _checkpoint(
    run: Run, network: PerHeadMLP, optimiser: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for index, values in optimiser.state_dict()["state"].items():
        tensors |= {
            f"optimiser.{index}.{name}": torch.as_tensor(value) for name, value in values.items()
        }
    if run.checkpoint is not None:
        save_checkpoint(run.checkpoint, tensors, state)


def _resume(
    run: Run, network: PerHeadMLP, optimiser: torch.optim.Optimizer, identity: Mapping[str, Any]
) -> tuple[int, float, list[dict[str, float]]]:
    """Load the checkpoint, if there is one to go on from: its step, seconds spent and curve."""
    found = load_checkpoint(run.checkpoint) if run.checkpoint is not None else None
    if found is None:
        return 0, 0.0, []
    tensors, state = found
    if not run.resume:
        raise KvenvError(
            f"{str(run.checkpoint)!r} holds a checkpoint of step {state['step']}: "
            "add --resume to go on from it, or delete it to start again"
        )
    different = [name for name in identity if identity[name] != state.get(name)]
    if different:
        raise KvenvError(
            f"the checkpoint in {str(run.checkpoint)!r} is of another run (its "
            f"{' and '.join(different)} differ): give the same command as before, or delete it to "
            "start again"
        )
    network.load_state_dict(
        {
            name.removeprefix("network."): t
            for name, t in tensors.items()
            if name.startswith("network.")
        }
    )
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = tensor
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
    return int(state["step"]), float(state["seconds"]), state["curve"]
