"""The benchmarks' metrics: values worked out by hand, and what holds for any text."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvenv.errors import KvenvError
from kvenv.evaluation.metrics import METRICS, classification, common_subsequence, score

ANSWERS = st.lists(st.text(max_size=30), min_size=1, max_size=3)
WORDS = st.lists(st.sampled_from("the red fox 12 7 yes no".split()), max_size=12).map(" ".join)


@pytest.mark.parametrize(
    ("metric", "answers", "text", "expected"),
    [
        ("exact_match", ["The Red Fox"], " red fox. ", 1),
        ("exact_match", ["red fox", "blue"], "Blue!", 1),
        ("exact_match", ["red fox"], "red foxes", 0),
        # 2 words of 4 said and 3 right ones are common: 2 * 2 / 7.
        ("qa_f1", ["red fox jumps"], "A red, old Fox ran", 4 / 7),
        ("qa_f1", ["blue", "red fox"], "red", 2 / 3),
        ("qa_f1", ["red red fox"], "red red red", 2 / 3),
        ("qa_f1", ["fox"], "hen", 0),
        ("qa_f1", ["the"], "a an", 1),  # SQuAD 2.0: nothing against nothing
        ("qa_f1", ["the"], "fox", 0),
        ("qa_f1", ["it\u2019s here"], "it\u2019s", 2 / 3),
        # Three of four characters each, with the comma left out.
        ("qa_f1", ["红色狐狸"], "红色\uff0c狗狸", 3 / 4),
        # "police the gunman" is common, 3 of 4 words each; then "the gunman".
        ("rouge_l", ["police killed the gunman"], "police kill the gunman", 3 / 4),
        ("rouge_l", ["police killed the gunman"], "the gunman kill police", 2 / 4),
        ("rouge_l", ["Police, killed."], "killed police", 1 / 2),
        ("rouge_l", ["one two three"], "one", 1 / 2),
        ("rouge_l", ["snake_case"], "snake case", 1),
        ("rouge_l", ["..."], "...", 0),
        ("classification", ["Location"], "It is a Location.", 1),
        ("classification", ["Location"], "location", 0),
        ("count", ["12"], "12", 1),
        ("count", ["12"], "12 or 13, or 12", 2 / 3),
        ("count", ["12"], "112", 0),
        ("count", ["12"], "twelve", 0),
        ("retrieval", ["Paragraph 3"], "Paragraph 3", 1),
        ("retrieval", ["Paragraph 3"], "3, maybe 4", 1 / 2),
        ("retrieval", ["段落7"], "段落7", 1),
        ("retrieval", ["Paragraph 3"], "Paragraph 30", 0),
        ("code_similarity", ["return x"], "return x\nreturn y", 1),
        ("code_similarity", ["return x"], "\n```python\n# add\n// add\nreturn x", 1),
        # difflib: 2 * len("return ") / (8 + 8) = 0.875, in whole percents (87.5 to even).
        ("code_similarity", ["return x"], "return y", 0.88),
        ("code_similarity", ["return x"], "", 0),
    ],
)
def test_values_by_hand(metric: str, answers: list[str], text: str, expected: float) -> None:
    assert METRICS[metric](answers, text) == pytest.approx(expected, abs=1e-12)


def test_classification_shares_the_score_among_the_classes_named() -> None:
    classes = ["Person", "Location", "Other location", "Other"]
    assert classification(["Person"], "Person or Location", classes) == 1 / 2
    assert classification(["Person"], "Location", classes) == 0
    # "Other" is part of the right class, so naming that names it too.
    assert classification(["Other location"], "Other location", classes) == 1
    assert classification(["Other"], "Other location", classes) == 1 / 2


def test_score_follows_the_episode_s_metadata() -> None:
    facts = {"metric": "classification", "answers": ["A"], "classes": ["A", "B"]}
    assert score(facts, "A\nB") == 1 / 2
    assert score({**facts, "first_line": True}, "\nA\nB") == 1
    assert score({"metric": "count", "answers": ["3"], "first_line": True}, "3\n4") == 1
    assert score({"task": "cwe", "answers": ["red", "blue"]}, "Red") == 1 / 2
    with pytest.raises(KvenvError, match="metric 'bleu' is unknown: choose from exact_match"):
        score({"metric": "bleu", "answers": ["x"]}, "x")


@pytest.mark.parametrize("metric", METRICS)
def test_no_answers_are_refused(metric: str) -> None:
    with pytest.raises(KvenvError, match=r"answers are \[\]"):
        METRICS[metric]([], "x")
    with pytest.raises(KvenvError, match="answers are 'ab'"):
        METRICS[metric]("ab", "x")


@pytest.mark.parametrize("metric", METRICS)
@given(ANSWERS, st.text(max_size=60) | WORDS)
def test_scores_lie_between_0_and_1(metric: str, answers: list[str], text: str) -> None:
    assert 0 <= METRICS[metric](answers, text) <= 1


@pytest.mark.parametrize("metric", METRICS)
@given(ANSWERS, st.text(max_size=20), WORDS)
def test_one_more_answer_never_lowers_the_score(
    metric: str, answers: list[str], other: str, text: str
) -> None:
    assert METRICS[metric]([*answers, other], text) >= METRICS[metric](answers, text)


@pytest.mark.parametrize("metric", ["exact_match", "qa_f1", "classification"])
@given(st.text())
def test_any_text_matches_itself(metric: str, text: str) -> None:
    assert METRICS[metric]([text], text) == 1


@pytest.mark.parametrize("metric", METRICS)
@given(st.from_regex(r"\A[a-z]+( [a-z]+){0,9} [0-9]+\Z"))
def test_words_with_a_number_match_themselves(metric: str, text: str) -> None:
    answer = text.split()[-1] if metric == "count" else text
    assert METRICS[metric]([answer], text) == 1


@pytest.mark.parametrize("metric", ["exact_match", "qa_f1", "rouge_l"])
@given(st.text() | WORDS, st.text() | WORDS)
def test_text_and_answer_may_change_places(metric: str, first: str, second: str) -> None:
    assert math.isclose(METRICS[metric]([first], second), METRICS[metric]([second], first))


@given(WORDS.map(str.split), WORDS.map(str.split))
def test_common_subsequence_is_the_table_s(first: list[str], second: list[str]) -> None:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
            )
    assert common_subsequence(first, second) == table[-1][-1]
