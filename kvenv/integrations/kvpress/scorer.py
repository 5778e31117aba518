"""A press of kvpress as a kvenv scorer: what it reads of a model is made from what scorers get."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor

from kvenv.errors import KvenvError
from kvenv.integrations.kvpress.package import kvpress
from kvenv.scorers.attention import window_attention
from kvenv.scorers.base import Head


def scorer_from_press(press: Any, *, needs: Iterable[str] | None = None) -> PressScorer:
    """Any press that scores, as a kvenv scorer: for an `EvictionCache`, evaluation or training.

    Presses of keys and values alone work as they are: Knorm, KeyDiff, LagKV, CUR, Random.
    SnapKVPress and TOVAPress are given the attention of ``queries``, ObservedAttentionPress
    ``past_attention``. A press that reads weights, hidden states or the forward pass (expected
    attention, Compactor, CriticalKV) raises an error when asked. One whose scores hang on its
    compression_ratio (StreamingLLM) goes by its own, not by the cache's budget.

    Args:
        press: an instance; its compression_ratio is not otherwise used.
        needs: what the ``attentions`` of a press of your own are made from, {"queries"} or
            {"past_attention"}; None: as said above.

    Raises:
        KvenvError: if it is no ScorerPress, or ``needs`` are others.
    """
    if not isinstance(press, kvpress.ScorerPress) or isinstance(press, type):
        raise KvenvError(f"{press!r} is no ScorerPress: give an instance of one, or what it wraps")
    if needs is None:
        last_queries = isinstance(press, (kvpress.SnapKVPress, kvpress.TOVAPress))
        observed = isinstance(press, kvpress.ObservedAttentionPress)
        needs = ["queries"] if last_queries else ["past_attention"] if observed else []
    needs = frozenset(needs)
    if needs not in (frozenset(), {"queries"}, {"past_attention"}):
        raise KvenvError(
            f"needs is {sorted(needs)}: attentions are made from queries or from past_attention"
        )
    window = 1 if isinstance(press, kvpress.TOVAPress) else getattr(press, "window_size", 1)
    return PressScorer(press, needs, window)


class PressScorer:
    """A `Scorer` that asks a press; see `scorer_from_press`.

    Args:
        press: what scores, with kvpress's ``score``.
        needs: what its ``attentions`` are made from: nothing (they are None), ``queries`` (those
            of the last queries) or ``past_attention`` (one row, the sum over all queries).
        window: queries that it asks for.
    """

    heads: frozenset[Head] | None = None

    def __init__(self, press: Any, needs: frozenset[str], window: int) -> None:
        self.needs, self._press, self._window = needs, press, window

    def __repr__(self) -> str:
        return f"PressScorer({self._press!r})"

    @torch.no_grad()
    def score(
        self,
        layer: int,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        now: Tensor,
        **needs: Tensor,
    ) -> Tensor:
        """(B, H, n) float32; see `kvenv.scorers.base.Scorer.score`.

        Raises:
            KvenvError: if the press refuses these tokens, or reads what no scorer is given.
        """
        keys, values = keys.float(), values.float()
        attentions, groups = None, 1
        if "queries" in self.needs:
            queries = needs["queries"]
            if queries.shape[2] < self._window:
                raise KvenvError(
                    f"{self._press!r} asks for {self._window} queries and there are "
                    f"{queries.shape[2]}: give it a smaller window"
                )
            attentions, _ = window_attention(queries, keys, positions, self._window)
            groups = attentions.shape[2]
            attentions = attentions.flatten(1, 2)
        elif "past_attention" in self.needs:
            attentions = needs["past_attention"].float().unsqueeze(2)
        try:
            scores = self._press.score(
                module=_module(layer, keys, groups if self.needs else None),
                hidden_states=_Withheld("hidden states", shape=(len(keys), keys.shape[2], 0)),
                keys=keys,
                values=values,
                attentions=attentions,
                kwargs=_Kwargs(),
            )
        except AssertionError as error:
            raise KvenvError(
                f"{self._press!r} refuses {keys.shape[2]} tokens: {error or 'it does not say why'}"
            ) from error
        return scores.float()


def _refuse(what: str) -> NoReturn:
    raise KvenvError(
        f"this press reads {what} of the model, which no scorer is given: use it in kvpress, or "
        "kvenv's own agent of that method"
    )


class _Withheld:
    """Something of the model that only its shape is known of."""

    def __init__(self, what: str, **known: Any) -> None:
        self.__dict__.update(known, _what=what)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what python itself asks for, such as by copy
            raise AttributeError(name)
        _refuse(f"{self._what} ({name})")

    def __getitem__(self, index: Any) -> NoReturn:
        _refuse(self._what)


class _Kwargs(dict[str, Any]):
    def __missing__(self, name: str) -> NoReturn:
        _refuse(f"the attention's {name}")


def _module(layer: int, keys: Tensor, groups: int | None) -> _Withheld:
    """What of an attention module the keys (B, H, n, d) tell."""
    heads = keys.shape[1]
    known: dict[str, Any] = {"layer_idx": layer, "head_dim": keys.shape[-1]}
    if groups is not None:
        known["num_key_value_groups"] = groups
        known["config"] = SimpleNamespace(
            num_attention_heads=heads * groups, num_key_value_heads=heads
        )
    return _Withheld("the attention module", **known)
