"""How a model rotates its keys (RoPE), and keys in the frame of now."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from kvenv.errors import KvenvError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Layout = Literal["halves", "pairs"]
"""Which channels form a plane: i and i + width / 2 (Llama), or 2 i and 2 i + 1 (GPT-J)."""

SWITCHING = frozenset({"dynamic", "longrope"})
"""Kinds of scaling whose frequencies change once a text is longer than the model was trained on."""

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far a proof may be off, as a share of a channel's largest number, by the model's dtype."""

TOKENS = 4
"""Tokens that a proof looks at."""


@dataclass(frozen=True)
class Rotation:
    """How one layer rotates its keys: key at position p = factor * R(p) * key before rotation.

    R(p) turns plane i of the rotated channels by p * frequencies[i] radians.

    Attributes:
        frequencies: radians a token, one for each plane; empty where the layer rotates nothing.
        layout: which channels form a plane.
        offset: the first rotated channel; the rotated width is twice the number of frequencies.
        factor: what the model multiplies cosines and sines by (yarn, longrope).
    """

    frequencies: tuple[float, ...] = ()
    layout: Layout = "halves"
    offset: int = 0
    factor: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "frequencies", tuple(float(f) for f in self.frequencies))
        finite = all(-1e6 < f < 1e6 for f in (*self.frequencies, self.factor))
        if not finite or self.layout not in ("halves", "pairs") or self.factor <= 0:
            raise KvenvError(
                f"rotation of layout {self.layout!r}, factor {self.factor!r}: record the set again"
            )
        if not isinstance(self.offset, int) or self.offset < 0:
            raise KvenvError(f"rotation from channel {self.offset!r}: record the set again")

    @property
    def width(self) -> int:
        """Rotated channels."""
        return 2 * len(self.frequencies)

    def turn(self, states: Tensor, by: Tensor) -> Tensor:
        """R(by) times states, (..., n, d) float32.

        Args:
            states: (..., n, d), keys or queries.
            by: tokens to turn by, broadcast to (..., n); negative turns back.

        Raises:
            KvenvError: if the states have fewer channels than are rotated.
        """
        x = states.float()
        if not self.frequencies:
            return x
        if self.offset + self.width > x.shape[-1]:
            raise KvenvError(
                f"{self.width} channels from {self.offset} on are rotated and heads have "
                f"{x.shape[-1]}: record the set again from this model"
            )
        # Float64: at position 100,000 a float32 angle would be off by hundredths of a radian.
        speed = torch.tensor(self.frequencies, dtype=torch.float64, device=x.device)
        angle = by.to(x.device, torch.float64).unsqueeze(-1) * speed
        cos, sin = angle.cos().float(), angle.sin().float()
        part = x[..., self.offset : self.offset + self.width]
        if self.layout == "halves":
            a, b = part.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        else:
            a, b = part[..., 0::2], part[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        if self.width == x.shape[-1]:
            return turned
        tail = x[..., self.offset + self.width :]
        return torch.cat([x[..., : self.offset], turned, tail], -1)

    def frame(self, keys: Tensor, now: Tensor) -> Tensor:
        """Keys in the frame of now, R(-now) k: as a query at position ``now`` meets them.

        Args:
            keys: (B, H, n, d) as a cache holds them.
            now: (B,) position of each row's newest token.

        Returns:
            (B, H, n, d) float32.
        """
        return self.turn(keys, -now.view(-1, 1, 1))

    def matrix(self, now: Tensor, d: int) -> Tensor:
        """R(-now) as matrices: row-vector keys k become k @ matrix, (B, d, d) float32."""
        eye = torch.eye(d, device=now.device).expand(len(now), 1, d, d)
        return self.frame(eye, now)[:, 0]


def pack(rotations: Sequence[Rotation | str]) -> dict[str, Any]:
    """Rotations of layers as JSON: each kind once, and which kind every layer is of.

    A string says why a layer's rotation cannot be stated.
    """
    kinds = list(dict.fromkeys(rotations))
    plain = [{"unknown": k} if isinstance(k, str) else {**vars(k)} for k in kinds]
    return {"kinds": plain, "layers": [kinds.index(one) for one in rotations]}


def unpack(plain: Mapping[str, Any]) -> tuple[Rotation | str, ...]:
    """The other way of `pack`.

    Raises:
        KvenvError: if it is not what `pack` gives.
    """
    try:
        kinds: list[Rotation | str] = [
            str(kind["unknown"]) if "unknown" in kind else Rotation(**kind)
            for kind in plain["kinds"]
        ]
        return tuple(kinds[int(i)] for i in plain["layers"])
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise KvenvError(f"rotation is damaged ({error!r}): record the set again") from error


@torch.no_grad()
def rotations_of(
    model: PreTrainedModel, layers: Sequence[int], length: int
) -> tuple[Rotation | str, ...]:
    """How a model rotates the keys of these layers in texts of up to ``length`` tokens.

    Proved on the model itself. A text of one token attends to that token alone, whatever its
    position, so its keys at positions 0 and p differ by the rotation and nothing else.

    Args:
        model: the model.
        layers: full-attention layers.
        length: the longest text, in tokens.

    Returns:
        For each layer its rotation; identity where the model has none; a string where the
        rotation cannot be stated, which says why.
    """
    config = model.config.get_text_config()
    if why := _switches(config, length):
        return (why,) * len(layers)
    if "position_ids" not in inspect.signature(model.forward).parameters:
        if _rotary(model) is None:
            return (Rotation(),) * len(layers)
        return (f"{config.model_type} takes no position_ids to prove it with",) * len(layers)
    where = sorted({0, 1, 7, length // 3, length - 1} & set(range(length)))
    if _learned_positions(model):
        return (Rotation(),) * len(layers)
    probes = _probe(model, layers, where)
    if probes is None:
        why = f"{config.model_type} caches something else than the keys of its heads"
        return (why,) * len(layers)
    found: list[Rotation | str] = []
    for layer, keys in zip(layers, probes, strict=True):
        proved = (c for c in _candidates(model, layer, keys.shape[-1]) if _fits(c, keys, where))
        found.append(
            next(proved, f"{config.model_type} rotates in a way that no formula here fits")
        )
    return tuple(found)


def _switches(config: Any, length: int) -> str | None:
    """Why one set of frequencies does not do for texts of up to ``length`` tokens, if so."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [given, *(part for part in given.values() if isinstance(part, dict))]
    for kind in kinds:
        name = kind.get("rope_type", kind.get("type"))
        if name not in SWITCHING:
            continue
        most = (
            kind.get("original_max_position_embeddings")
            or getattr(config, "original_max_position_embeddings", None)
            or config.max_position_embeddings
        )
        if length > most:
            return (
                f"{config.model_type} ({name}) rotates differently beyond {most} tokens, and texts "
                f"have up to {length}: keep them within {most}"
            )
    return None


def _rotary(model: PreTrainedModel) -> Any:
    """The model's rotary embedding, if it has one of the library's usual form."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for module in (decoder, getattr(model, "model", None)):
        if (rotary := getattr(module, "rotary_emb", None)) is not None:
            return rotary
    return None


def _learned_positions(model: PreTrainedModel) -> bool:
    """Whether positions are added to the embeddings: keys are then not rotated."""
    names = ("wpe", "embed_positions", "position_embeddings", "embed_position")
    for name, module in model.named_modules():
        tail = name.rsplit(".", 1)[-1]
        if tail in names and any(True for _ in module.parameters()):
            return True
    return False


def _probe(
    model: PreTrainedModel, layers: Sequence[int], where: Sequence[int]
) -> list[Tensor] | None:
    """Keys (positions, tokens, H, d) float32 of single tokens at some positions, by layer."""
    from transformers.cache_utils import DynamicCache

    device = model.device
    config = model.config.get_text_config()
    tokens = torch.linspace(1, config.vocab_size - 1, TOKENS).long()
    ids = tokens.repeat(len(where)).view(-1, 1).to(device)
    positions = torch.tensor(where).repeat_interleave(TOKENS).view(-1, 1).to(device)
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    found = []
    for layer in layers:
        keys = getattr(cache.layers[layer], "keys", None)
        if keys is None or keys.ndim != 4 or keys.shape[2] != 1:
            return None
        if keys.shape[1] == 1 and getattr(config, "kv_lora_rank", None):
            return None  # latents that keys are made from
        found.append(keys[:, :, 0].unflatten(0, (len(where), TOKENS)))
    return found


def _candidates(model: PreTrainedModel, layer: int, d: int) -> Iterator[Rotation]:
    """Rotations that the layer may have: none, or that of the model's rotary embedding."""
    yield Rotation()
    config = model.config.get_text_config()
    rotary = _rotary(model)
    if rotary is not None:
        frequencies, factor = _frequencies(rotary, config, layer)
    elif width := getattr(config, "rotary_dim", None):  # GPT-J and its kin keep a table instead
        frequencies = [10000.0 ** (-2 * i / width) for i in range(width // 2)]
        factor = 1.0
    else:
        return
    if 2 * len(frequencies) > d:
        return
    for offset in dict.fromkeys((0, d - 2 * len(frequencies))):
        for layout in ("halves", "pairs"):
            yield Rotation(tuple(frequencies), layout, offset, factor)


def _frequencies(rotary: Any, config: Any, layer: int) -> tuple[list[float], float]:
    """What the embedding turns by at position 1, plane by plane, and its factor."""
    rotary = copy.deepcopy(rotary)  # asking may change what it keeps
    given: dict[str, Any] = {}
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        given["layer_type"] = config.layer_types[layer]
    device = next(rotary.buffers()).device
    ask = torch.ones(1, 1, dtype=torch.long, device=device)
    like = torch.empty(0, dtype=torch.float32, device=device)
    answer = rotary(like, ask, **given)
    cos, sin = (answer.real, answer.imag) if isinstance(answer, Tensor) else answer
    cos, sin = cos.double().flatten(), sin.double().flatten()
    factor = round(float((cos**2 + sin**2).mean().sqrt()), 6)
    angle = torch.atan2(sin, cos)
    half = len(angle) // 2
    if not torch.is_tensor(answer):
        if torch.equal(angle[:half], angle[half:]):
            angle = angle[:half]
        elif torch.equal(angle[0::2], angle[1::2]):
            angle = angle[0::2]
    # The embedding's own numbers, where they are these: exact, and the same on every device.
    for buffer in rotary.buffers():
        own = buffer.double().flatten()
        if own.shape == angle.shape and torch.allclose(own, angle, rtol=1e-5, atol=1e-7):
            return own.tolist(), factor
    return angle.tolist(), factor


def _fits(rotation: Rotation, keys: Tensor, where: Sequence[int]) -> bool:
    """Whether turning every recorded key back by its position gives the key before rotation."""
    positions = torch.tensor(where, device=keys.device).view(-1, 1, 1)
    back = rotation.turn(keys, -positions.expand(keys.shape[:3]))
    # Channel by channel: those that are rotated may be far smaller than the others.
    scale = keys.float().abs().amax((0, 1, 2)).clamp_min(1e-12)
    allowed = TOLERANCE.get(keys.dtype, 1e-3)
    return bool(((back - back[:1]).abs() <= allowed * scale).all())
