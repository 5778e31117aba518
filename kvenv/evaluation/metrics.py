"""How right an answer is: the metrics of the public benchmarks, each in [0, 1].

Every metric takes the right answers, of which the best match counts, and a model's text. They are
LongBench's (Bai et al. 2024, arXiv 2308.14508) but for what their docstrings say, and need no
package: where LongBench cuts Chinese into words by a dictionary, every Chinese character is a word.
"""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from kvenv.errors import KvenvError
from kvenv.recording import ruler
from kvenv.recording.tokens import check_choice

# Words, as spaces or as all other signs part them; every Chinese character is one of its own.
_CHINESE = "\u3400-\u9fff"
_SPACED = re.compile(rf"[{_CHINESE}]|[^\s{_CHINESE}]+")
_PLAIN = re.compile(rf"[{_CHINESE}]|[^\W_{_CHINESE}]+")
# ASCII's punctuation, and the full-width and ideographic kinds of it.
_PUNCTUATION = re.compile(
    f"[{re.escape(string.punctuation)}\u3000-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]"
)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def exact_match(answers: Sequence[str], text: str) -> float:
    """1 if the text is one of the answers, after SQuAD's normalisation (see `qa_f1`)."""
    return float(any(_normal(answer) == _normal(text) for answer in _some(answers)))


def qa_f1(answers: Sequence[str], text: str) -> float:
    """F1 between the words of text and answer, as SQuAD counts them.

    Case, punctuation, articles and spacing do not count. Where nothing else is left of one of the
    two, the score is 1 if nothing is left of the other either, else 0 (SQuAD 2.0's rule).
    """
    said = _SPACED.findall(_normal(text))

    def one(answer: str) -> float:
        right = _SPACED.findall(_normal(answer))
        if not said or not right:
            return float(said == right)
        return 2 * (Counter(said) & Counter(right)).total() / (len(said) + len(right))

    return max(map(one, _some(answers)))


def rouge_l(answers: Sequence[str], text: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words (Lin 2004, sentence level).

    Words are runs of letters and digits in lower case, not stemmed, as the rouge-score package
    takes them; LongBench's rouge package counts a repeated word once instead. 0 without any words.
    """
    said = _PLAIN.findall(text.lower())

    def one(answer: str) -> float:
        right = _PLAIN.findall(answer.lower())
        return 2 * common_subsequence(said, right) / max(1, len(said) + len(right))

    return max(map(one, _some(answers)))


def classification(answers: Sequence[str], text: str, classes: Sequence[str] = ()) -> float:
    """1 over the number of classes that the text names, if the right one is among them, else 0.

    A class whose name is part of the right one's does not count beside it. LongBench means to fall
    back on the class that looks most alike where none is named, but its code never gets there.

    Args:
        answers: names of right classes.
        text: the model's.
        classes: the names of all classes; without them, those in ``answers``.
    """

    def one(answer: str) -> float:
        named = {c for c in (*classes, answer) if c in text and (c == answer or c not in answer)}
        return 1 / len(named) if answer in named else 0.0

    return max(map(one, _some(answers)))


def count(answers: Sequence[str], text: str) -> float:
    """The share of the numbers in the text that are the answer; 0 without any number."""
    numbers = re.findall(r"\d+", text)
    return max(numbers.count(answer.strip()) / max(1, len(numbers)) for answer in _some(answers))


def retrieval(answers: Sequence[str], text: str) -> float:
    """`count` of the number in an answer such as "Paragraph 12"."""
    found = [re.search(r"\d+", answer) for answer in _some(answers)]
    return count([match.group() if match else answers[i] for i, match in enumerate(found)], text)


def code_similarity(answers: Sequence[str], text: str) -> float:
    """How alike the answer is to the text's first line that is neither a comment nor a fence.

    That is the first line without a backtick, # or //. The likeness is difflib's ratio in whole
    percents, which is what LongBench's ``fuzz.ratio`` gives without its optional C library.
    """
    lines = text.lstrip("\n").split("\n")
    line = next((x for x in lines if not re.search(r"`|#|//", x)), "")

    def one(answer: str) -> float:
        if not line or not answer:
            return 0.0
        return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100

    return max(map(one, _some(answers)))


METRICS: dict[str, Callable[[Sequence[str], str], float]] = {
    "exact_match": exact_match,
    "qa_f1": qa_f1,
    "rouge_l": rouge_l,
    "classification": classification,
    "retrieval": retrieval,
    "count": count,
    "code_similarity": code_similarity,
}
"""By the name that a recorded episode's metadata give: (answers, text) -> score in [0, 1]."""


def score(facts: Mapping[str, Any], text: str) -> float:
    """How right a model's text is for a recorded episode, in [0, 1].

    Args:
        facts: the episode's metadata: answers, and metric (one of `METRICS`; RULER's episodes have
            only a task); if given, classes (see `classification`) and first_line: whether only
            the text's first line that is not empty counts.
        text: what the model answered.

    Raises:
        KvenvError: for an unknown metric, or no answers.
    """
    answers = [str(answer) for answer in facts.get("answers", ())]
    if "metric" not in facts and "task" in facts:
        return ruler.score(answers, text, str(facts["task"]))
    name = str(facts.get("metric"))
    check_choice("metric", name, tuple(METRICS))
    if facts.get("first_line"):
        text = text.lstrip("\n").split("\n")[0]
    if name == "classification":
        return classification(answers, text, facts.get("classes", ()))
    return METRICS[name](answers, text)


def common_subsequence(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The length of the longest common subsequence.

    A row of the usual table is one integer, in which bit i is 0 where the length grows at element
    i (Crochemore et al. 2001), so that a page against a page takes a millisecond or so.
    """
    places: defaultdict[Any, int] = defaultdict(int)
    for i, item in enumerate(first):
        places[item] |= 1 << i
    every = (1 << len(first)) - 1
    row = every
    for item in second:
        matches = row & places.get(item, 0)
        row = ((row + matches) | (row - matches)) & every
    return len(first) - row.bit_count()


def _some(answers: Sequence[str]) -> Sequence[str]:
    if isinstance(answers, str) or not answers:
        raise KvenvError(f"answers are {answers!r}: give a list of at least one")
    return answers


def _normal(text: str) -> str:
    """SQuAD's normalisation: lower case, without punctuation, articles and extra spaces."""
    return " ".join(_ARTICLES.sub(" ", _PUNCTUATION.sub("", text.lower())).split())
