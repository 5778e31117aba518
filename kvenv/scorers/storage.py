"""The files of a bundle: written whole or not at all, and checked number by number when read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kvenv import files
from kvenv.errors import KvenvError
from kvenv.scorers.base import Head
from kvenv.scorers.calibration import Calibration
from kvenv.scorers.network import PerHeadMLP

FORMAT, VERSION = "kvenv-scorer", 3
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What weights may be stored in."""

NORMALISATION = ("mean", "std")
"""Stored as float32 always: few numbers, and keys' large means would lose the most."""


def is_bundle(folder: str | Path) -> bool:
    """Whether a folder holds a bundle (and not a model, whose files have the same names)."""
    try:
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("format") == FORMAT


def local_bundle(folder: str | Path) -> Path:
    """A folder, if it holds a bundle."""
    if not all((Path(folder) / name).is_file() for name in (CONFIG, WEIGHTS)):
        raise KvenvError(f"{str(folder)!r} is not a bundle: it should hold {CONFIG} and {WEIGHTS}")
    return Path(folder)


def local_folder(source: str | Path) -> Path:
    """Where a bundle's files are, downloaded if the source is a hub id."""
    if Path(source).exists():
        return local_bundle(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=[CONFIG, WEIGHTS, CARD]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise KvenvError(
            f"no bundle {str(source)!r}: no such folder, and the Hugging Face hub gave none"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """A bundle's configuration, if it is one that this kvenv reads."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KvenvError(
            f"{path} cannot be read as JSON ({error}): export the agent again"
        ) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise KvenvError(f"{path} is not a {FORMAT} file: give a folder that `kvenv train` wrote")
    if config.get("version") != VERSION:
        raise KvenvError(
            f"{path} has version {config.get('version')!r}, and this kvenv reads {VERSION}: train "
            "the agent anew, or use the kvenv that wrote it"
        )
    return config


def read_card(folder: Path) -> str | None:
    """A bundle's card, if it has one."""
    try:
        return (folder / CARD).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise KvenvError(f"{folder / CARD} cannot be read ({error}): mend or delete it") from error


def read_weights(network: PerHeadMLP, path: Path) -> Calibration | None:
    """Give a network, on the meta device, a bundle's numbers as float32; the calibration."""
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise KvenvError(f"{path} is damaged ({error}): export the agent again") from error
    calibration = Calibration.from_tensors(state)
    state = {name: one for name, one in state.items() if not name.startswith("calibration.")}
    wanted = network.state_dict()
    if state.keys() != wanted.keys():
        odd = sorted(state.keys() ^ wanted.keys())
        raise KvenvError(f"{path} does not fit its {CONFIG}: tensors {odd} are missing or too many")
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise KvenvError(
                f"{path} does not fit its {CONFIG}: {name} is {tuple(tensor.shape)}, "
                f"not {tuple(wanted[name].shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise KvenvError(
                f"{path} holds {name} as {_spell(tensor.dtype)}: export the agent again, as "
                f"{' or '.join(map(_spell, DTYPES))}"
            )
        if (odd_one := _not_finite(tensor, network.heads)) is not None:
            raise KvenvError(
                f"{path} holds NaN or infinite numbers in {name} ({odd_one}): "
                "export the agent again from a sound checkpoint"
            )
    network.load_state_dict({name: one.float() for name, one in state.items()}, assign=True)
    return calibration


def stored(network: PerHeadMLP, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A network's numbers as they are stored.

    Args:
        network: the networks.
        dtype: of the weights; the normalisation stays float32.

    Raises:
        KvenvError: if the dtype is none of `DTYPES`, or a number is NaN, infinite or too large for
            it, naming the head.
    """
    if dtype not in DTYPES:
        raise KvenvError(f"dtype {dtype} stores no weights: choose {', '.join(map(str, DTYPES))}")
    state: dict[str, torch.Tensor] = {}
    for name, tensor in network.state_dict().items():
        if (where := _not_finite(tensor, network.heads)) is not None:
            raise KvenvError(
                f"{name} holds NaN or infinite numbers ({where}): train again with a smaller lr"
            )
        kept = tensor.to(torch.float32 if name in NORMALISATION else dtype)
        if (where := _not_finite(kept, network.heads)) is not None:
            raise KvenvError(
                f"{name} holds numbers too large for {_spell(dtype)} ({where}): save as float32"
            )
        state[name] = kept.detach().cpu().contiguous()
    return state


def write_bundle(
    folder: Path,
    config: Mapping[str, Any],
    state: Mapping[str, torch.Tensor],
    card: str | None = None,
) -> None:
    """Write a bundle's files beside ``folder`` and then put them in its place.

    Raises:
        KvenvError: if it cannot be written; what was there is then as before.
    """
    try:
        with files.replacing(folder) as scratch:
            save_file(dict(state), scratch / WEIGHTS, metadata={"format": "pt"})
            (scratch / WEIGHTS).chmod(0o644)  # safetensors lets none but the owner read
            (scratch / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            if card is not None:
                (scratch / CARD).write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise unwritable(folder, error) from error


def unwritable(folder: Path, error: Exception) -> KvenvError:
    """What to raise when a bundle's file could not be written."""
    reason = getattr(error, "strerror", None) or error
    return KvenvError(
        f"bundle {str(folder)!r} could not be written ({reason}): free some space or choose "
        "another --out"
    )


def _not_finite(tensor: torch.Tensor, heads: Sequence[Head]) -> str | None:
    """The first head with a number that is NaN or infinite."""
    rows = (~torch.isfinite(tensor)).flatten(1).any(1)
    if not rows.any():
        return None
    layer, head = heads[int(rows.nonzero()[0])]
    return f"layer {layer} head {head}"


def _spell(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
