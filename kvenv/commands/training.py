"""``kvenv train``."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from kvenv.commands.common import parse_heads, pick_device, trace_sets
from kvenv.display import console
from kvenv.errors import KvenvError


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
    device: str = "auto",
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
        device: cpu, cuda, ...; auto takes a GPU if there is one.
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
        trace_sets(traces),
        parse_heads(heads) if heads else None,
        Run(
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            resume=resume,
            validation=trace_sets(validation) if validation else (),
            evaluate_every=evaluate_every,
            tensorboard=tensorboard,
            progress=True,
            device=pick_device(device),
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
