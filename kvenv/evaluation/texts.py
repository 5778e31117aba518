"""A prompt's text, token by token, with the rank that every agent gives each token."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kvenv import rules as ut
from kvenv.errors import KvenvError
from kvenv.evaluation.retention import score_prompt, shared_heads
from kvenv.identity import tokenizer_hash
from kvenv.scorers.base import Head, Scorer
from kvenv.trace import TraceSet

LONGEST = 1 << 16
"""Tokens whose ranks fit in 16 bits."""


def token_view(
    traces: TraceSet,
    index: int,
    scorers: Mapping[str, Scorer],
    tokenizer: PreTrainedTokenizerBase,
    heads: Sequence[Head] | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Which tokens of an episode's prompt survive at every budget, JSON-safe.

    Args:
        traces: where the episode is.
        index: which one.
        scorers: name -> scorer.
        tokenizer: that of the recorded model.
        heads: restrict to these; the H of them are those that `measure` would measure.
        device: where the scores are computed.

    Returns:
        "document"; "tokens", n strings that joined are the prompt (see `pieces`); and "agents",
        name -> {"ranks": base64 of little-endian uint16 (H, n) in C order}. Rank 0 is the best: a
        token is among the first b of the ranking if its rank is below b.

    Raises:
        KvenvError: on another tokenizer, a prompt of more than 65,536 tokens, or scorers that
            cannot score the heads.
    """
    info = traces.info(index)
    if tokenizer_hash(tokenizer) != traces.model.tokenizer:
        raise KvenvError(
            f"{traces.path} was recorded with another tokenizer: give that of {traces.model.id}"
        )
    if info.n > LONGEST:
        raise KvenvError(
            f"episode {index} of {traces.path} has {info.n} prompt tokens: a token view takes at "
            f"most {LONGEST}, give another episode"
        )
    chosen = shared_heads([traces], scorers, heads)
    _, scores = score_prompt(traces, index, scorers, chosen, device)
    return {
        "document": info.document,
        "tokens": pieces(traces.tokens(index)[: info.n].tolist(), tokenizer),
        "agents": {name: {"ranks": _encoded(given)} for name, given in scores.items()},
    }


def pieces(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds to the text, so that the pieces joined are the text.

    A character made of several tokens belongs to the last of them, and the others are "". It takes
    n decodings of up to n tokens: about a second for 3,000.

    Args:
        ids: n token ids.
        tokenizer: decodes them.

    Returns:
        n strings; joined they are what the tokenizer decodes all ids to, special tokens included.
    """

    def text(count: int) -> str:
        return str(tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False))

    # Half a character decodes to something else than the whole one will, so a token adds only
    # what the text of all tokens goes on to confirm.
    whole, end, parts = text(len(ids)), 0, []
    for count in range(1, len(ids) + 1):
        seen, begin = text(count), end
        if seen.startswith(whole[:begin]):
            limit = min(len(seen), len(whole))
            while end < limit and seen[end] == whole[end]:
                end += 1
        parts.append(whole[begin:end])
    return parts


def _encoded(scores: torch.Tensor) -> str:
    """The ranks of scores (H, n) as base64 of little-endian uint16."""
    order = ut.ranking(scores)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(-1, order, places)
    return base64.b64encode(ranks.cpu().numpy().astype("<u2").tobytes()).decode("ascii")
