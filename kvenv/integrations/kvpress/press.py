"""A kvenv scorer as a press, true to its tokens' positions over repeated compressions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvenv.errors import KvenvError
from kvenv.identity import full_attention_layers
from kvenv.integrations.followed import ATTRIBUTE, Slots, part_of, remember
from kvenv.integrations.kvpress.package import kvpress
from kvenv.integrations.kvpress.step import SERVED, Step, look, masked_slots
from kvenv.rules import ranking
from kvenv.scorers import NetworkScorer, Scorer, load_scorer

FLOAT32 = torch.finfo(torch.float32)


@dataclass
class KvenvPress(kvpress.ScorerPress):
    """A press that keeps the tokens that a kvenv scorer ranks first.

    It works wherever a ScorerPress does. Beside each head's slots it keeps the true positions of
    their tokens, which kvpress does not, and follows them over every compression: at prefill, in
    a DecodingPress, over several turns, and from one KvenvPress to another on the same cache.
    Slots stay in the order of the text. A position is the token's number in the text, whatever
    ``position_ids`` said afterwards.

    Wrappers that only ask for scores and cut by themselves work while positions can be told:
    AdaKVPress (masked slots stay masked), KeyRerotationPress and ChunkPress at the first
    compression. Where they cannot (BlockPress; a second compression after another press's cut),
    a scorer that looks at positions gets an error, and others go on. AdaKVPress compares scores
    between heads, and those of a per-head network share no scale.

    Sliding-window layers keep their own rule. Rows of a batch must not be padded.

    Args:
        compression_ratio: share of the tokens that goes.
        scorer: a kvenv scorer, or what `kvenv.scorers.load_scorer` takes. ``queries`` and, at the
            first compression, ``query_mean`` and ``query_cov`` are served to it, and
            ``past_attention`` with ``attn_implementation="eager"``.
        fallback: scores the heads that ``scorer`` does not know.
        sinks: the first tokens, kept whatever their score; 4 in an `EvictionCache`.
        recent: the last tokens, kept likewise; 16 in an `EvictionCache`.
        queries: most of the last queries that a scorer is given; 64 are what traces have.

    Raises:
        KvenvError: if an argument cannot be used; while the model runs, if the scorer is another
            model's, lacks heads, gives NaN, or needs what is not to be had.

    Example:
        ``with KvenvPress.from_pretrained("kvp-smollm2-135m", 0.5)(model): model(ids, ...)``
    """

    scorer: Scorer | str | Path | None = None
    fallback: Scorer | str | Path | None = None
    sinks: int = 0
    recent: int = 0
    queries: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.compression_ratio < 1:
            raise KvenvError(
                f"compression_ratio is {self.compression_ratio}: give the share of tokens to "
                "drop, from 0 to below 1"
            )
        for name, least in (("sinks", 0), ("recent", 0), ("queries", 1)):
            if getattr(self, name) < least:
                raise KvenvError(f"{name} is {getattr(self, name)}: give at least {least}")
        if self.scorer is None:
            raise KvenvError("no scorer given: KvenvPress(scorer=...) or from_pretrained(NAME)")
        given = [one for one in (self.scorer, self.fallback) if one is not None]
        self._scorers = [_scorer(one) for one in given]

    @classmethod
    def from_pretrained(
        cls, source: str | Path, compression_ratio: float = 0.5, **options: Any
    ) -> KvenvPress:
        """A press from an exported agent.

        Args:
            source: a bundle's folder or hub id, a shipped agent's or a heuristic's name, or the
                path of an agent file.
            compression_ratio: share of the tokens that goes.
            **options: the other arguments of `KvenvPress`.
        """
        return cls(compression_ratio, scorer=source, **options)

    def post_init_from_model(self, model: Any) -> None:
        """Refuse a model that the scorers were not trained on; kvpress calls this."""
        if not full_attention_layers(model.config):
            raise KvenvError(
                f"model type {model.config.model_type} has no full-attention layer, so there is "
                "nothing to compress: run it without a press"
            )
        for one in self._scorers:
            if (check_model := getattr(one, "check_model", None)) is not None:
                check_model(model)

    def compress(
        self,
        module: Any,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Keep the best tokens of each head, in the order of the text; see ScorerPress."""
        if module.layer_idx not in full_attention_layers(module.config):
            return keys, values
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        with torch.no_grad():
            slots = look(layer, module, keys, kwargs)
            if self.compression_ratio == 0:
                return keys, values
            masked = masked_slots(module, keys)
            step = Step(module, hidden_states, keys, values, attentions, kwargs, slots)
            n_kept = kvpress.utils.compute_n_kept(keys.shape[2], self.compression_ratio)
            kept = ranking(self._worth(step, masked))[..., :n_kept].sort(dim=-1).values
            positions = None if slots.positions is None else slots.positions.gather(-1, kept)
        keys, values = _gather(keys, kept), _gather(values, kept)
        remember(layer, Slots.of(keys, positions, slots.seen))
        if masked is not None:
            module.masked_key_indices = masked.gather(-1, kept).nonzero(as_tuple=True)
        return keys, values

    @torch.no_grad()
    def score(
        self,
        module: Any,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Scores (B, H, n) float32 for presses that cut by themselves; see ScorerPress.

        Args:
            module: the attention module.
            hidden_states: (B, q, hidden), of the last of the tokens.
            keys: (B, H, n, d), all of the layer's or a run of its slots.
            values: (B, H, n, d).
            attentions: (B, Hq, q, n) or None.
            kwargs: of the attention's forward pass.
        """
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        start = part_of(layer.keys, keys)
        if start is None:  # copies of some slots: no telling which
            lost = Slots.of(keys, None, 0)
            remember(layer, lost)
            step = Step(module, hidden_states, keys, values, attentions, kwargs, lost)
            return self._worth(step, None)
        slots, masked = look(layer, module, layer.keys, kwargs), masked_slots(module, layer.keys)
        step = Step(module, hidden_states, keys, values, attentions, kwargs, slots, start)
        return self._worth(step, None if masked is None else step.own(masked))

    @staticmethod
    def positions(cache: Any, layer: int) -> Tensor:
        """True positions of the tokens that a compressed cache holds.

        Args:
            cache: the cache.
            layer: the model's own layer number.

        Returns:
            (B, H, n) int64, slot by slot.

        Raises:
            KvenvError: if no KvenvPress has seen the layer, or its slots were moved since.
        """
        held = cache.layers[layer]
        slots = getattr(held, ATTRIBUTE, None)
        now = None if slots is None else slots.continued(held.keys)
        if now is None or now.positions is None:
            raise KvenvError(
                f"the positions in layer {layer} are not known: only a KvenvPress keeps them, "
                "while no other press moves the slots"
            )
        return now.positions

    def _worth(self, step: Step, masked: Tensor | None) -> Tensor:
        """Scores at decision time (B, H, n) float32: age added, sinks and recent at +inf.

        Slots that another press masked are at -inf: their keys are no longer their own.
        """
        layer, keys = step.module.layer_idx, step.keys
        missing = [True] * keys.shape[1]
        worth = torch.full(keys.shape[:3], torch.nan, device=keys.device)
        for one in self._scorers:
            knows = [one.heads is None or (layer, h) in one.heads for h in range(keys.shape[1])]
            if own := [h for h, lacks in enumerate(missing) if lacks and knows[h]]:
                worth[:, own] = self._ask(one, step)[:, own]
            missing = [lacks and not known for lacks, known in zip(missing, knows, strict=True)]
        if any(missing):
            raise KvenvError(
                f"no scores for layer {layer}, KV heads {[h for h, x in enumerate(missing) if x]}: "
                "pass fallback= a scorer that has them, such as 'knorm'"
            )
        if bool(worth.isnan().any()):
            head = int(worth.isnan().any(-1).any(0).nonzero()[0])
            raise KvenvError(
                f"the scores of layer {layer}, KV head {head} have NaN: check the model's keys and "
                "values for overflow (run it in bfloat16 or float32) and the scorer's weights"
            )
        worth = worth.clamp(FLOAT32.min, FLOAT32.max)
        if self.sinks:
            worth = worth.masked_fill(step.positions < self.sinks, torch.inf)
        if self.recent:
            worth = worth.masked_fill(step.age < self.recent, torch.inf)
        return worth if masked is None else worth.masked_fill(masked, -torch.inf)

    def _ask(self, scorer: Scorer, step: Step) -> Tensor:
        layer = step.module.layer_idx
        needs = step.needs(scorer.needs, self.queries)
        scores = scorer.score(layer, step.keys, step.values, step.positions, step.now, **needs)
        if scores.shape != step.keys.shape[:3]:
            raise KvenvError(
                f"{type(scorer).__name__}.score gave shape {tuple(scores.shape)} in layer {layer}: "
                f"it must be (batch, KV heads, tokens) = {tuple(step.keys.shape[:3])}"
            )
        return scores.to(step.keys.device, torch.float32)


def _scorer(given: Scorer | str | Path) -> Scorer:
    """A scorer, or the one of a name, a bundle or an agent's file."""
    if isinstance(given, (str, Path)):
        name = str(given)
        hub = name.count("/") == 1 and not name.endswith(".py") and not Path(name).exists()
        given = NetworkScorer.from_pretrained(name) if hub else load_scorer(given)
    if not isinstance(given, Scorer):
        raise KvenvError(
            f"{given!r} is not a scorer: give an agent's scorer (needs, heads and "
            "score), or its name"
        )
    if unknown := given.needs - SERVED:
        raise KvenvError(
            f"{type(given).__name__} needs {', '.join(sorted(unknown))}, which a press cannot "
            f"give: use a scorer that needs at most {', '.join(sorted(SERVED))}"
        )
    return given


def _gather(states: Tensor, kept: Tensor) -> Tensor:
    return states.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, states.shape[-1]))
