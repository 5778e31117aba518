"""What training exports and decoding loads: per-head networks as safetensors and JSON."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvenv import identity
from kvenv.errors import KvenvError
from kvenv.scorers import storage
from kvenv.scorers.base import Head, Pointwise
from kvenv.scorers.curves import Curves
from kvenv.scorers.network import Architecture, PerHeadMLP, age_term
from kvenv.scorers.storage import is_bundle
from kvenv.trace import ModelInfo
from kvenv.trace.schema import to_json


@dataclass(repr=False)
class NetworkScorer(Pointwise):
    """A learned `Scorer`: one network per head, for one model.

    Attributes:
        network: the per-head networks.
        architecture: their shape and inputs.
        model: the model whose traces it was trained on.
        training: provenance: agent, its options, trace sets, steps, seconds.
        metrics: what it reached on held-out documents.
        card: its model card (see `kvenv.scorers.card`), saved and loaded as README.md.
        curves: the retention that budgets gave its heads on held-out documents, for dividing a
            budget among them (`kvenv.cache.allocation`).

    Raises:
        KvenvError: if the networks are not of the architecture, their heads not the model's, or
            the curves of other heads.
    """

    network: PerHeadMLP
    architecture: Architecture
    model: ModelInfo
    training: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    card: str | None = None
    curves: Curves | None = None

    def __post_init__(self) -> None:
        if (self.network.age is not None) != self.architecture.age:
            raise KvenvError(
                f"the architecture says age={self.architecture.age} and the networks differ: build "
                "them with Architecture.build"
            )
        _check_heads(self.network.heads, self.model)
        if self.curves is not None and not {*self.curves.heads} <= {*self.network.heads}:
            odd = sorted({*self.curves.heads} - {*self.network.heads})
            raise KvenvError(
                f"retention curves are of heads {odd} that the agent does not have: measure them "
                "again with `kvenv curves`"
            )
        self.network.requires_grad_(False).eval()
        self.heads: frozenset[Head] | None = frozenset(self.network.heads)
        self.pointwise = self.architecture.pointwise
        self.age_term = self._age_term if self.architecture.age else None
        self._layers: dict[tuple[int, torch.device], _Layer] = {}

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
        """Scores (B, H, n) float32 of a layer's tokens; see `kvenv.scorers.base.Scorer.score`.

        What it learned of a token's age is not in them: that changes, and is `age_term`'s.
        """
        batch, _, n, _ = keys.shape
        own = self._layer(layer, keys.device)
        if own is None:
            return keys.new_full(keys.shape[:3], torch.nan, dtype=torch.float32)
        x = self.architecture.read(*(own.take(part) for part in (keys, values, positions)))
        scores = own.network(x.transpose(0, 1).reshape(len(own.rows), batch * n, -1))
        return own.spread(scores.view(-1, batch, n).transpose(0, 1), keys.shape[1], torch.nan)

    def _age_term(self, layer: int, age: torch.Tensor) -> torch.Tensor:
        """What the heads learned of ages (B, H, n), float32; 0 for heads that it does not know."""
        own = self._layer(layer, age.device)
        if own is None or own.network.age is None:
            return age.new_zeros(age.shape, dtype=torch.float32)
        return own.spread(age_term(own.network.age, own.take(age)), age.shape[1], 0.0)

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
        """Write the bundle, whole or not at all; an existing one is replaced, card and curves too.

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
            "version": storage.version_for(self.architecture),
            "architecture": asdict(self.architecture),
            "model": asdict(self.model),
            "heads": self.network.heads,
            "training": dict(self.training),
            "metrics": dict(self.metrics),
        }
        for part in ("training", "metrics"):
            for key, value in config[part].items():
                to_json({key: value}, f"{part} {key!r} of a scorer")
        state = storage.stored(self.network, dtype)
        storage.write_bundle(folder, config, state, self.card, self.curves)

    def push_to_hub(self, repo_id: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> str:
        """Upload the bundle, card and curves included, to the Hugging Face hub.

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
            budget = shape.get("budget")
            architecture = Architecture(
                features=tuple(shape["features"]),
                hidden=tuple(int(width) for width in shape["hidden"]),
                activation=shape.get("activation", "gelu"),
                budget=None if budget is None else int(budget),
                age=shape.get("age", False),
            )
            info = ModelInfo(**{**config["model"], "layers": tuple(config["model"]["layers"])})
            heads = [(int(layer), int(head)) for layer, head in config["heads"]]
            _check_heads(heads, info)
        except (KeyError, TypeError, ValueError) as error:
            raise KvenvError(f"{path} is damaged ({error!r}): export the agent again") from error
        network = architecture.build(heads, info.head_dim)
        storage.read_weights(network, folder / storage.WEIGHTS)
        training, metrics = config.get("training", {}), config.get("metrics", {})
        beside = storage.read_card(folder), storage.read_curves(folder)
        scorer = cls(network, architecture, info, training, metrics, *beside)
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

    def spread(self, scores: torch.Tensor, heads: int, fill: float) -> torch.Tensor:
        """Numbers (B, R, n) among ``fill`` for the other heads, (B, H, n)."""
        if self._whole(heads):
            return scores.contiguous()
        whole = scores.new_full((scores.shape[0], heads, scores.shape[2]), fill)
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
