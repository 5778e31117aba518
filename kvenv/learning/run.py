"""What surrounds a training run: checkpoints, logs, progress, held-out documents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from kvenv import files
from kvenv.errors import KvenvError
from kvenv.trace import TraceSet

if TYPE_CHECKING:
    from stable_baselines3.common.logger import Logger

STATE = "checkpoint.json"


@dataclass(frozen=True)
class Run:
    """Where a training run keeps its state and how it reports.

    Attributes:
        checkpoint: folder of the latest checkpoint; None keeps none.
        checkpoint_every: steps between checkpoints.
        resume: go on from the checkpoint.
        validation: held-out trace sets; empty holds out a tenth of the training documents.
        evaluate_every: steps between measurements of held-out normalized score.
        tensorboard: folder for TensorBoard logs; None writes none.
        progress: show a progress bar.
        device: what agents that train networks of their own compute on; stable-baselines3's
            choose for themselves.
    """

    checkpoint: Path | None = None
    checkpoint_every: int = 100
    resume: bool = False
    validation: Sequence[TraceSet] = ()
    evaluate_every: int = 100
    tensorboard: Path | None = None
    progress: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "evaluate_every"):
            if getattr(self, name) < 1:
                raise KvenvError(
                    f"{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1"
                )

    def logger(self) -> Logger | None:
        """What writes to `tensorboard`, if anything is to be written.

        Raises:
            KvenvError: if TensorBoard is not installed.
        """
        if self.tensorboard is None:
            return None
        from stable_baselines3.common.logger import configure  # seconds that others need not wait

        try:
            return configure(str(self.tensorboard), ["tensorboard"])
        except (AssertionError, ImportError) as error:
            raise KvenvError(
                "TensorBoard logs need the tensorboard package: pip install 'kvenv[tensorboard]'"
            ) from error


def save_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> None:
    """Replace the checkpoint in a folder, whole or not at all.

    Raises:
        KvenvError: if it cannot be written; the previous checkpoint is still there.
    """
    # The state names its tensors' file, so that the two never mix: one rename decides.
    name = f"step-{state['step']:08d}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.replace(folder / name, save({k: v.contiguous() for k, v in tensors.items()}))
        files.replace(folder / STATE, json.dumps({**state, "tensors": name}).encode())
        for old in folder.glob("step-*.safetensors"):
            if old.name != name:
                old.unlink()
    except (OSError, SafetensorError) as error:
        raise KvenvError(
            f"checkpoint in {str(folder)!r} could not be written ({error}): free some space and "
            "run the same command with --resume"
        ) from error


def load_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The checkpoint in a folder, or None if there is none.

    Raises:
        KvenvError: if there is one that cannot be read.
    """
    if not (folder / STATE).is_file():
        return None
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return load_file(folder / state["tensors"]), state
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise KvenvError(
            f"checkpoint in {str(folder)!r} is damaged ({error}): delete that folder, train again"
        ) from error
