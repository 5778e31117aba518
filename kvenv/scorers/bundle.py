"""What training exports and decoding loads: per-head networks as safetensors and JSON."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kvenv import identity
from kvenv.errors import KvenvError
from kvenv.scorers.base import Head, Pointwise
from kvenv.scorers.network import Architecture, PerHeadMLP
from kvenv.trace import ModelInfo
from kvenv.trace.schema import to_json

FORMAT, VERSION = "kvenv-scorer", 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(repr=False)
class NetworkScorer(Pointwise):
    """A learned `Scorer`: one network per head, for one model.

    Attributes:
        network: the per-head networks.
        architecture: their shape and inputs.
        model: the model whose traces it was trained on.
        training: provenance: agent, its options, trace sets, steps, seconds.
        metrics: what it reached on held-out documents.
    """

    network: PerHeadMLP
    architecture: Architecture
    model: ModelInfo
    training: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.network.requires_grad_(False).eval()
        self.heads: frozenset[Head] | None = frozenset(self.network.heads)
        self._layers: dict[int, tuple[PerHeadMLP, list[int]]] = {}

    def __repr__(self) -> str:
        agent = self.training.get("agent", "?")
        return f"NetworkScorer({agent}, {self.model.id}, {len(self.network.heads)} heads)"

    def score(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        **needs: torch.Tensor,
    ) -> torch.Tensor:
        """Scores (B, H, n) float32 of a layer's tokens; see `kvenv.scorers.base.Scorer.score`."""
        batch, heads, n, _ = keys.shape
        if all(layer != at for at, _ in self.network.heads):
            return keys.new_full((batch, heads, n), torch.nan, dtype=torch.float32)
        network, rows = self._layer(layer, keys.device)
        x = self.architecture.read(keys[:, rows], values[:, rows], positions[:, rows])
        scores = network(x.transpose(0, 1).reshape(len(rows), batch * n, -1))
        scores = scores.view(len(rows), batch, n).transpose(0, 1)
        if len(rows) == heads:
            return scores.contiguous()
        full = scores.new_full((batch, heads, n), torch.nan)
        full[:, rows] = scores
        return full

    def _layer(self, layer: int, device: torch.device) -> tuple[PerHeadMLP, list[int]]:
        """The networks of one layer, on a device, and the KV heads they belong to."""
        if layer not in self._layers:
            rows = [i for i, head in enumerate(self.network.heads) if head[0] == layer]
            heads = [self.network.heads[i] for i in rows]
            part = self.architecture.build(heads, self.model.head_dim)
            state = {name: tensor[rows] for name, tensor in self.network.state_dict().items()}
            part.load_state_dict(state)
            self._layers[layer] = (part.requires_grad_(False), [head[1] for head in heads])
        network, rows = self._layers[layer]
        return network.to(device), rows

    def check_model(self, model: Any) -> None:
        """Refuse another model than the one it was trained on.

        Args:
            model: a transformers model (its weights are compared), its config (its shape is
                compared), or a trace set's `ModelInfo`.

        Raises:
            KvenvError: naming both models.
        """
        if isinstance(model, ModelInfo):
            other, same = model.id, model.fingerprint == self.model.fingerprint
        else:
            config = getattr(model, "config", model)
            shape = identity.shape(config)
            other = str(getattr(config, "_name_or_path", "") or config.model_type)
            same = all(getattr(self.model, name) == value for name, value in shape.items())
            if same and hasattr(model, "named_parameters"):
                same = identity.fingerprint(model) == self.model.fingerprint
        if not same:
            raise KvenvError(
                f"this agent was trained on {self.model.id} and cannot score {other}: "
                f"train one on traces of {other}, or load {self.model.id}"
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the bundle, whole or not at all; an existing bundle is replaced.

        Raises:
            KvenvError: if the folder holds something else or cannot be written, or if `training`
                or `metrics` are not JSON-safe.
        """
        folder = Path(folder)
        if folder.exists() and not is_bundle(folder):
            raise KvenvError(f"{str(folder)!r} exists and is not a bundle: choose another --out")
        config = {
            "format": FORMAT,
            "version": VERSION,
            "architecture": asdict(self.architecture),
            "model": asdict(self.model),
            "heads": self.network.heads,
            "training": dict(self.training),
            "metrics": dict(self.metrics),
        }
        for part in ("training", "metrics"):
            for key, value in config[part].items():
                to_json({key: value}, f"{part} {key!r} of a scorer")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        except OSError as error:
            raise _unwritable(folder, error) from error
        try:
            state = {k: v.contiguous() for k, v in self.network.state_dict().items()}
            save_file(state, scratch / WEIGHTS, metadata={"format": "pt"})
            (scratch / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            scratch.chmod(0o755)
            if folder.exists():
                _replace(folder, scratch)
            else:
                scratch.rename(folder)
        except (OSError, SafetensorError) as error:
            raise _unwritable(folder, error) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the bundle to the Hugging Face hub; returns the commit's address.

        Args:
            repo_id: "user/name"; created if it does not exist.
            **kwargs: passed to ``huggingface_hub.HfApi.upload_folder``.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            self.save_pretrained(Path(scratch) / "bundle")
            return str(
                api.upload_folder(repo_id=repo_id, folder_path=Path(scratch) / "bundle", **kwargs)
            )

    @classmethod
    def from_pretrained(cls, source: str | Path, model: Any = None) -> NetworkScorer:
        """Load a bundle.

        Args:
            source: a folder, or a hub id.
            model: if given, `check_model` is called with it.

        Raises:
            KvenvError: if the bundle is missing, damaged, of another format, holds NaN or
                infinite weights, or belongs to another model.
        """
        folder = _local(source)
        config = _config(folder)
        try:
            shape = config["architecture"]
            budget = shape.get("budget")
            architecture = Architecture(
                features=tuple(shape["features"]),
                hidden=tuple(int(width) for width in shape["hidden"]),
                activation=shape.get("activation", "gelu"),
                budget=None if budget is None else int(budget),
            )
            info = ModelInfo(**{**config["model"], "layers": tuple(config["model"]["layers"])})
            heads = [(int(layer), int(head)) for layer, head in config["heads"]]
        except (KeyError, TypeError, ValueError) as error:
            raise KvenvError(
                f"{folder / CONFIG} is damaged ({error!r}): export the agent again"
            ) from error
        network = architecture.build(heads, info.head_dim)
        _load_weights(network, folder / WEIGHTS)
        scorer = cls(
            network, architecture, info, config.get("training", {}), config.get("metrics", {})
        )
        if model is not None:
            scorer.check_model(model)
        return scorer


def is_bundle(folder: str | Path) -> bool:
    """Whether a folder holds a bundle (and not a model, whose files have the same names)."""
    try:
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("format") == FORMAT


def _local(source: str | Path) -> Path:
    if Path(source).exists():
        if not all((Path(source) / name).is_file() for name in (CONFIG, WEIGHTS)):
            raise KvenvError(
                f"{str(source)!r} is not a bundle: it should hold {CONFIG} and {WEIGHTS}"
            )
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=[CONFIG, WEIGHTS, "*.md"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise KvenvError(
            f"no bundle {str(source)!r}: no such folder, and the Hugging Face hub gave none"
        ) from error


def _config(folder: Path) -> dict[str, Any]:
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
            f"{path} has version {config.get('version')!r}, not {VERSION}: update kvenv"
        )
    return config


def _load_weights(network: PerHeadMLP, path: Path) -> None:
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise KvenvError(f"{path} is damaged ({error}): export the agent again") from error
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
        if not torch.isfinite(tensor).all():
            row = int((~torch.isfinite(tensor)).flatten(1).any(1).nonzero()[0])
            layer, head = network.heads[row]
            raise KvenvError(
                f"{path} holds NaN or infinite numbers in {name} (layer {layer} head {head}): "
                "export the agent again from a sound checkpoint"
            )
    network.load_state_dict(state)


def _replace(folder: Path, scratch: Path) -> None:
    """Put ``scratch`` in the place of ``folder``, which comes back if that fails."""
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        folder.rename(aside / "replaced")
        try:
            scratch.rename(folder)
        except OSError:
            (aside / "replaced").rename(folder)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _unwritable(folder: Path, error: Exception) -> KvenvError:
    reason = getattr(error, "strerror", None) or error
    return KvenvError(
        f"bundle {str(folder)!r} could not be written ({reason}): free some space or choose "
        "another --out"
    )
