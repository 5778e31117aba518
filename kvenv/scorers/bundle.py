"""What training exports and decoding loads: per-head networks as safetensors and JSON."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from kvenv import identity
from kvenv.errors import KvenvError
from kvenv.scorers import storage
from kvenv.scorers.base import Head
from kvenv.scorers.calibration import Calibration
from kvenv.scorers.network import Architecture, PerHeadMLP
from kvenv.scorers.storage import is_bundle
from kvenv.trace import ModelInfo
from kvenv.trace.schema import to_json


@dataclass(repr=False)
class NetworkScorer:
    """A learned `Scorer`: one network per head, for one model, seeing keys as they look from now.

    Attributes:
        network: the per-head networks.
        architecture: their shape and inputs.
        model: the model whose traces it was trained on.
        training: provenance: agent, its options, trace sets, steps, seconds.
        metrics: what it reached on held-out documents.
        card: its model card (see `kvenv.scorers.card`), saved and loaded as README.md.
        calibration: what attention its scores stand for, fitted on held-out documents: heads
            compete by it for one budget (`kvenv.cache`).

    Raises:
        KvenvError: if the heads are not the model's, or a layer's rotation cannot be stated.
    """

    network: PerHeadMLP
    architecture: Architecture
    model: ModelInfo
    training: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    card: str | None = None
    calibration: Calibration | None = None

    needs = frozenset[str]()

    def __post_init__(self) -> None:
        _check_heads(self.network.heads, self.model)
        self.network.requires_grad_(False).eval()
        self.heads: frozenset[Head] | None = frozenset(self.network.heads)
        for layer in {layer for layer, _ in self.network.heads}:
            self.model.rotation(layer)
        self._layers: dict[tuple[int, torch.device], _Layer] = {}

    def __repr__(self) -> str:
        agent = self.training.get("agent", "?")
        return f"NetworkScorer({agent}, {self.model.id}, {len(self.network.heads)} heads)"

    @torch.no_grad()
    def score(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        now: torch.Tensor,
        **needs: torch.Tensor,
    ) -> torch.Tensor:
        """Scores (B, H, n) float32 of a layer's tokens; see `kvenv.scorers.base.Scorer.score`."""
        batch, heads, n, d = keys.shape
        own = self._layer(layer, keys.device)
        if own is None:
            return keys.new_full(keys.shape[:3], torch.nan, dtype=torch.float32)
        if d != self.model.head_dim:
            raise KvenvError(
                f"keys of layer {layer} have {d} channels and {self!r} was trained on "
                f"{self.model.head_dim}: use it with {self.model.id}"
            )
        framed = self.model.rotation(layer).frame(own.take(keys), now)
        x = self.architecture.read(framed, own.take(values))
        scores = own.network(x.transpose(0, 1).reshape(len(own.rows), batch * n, -1))
        return own.spread(scores.view(-1, batch, n).transpose(0, 1), heads)

    def _layer(self, layer: int, device: torch.device) -> _Layer | None:
        """The networks of one layer on a device, if there are any."""
        if (layer, device) not in self._layers:
            heads = self.network.heads
            rows = [heads.index(head) for head in sorted(heads) if head[0] == layer]
            if not rows:
                return None
            part = self.architecture.build([heads[i] for i in rows], self.model.head_dim)
            state = {name: tensor[rows] for name, tensor in self.network.state_dict().items()}
            part.load_state_dict(state)
            index = torch.tensor([heads[i][1] for i in rows], device=device)
            part = part.requires_grad_(False).to(device)
            self._layers[layer, device] = _Layer(part, index)
        return self._layers[layer, device]

    def layer_networks(self, layer: int, device: torch.device) -> PerHeadMLP:
        """The networks of a layer on a device, their KV heads ascending.

        Raises:
            KvenvError: if it has none for that layer.
        """
        own = self._layer(layer, device)
        if own is None:
            raise KvenvError(f"{self!r} has no networks for layer {layer}")
        return own.network

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

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the bundle, whole or not at all; an existing one is replaced, card too.

        Args:
            folder: where.
            dtype: of the stored weights: float32, or float16 or bfloat16 for half the bytes.
                Loading gives float32 back; the inputs' normalisation is float32 in the file too.

        Raises:
            KvenvError: if the folder holds something else or cannot be written, if a weight is no
                number in that dtype, or if `training` or `metrics` are not JSON-safe.
        """
        folder = Path(folder)
        if folder.exists() and not is_bundle(folder):
            raise KvenvError(f"{str(folder)!r} exists and is not a bundle: choose another --out")
        config = {
            "format": storage.FORMAT,
            "version": storage.VERSION,
            "architecture": asdict(self.architecture),
            "model": self.model.to_json(),
            "heads": self.network.heads,
            "training": dict(self.training),
            "metrics": dict(self.metrics),
        }
        for part in ("training", "metrics"):
            for key, value in config[part].items():
                to_json({key: value}, f"{part} {key!r} of a scorer")
        state = storage.stored(self.network, dtype)
        if self.calibration is not None:
            state |= self.calibration.tensors()
        storage.write_bundle(folder, config, state, self.card)

    def push_to_hub(self, repo_id: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> str:
        """Upload the bundle, card included, to the Hugging Face hub.

        Args:
            repo_id: "user/name"; created if it does not exist.
            dtype: of the stored weights, as for `save_pretrained`.
            **kwargs: passed to ``huggingface_hub.HfApi.upload_folder``.

        Returns:
            The commit's address.
        """
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as scratch:
            bundle = Path(scratch) / "bundle"
            self.save_pretrained(bundle, dtype)
            api = HfApi()
            api.create_repo(repo_id, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=bundle, **kwargs))

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
        folder = storage.local_folder(source)
        config = storage.read_config(folder)
        path = folder / storage.CONFIG
        try:
            shape = config["architecture"]
            if unknown := sorted(set(shape) - {one.name for one in fields(Architecture)}):
                raise KvenvError(f"{path} has an architecture with {unknown}: update kvenv")
            architecture = Architecture(
                inputs=tuple(shape["inputs"]),
                hidden=tuple(int(width) for width in shape["hidden"]),
                activation=shape["activation"],
            )
            info = ModelInfo.from_json(config["model"])
            heads = [(int(layer), int(head)) for layer, head in config["heads"]]
            _check_heads(heads, info)
            with torch.device("meta"):  # no memory before the sizes are found in the weights' file
                network = architecture.build(heads, info.head_dim)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise KvenvError(f"{path} is damaged ({error!r}): export the agent again") from error
        calibration = storage.read_weights(network, folder / storage.WEIGHTS)
        training, metrics = config.get("training", {}), config.get("metrics", {})
        card = storage.read_card(folder)
        scorer = cls(network, architecture, info, training, metrics, card, calibration)
        if model is not None:
            scorer.check_model(model)
        return scorer


@dataclass(frozen=True)
class _Layer:
    """The networks of a layer's heads on a device.

    Attributes:
        network: theirs, in the order of `rows`.
        rows: their KV heads, ascending, (R,) int64.
    """

    network: PerHeadMLP
    rows: torch.Tensor

    def take(self, states: torch.Tensor) -> torch.Tensor:
        """Of states (B, H, ...) the rows that have a network, (B, R, ...)."""
        return states if self._whole(states.shape[1]) else states.index_select(1, self.rows)

    def spread(self, scores: torch.Tensor, heads: int) -> torch.Tensor:
        """Scores (B, R, n) among NaN for the other heads, (B, H, n)."""
        if self._whole(heads):
            return scores.contiguous()
        whole = scores.new_full((scores.shape[0], heads, scores.shape[2]), torch.nan)
        return whole.index_copy_(1, self.rows, scores)

    def _whole(self, heads: int) -> bool:
        return len(self.rows) == heads


def _check_heads(heads: Sequence[Head], model: ModelInfo) -> None:
    inside = all(0 <= at < model.num_layers and 0 <= h < model.kv_heads for at, h in heads)
    if not inside or len(set(heads)) < len(heads):
        raise KvenvError(
            f"heads {[list(head) for head in heads]} are not distinct (layer, KV head) pairs of "
            f"{model.id}, which has {model.num_layers} layers of {model.kv_heads} KV heads"
        )
