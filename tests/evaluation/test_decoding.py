"""Decoding a prompt: with which budget, from where, and what it says it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvenv import models
from kvenv.cache import EvictionCache
from kvenv.errors import KvenvError
from kvenv.evaluation.decoding import Question, answer, encode, from_episode
from kvenv.recording import recorder
from kvenv.recording.workload import Sample
from kvenv.scorers import load_scorer
from kvenv.trace import TraceSet

PROMPT = torch.randint(256, (1, 60), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pair(checkpoints) -> tuple[Any, Any]:
    return models.load(str(checkpoints(0)))


def bounded(pair, budget: int | float, **options: Any) -> EvictionCache:
    return EvictionCache(pair[0], load_scorer("knorm"), budget=budget, **options)


def test_some_tokens_must_be_asked_for(pair) -> None:
    with pytest.raises(KvenvError, match="max-new-tokens is 0"):
        answer(*pair, Question(PROMPT), max_new_tokens=0)


def test_an_ample_budget_decodes_what_the_full_cache_does(pair) -> None:
    full = answer(*pair, Question(PROMPT), max_new_tokens=12)
    ample = answer(*pair, Question(PROMPT), bounded(pair, 1000), max_new_tokens=12)
    assert ample.text == full.text
    assert full.seen == full.kept == ample.seen == ample.kept == 60 + 12 - 1
    # 2 layers of keys and values, 2 heads of 8 float32 numbers.
    assert full.nbytes == 71 * 2 * 2 * 2 * 8 * 4


@pytest.mark.parametrize("budget", [24, 0.4])
def test_a_bounded_cache_holds_no_more_than_its_budget(pair, budget: int | float) -> None:
    cache = bounded(pair, budget)
    result = answer(*pair, Question(PROMPT), cache, max_new_tokens=9)
    assert cache.budget == 24
    assert result.kept <= 24 < result.seen == 68
    assert result.rate > 0


def test_a_cut_evicts_before_the_rest_is_seen(pair) -> None:
    """The rest meets a cache of the cut's survivors; a full cache does not notice a cut."""
    questions = Question(PROMPT), Question(PROMPT, cut=50)
    full = [answer(*pair, one, max_new_tokens=16).text for one in questions]
    assert full[0] == full[1]
    scorer = load_scorer("random")
    small = [
        answer(
            *(*pair, one, EvictionCache(pair[0], scorer, budget=8, sinks=1, recent=2)),
            max_new_tokens=16,
        )
        for one in questions
    ]
    assert small[0].text != small[1].text


def test_sampling_follows_its_seed(pair) -> None:
    texts = [
        answer(
            *(*pair, Question(PROMPT), bounded(pair, 32)), sample=True, seed=seed, max_new_tokens=16
        ).text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_streaming_prints_the_text(pair, capsys) -> None:
    result = answer(*pair, Question(PROMPT), max_new_tokens=8, stream=True)
    assert capsys.readouterr().out.strip() == result.text.strip()


def test_text_goes_through_the_chat_template_where_there_is_one(checkpoints) -> None:
    tokenizer = models.load_tokenizer(str(checkpoints(0)))
    assert tokenizer.decode(encode("Hello", tokenizer).tokens[0]) == "Hello"
    tokenizer.chat_template = "<{{ messages[0].role }}>{{ messages[0].content }}</>"
    assert tokenizer.decode(encode("Hello", tokenizer).tokens[0]) == "<user>Hello</>"
    assert tokenizer.decode(encode("Hello", tokenizer, chat=False).tokens[0]) == "Hello"
    with pytest.raises(KvenvError, match="prompt is empty"):
        encode("", tokenizer, chat=False)


class Asked:
    """Every other episode asks its question only after the prompt."""

    def sample(self, index, *, tokenizer, rng, prompt_tokens, future_tokens, seed):
        ids = list(range(prompt_tokens + future_tokens))
        facts = {
            "task": "niah_single",
            "answers": ["7", "8"],
            "question": "[which] numbers?",
            "question_tokens": 3,
            "prompting": "agnostic" if index else "aware",
        }
        return Sample(ids[:prompt_tokens], ids[prompt_tokens:], "document", facts)


@pytest.fixture(scope="module")
def asked(pair, tmp_path_factory: pytest.TempPathFactory) -> TraceSet:
    out: Path = tmp_path_factory.mktemp("asked") / "set"
    return recorder.record(
        *pair, Asked(), out, episodes=2, prompt_tokens=30, future_tokens=8, name="asked"
    )


def test_an_episode_s_prompt(asked, pair) -> None:
    model, _ = pair
    aware = from_episode(asked, 0, model)
    assert aware.tokens.tolist() == [list(range(30))]
    assert (aware.cut, aware.facts) == (0, asked.info(0).metadata)
    assert aware.note == (
        "asked episode 0, 30 prompt tokens; question: [which] numbers?; expected: 7, 8"
    )
    agnostic = from_episode(asked, 1, model)
    assert agnostic.tokens.tolist() == [list(range(33))]
    assert agnostic.cut == 30
    assert agnostic.judge("it is 7 and 9") == "50% right"
    assert Question(PROMPT).judge("anything") == "-"


def test_an_answer_is_judged_by_its_episode_s_own_metric() -> None:
    facts = {"answers": ["the red house", "a barn"], "metric": "qa_f1"}
    assert Question(PROMPT, facts=facts).judge("Red barn") == "67% right"
    assert Question(PROMPT, facts={**facts, "metric": "exact_match"}).judge("Barn.") == "100% right"
    with pytest.raises(KvenvError, match="metric 'luck'"):
        Question(PROMPT, facts={**facts, "metric": "luck"}).judge("Barn.")


def test_an_episode_of_another_model(asked, checkpoints) -> None:
    other, _ = models.load(str(checkpoints(1)))
    with pytest.raises(KvenvError, match=f"recorded from {checkpoints(0)}, not {checkpoints(1)}"):
        from_episode(asked, 0, other)
