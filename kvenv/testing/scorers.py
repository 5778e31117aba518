"""What every scorer must do: see `kvenv.scorers.base.Scorer`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from kvenv.errors import KvenvError
from kvenv.scorers.base import NEEDS, Head, Scorer
from kvenv.testing.calling import calling
from kvenv.trace import ModelInfo

Inputs = dict[str, torch.Tensor]
ATTRIBUTES = ("needs", "heads", "score")
PER_TOKEN = ("keys", "values", "positions", "past_attention", "recent_attention", "utility")
SCORER = "see kvenv.scorers.base.Scorer"
GUARD = "guard roots, logarithms and divisions: a norm or an age may be 0, a token alone"


def check_scorer(
    scorer: Scorer,
    heads: Collection[Head] | None = None,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    query_heads: int | None = None,
) -> None:
    """Check that a scorer does what `kvenv.scorers.base.Scorer` says.

    - `needs` is a frozenset out of `kvenv.scorers.base.NEEDS`; `heads` None or a frozenset of
      (layer, KV head).
    - `score` takes what `needs` names and gives float32 (B, H, n) without a gradient: NaN for the
      heads outside `heads`, in whole layers too, and numbers (infinite ones rank first or last)
      for the others. A prompt may have one token, arrays may be views, keys may be zeros or large.
    - float16 and bfloat16 inputs score as the same numbers in float32.
    - A row's scores do not depend on the other rows of the batch.
    - Asked again, it says the same. It changes neither its inputs nor a global random generator.

    That higher means keep cannot be checked.

    Args:
        scorer: the scorer.
        heads: the heads that it has to have scores for; None: those that it names, else layer 0's.
        head_dim: d; None: that of the scorer's model, 64 if it has none.
        kv_heads: KV heads a layer; None: those of its model, or as many as `heads` tell of.
        query_heads: query heads a layer; None: those of its model, or two for each KV head.

    Raises:
        KvenvError: naming the first point that is broken, the value and the cure.
    """
    _check_attributes(scorer)
    if heads is not None and scorer.heads is not None and (out := set(heads) - scorer.heads):
        raise KvenvError(
            f"{_name(scorer)}.heads lacks {sorted(out)}: score every head that was asked for"
        )
    known = set(scorer.heads or ()) | set(heads or ()) or {(0, 0)}
    probe = Probe.of(scorer, known, head_dim, kv_heads, query_heads)
    layers = sorted({layer for layer, _ in known})
    given = probe.inputs(3, 11)
    kept = {name: x.clone() for name, x in given.items()}
    scores = [probe.ask(layer, given, "3 rows of 11 tokens") for layer in layers]
    if changed := [name for name, x in given.items() if not torch.equal(x, kept[name])]:
        raise KvenvError(
            f"{_name(scorer)}.score changed its {', '.join(changed)}: work on copies, without "
            "in-place operations"
        )
    for layer, first in zip(layers, scores, strict=True):
        if not same(first, probe.ask(layer, given, "the same tokens again")):
            raise KvenvError(
                f"{_name(scorer)}.score gave other numbers for the same tokens asked again: let it "
                "keep no state and draw no noise (hash positions instead)"
            )
    if scorer.heads is not None and (other := probe.layer_outside(layers)) is not None:
        probe.ask(other, given, "a layer outside its heads", "fill the others' scores with NaN")
    _check_inputs(probe, layers[0])
    _check_independence(probe, layers[0], given, scores[0])


@dataclass(frozen=True)
class Probe:
    """Asks a scorer for scores of made-up tokens, and checks every answer's form."""

    scorer: Scorer
    head_dim: int
    kv_heads: int
    query_heads: int
    layers: int | None

    @classmethod
    def of(
        cls,
        scorer: Scorer,
        heads: Collection[Head],
        head_dim: int | None = None,
        kv_heads: int | None = None,
        query_heads: int | None = None,
    ) -> Probe:
        """With the sizes given, else those of the scorer's model, else made-up ones."""
        model = getattr(scorer, "model", None)
        if not isinstance(model, ModelInfo):
            kv = kv_heads or max(2, *(head + 1 for _, head in heads))
            return cls(scorer, head_dim or 64, kv, query_heads or 2 * kv, None)
        sizes = (head_dim or model.head_dim, kv_heads or model.kv_heads)
        return cls(scorer, *sizes, query_heads or model.query_heads, model.num_layers)

    def layer_outside(self, layers: Collection[int]) -> int | None:
        """A layer of the model that is not among some, if there is one."""
        count = max(layers) + 2 if self.layers is None else self.layers
        return next((layer for layer in range(count) if layer not in layers), None)

    def inputs(self, batch: int, n: int) -> Inputs:
        """What a cache, an evaluation or both can give for (batch, n) tokens, always the same."""
        noise = torch.Generator().manual_seed(1000 * batch + n)
        per_token = (batch, self.kv_heads, n)
        root = torch.randn(batch, self.query_heads, self.head_dim, self.head_dim, generator=noise)
        return {
            "keys": torch.randn(*per_token, self.head_dim, generator=noise),
            "values": torch.randn(*per_token, self.head_dim, generator=noise),
            # With gaps, as a cache that evicts has them.
            "positions": torch.arange(n).mul(3).expand(per_token).contiguous(),
            # Padded rows have their own; a row's newest token may be one that left.
            "now": 3 * (n - 1) + torch.arange(batch),
            "queries": torch.randn(batch, self.query_heads, 6, self.head_dim, generator=noise),
            "past_attention": torch.rand(per_token, generator=noise),
            "recent_attention": torch.rand(per_token, generator=noise),
            "query_mean": torch.randn(batch, self.query_heads, self.head_dim, generator=noise),
            "query_cov": root @ root.mT / self.head_dim,
            "utility": torch.rand(per_token, generator=noise),
        }

    def ask(self, layer: int, given: Inputs, case: str, cure: str = SCORER) -> torch.Tensor:
        """Scores (B, H, n) of a layer's tokens; ``case`` says in messages what is special here."""
        call = f"{_name(self.scorer)}.score"
        needs = {name: given[name] for name in self.scorer.needs}
        with calling(f"{call} for {case}", cure):
            scores = self.scorer.score(
                layer, given["keys"], given["values"], given["positions"], given["now"], **needs
            )
        scores = self.checked(f"{call} for {case}", layer, scores, given["positions"].shape)
        known = self.scorer.heads
        for head in range(self.kv_heads):
            outside = known is not None and (layer, head) not in known
            if outside and not scores[:, head].isnan().all():
                raise KvenvError(
                    f"{call} for {case} gave numbers for layer {layer}, KV head {head}, which is "
                    "not in its heads: fill them with NaN, or name the head in heads"
                )
        return scores

    def checked(self, call: str, layer: int, scores: object, shape: torch.Size) -> torch.Tensor:
        """What a call gave, if it is float32 of a shape, with numbers for the scorer's heads."""
        if not isinstance(scores, torch.Tensor):
            raise KvenvError(f"{call} gave a {type(scores).__name__}: return a torch tensor")
        if scores.shape != shape:
            raise KvenvError(
                f"{call} gave shape {tuple(scores.shape)}: return (batch, KV heads, tokens), here "
                f"{tuple(shape)}"
            )
        if scores.dtype != torch.float32:
            raise KvenvError(f"{call} gave {scores.dtype}: return torch.float32, e.g. .float()")
        if scores.requires_grad:
            raise KvenvError(
                f"{call} gave a tensor that requires a gradient: put @torch.no_grad() on score"
            )
        for head in range(self.kv_heads):
            known = self.scorer.heads is None or (layer, head) in self.scorer.heads
            if known and scores[:, head].isnan().any():
                raise KvenvError(f"{call} gave NaN in layer {layer}, KV head {head}: {GUARD}")
        return scores


def same(first: torch.Tensor, second: torch.Tensor, tolerance: float = 0.0) -> bool:
    """Whether scores are equal, NaN and infinities included, up to a share of the largest."""
    finite = first[first.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(first, second, rtol=0, atol=tolerance * scale, equal_nan=True)


def _name(scorer: Scorer) -> str:
    return type(scorer).__name__


def _check_attributes(scorer: Scorer) -> None:
    name = _name(scorer)
    if missing := [attribute for attribute in ATTRIBUTES if not hasattr(scorer, attribute)]:
        raise KvenvError(
            f"{name} is no scorer, it has no {', '.join(missing)}: define them, "
            "see kvenv.scorers.base.Scorer"
        )
    if not isinstance(scorer.needs, frozenset) or not scorer.needs <= NEEDS:
        raise KvenvError(
            f"{name}.needs is {scorer.needs!r}: give a frozenset out of {', '.join(sorted(NEEDS))}"
        )
    if scorer.heads is None:
        return
    if not isinstance(scorer.heads, frozenset) or not all(map(_is_head, scorer.heads)):
        raise KvenvError(
            f"{name}.heads is {scorer.heads!r}: give None for every head, or a frozenset of "
            "(layer, KV head) pairs"
        )


def _is_head(head: object) -> bool:
    if not isinstance(head, tuple) or len(head) != 2:
        return False
    return all(isinstance(number, int) and number >= 0 for number in head)


def _check_inputs(probe: Probe, layer: int) -> None:
    """Few tokens, views, extreme numbers and half precision."""
    probe.ask(layer, probe.inputs(1, 1), "one token")
    whole = probe.inputs(1, 16)
    views = {name: x[:, :, :11] if name in PER_TOKEN else x for name, x in whole.items()}
    views["positions"] = torch.arange(11).expand(views["positions"].shape)
    probe.ask(layer, views, "views of longer arrays", "use reshape, and no in-place operations")
    given = probe.inputs(3, 11)
    vectors = ("keys", "values", "queries")
    for factor, case in ((0.0, "keys and values of zeros"), (1e4, "keys and values near 10000")):
        probe.ask(layer, given | {name: given[name] * factor for name in vectors}, case)
    for dtype in (torch.float16, torch.bfloat16):
        half = given | {name: given[name].to(dtype) for name in vectors}
        full = given | {name: half[name].float() for name in vectors}
        cure = "score keys.float() and values.float()"
        scores = probe.ask(layer, half, f"{dtype} keys and values", cure)
        if not same(probe.ask(layer, full, "those in float32"), scores, 1e-4):
            raise KvenvError(
                f"{_name(probe.scorer)}.score gave other numbers for {dtype} keys and values than "
                f"for the same in float32: {cure}"
            )


def _check_independence(probe: Probe, layer: int, given: Inputs, scores: torch.Tensor) -> None:
    """Of the other rows of a batch."""
    for row in range(len(scores)):
        alone = {name: x[row : row + 1] for name, x in given.items()}
        if not same(scores[row : row + 1], probe.ask(layer, alone, "one row of a batch"), 1e-4):
            raise KvenvError(
                f"{_name(probe.scorer)}.score gave row {row} of a batch other scores than alone: "
                "let reductions leave the batch axis (0) out"
            )
