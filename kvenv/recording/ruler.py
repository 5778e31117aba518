"""RULER's retrieval, tracing and aggregation tasks (Hsieh et al. 2024, arXiv 2404.06654).

The definitions are RULER's, section 3 and its default sizes; wording, words and filler are kvenv's
own. Not here: the question-answering tasks, which need downloaded text, and the worked example that
RULER puts before vt and cwe, which would take most of a short prompt.
"""

from __future__ import annotations

import math
import string
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from kvenv.errors import KvenvError
from kvenv.recording import haystack
from kvenv.recording.tokens import check_choice

NIAH = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery")
"""Needle-in-a-haystack tasks: find what the text says of one key or of several."""

TASKS = (*NIAH, "vt", "cwe", "fwe")
"""All tasks: the needles, variable tracking, common words and frequent words."""

Filler = Literal["auto", "noise", "essay", "needles"]
Kind = Literal["words", "numbers", "uuids"]

_NOUN = {"words": "word", "numbers": "number", "uuids": "uuid"}
_LONG_PROMPT = 4096  # from here on RULER repeats the words of cwe 30 and 3 times, below 6 and 1
_ZETA_2 = math.pi**2 / 6


@dataclass(kw_only=True)
class Options:
    """How large and of what kind a task is; the defaults are RULER's.

    Args:
        haystack: what surrounds the needles: ``noise`` (one passage repeated), ``essay`` (varied
            sentences), ``needles`` (other needles: RULER's multikey_2 and _3); ``auto`` takes
            noise for niah_single, essay for the other needle tasks. vt always has noise.
        key_type: what a needle's key is.
        value_type: what a needle's value is.
        needle_keys: needles with different keys in niah_multikey, of which one is asked for.
        needle_values: values of the one key of niah_multivalue.
        needle_queries: keys asked for in niah_multiquery.
        chains: chains of variables in vt, of which one is asked for.
        hops: assignments after the first in a chain.
        common_words: words to name in cwe.
    """

    haystack: Filler = "auto"
    key_type: Kind = "words"
    value_type: Kind = "numbers"
    needle_keys: int = 4
    needle_values: int = 4
    needle_queries: int = 4
    chains: int = 1
    hops: int = 4
    common_words: int = 10

    def __post_init__(self) -> None:
        check_choice("haystack", self.haystack, get_args(Filler))
        check_choice("key_type", self.key_type, get_args(Kind))
        check_choice("value_type", self.value_type, get_args(Kind))
        for name in (
            "needle_keys",
            "needle_values",
            "needle_queries",
            "chains",
            "hops",
            "common_words",
        ):
            if not 1 <= getattr(self, name) <= 1000:
                raise KvenvError(f"{name} is {getattr(self, name)}: give 1 to 1000")


@dataclass(frozen=True)
class Problem:
    """One task instance: ``before + context + question`` is asked, ``reply`` answers it.

    Attributes:
        task: one of `TASKS`.
        before: the instruction that precedes the context.
        context: the haystack with what is hidden in it.
        question: asked after the context, with the blank line between them.
        prefix: how the answer begins; RULER hands it to the model.
        answers: the strings that a right answer contains.
    """

    task: str
    before: str
    context: str
    question: str
    prefix: str
    answers: tuple[str, ...]

    @property
    def reply(self) -> str:
        """The whole right answer."""
        return f"{self.prefix} {_listed(self.answers)}."


def score(answers: Sequence[str], text: str, task: str) -> float:
    """RULER's score of a model's answer, in [0, 1].

    The share of ``answers`` found in ``text``, ignoring case (string_match_all); for ``"qa"``,
    whose answers are alternatives, 1 if any is found (string_match_part).

    Raises:
        KvenvError: for an unknown task or no answers.
    """
    check_choice("RULER task", task, (*TASKS, "qa"))
    if not answers:
        raise KvenvError(f"no answers to score {task} by: give at least one")
    found = [answer.lower() in text.lower() for answer in answers]
    return float(any(found)) if task == "qa" else sum(found) / len(found)


def smallest(task: str) -> int:
    """The least haystack `problem` can build ``task`` with."""
    return 27 if task == "fwe" else 1  # at 27 words the third most frequent one comes up once


def problem(
    task: str, size: int, seed: Sequence[int], options: Options, prompt_tokens: int
) -> Problem:
    """An instance of ``task`` in a haystack of ``size`` units (sentences, needles or words).

    Args:
        task: one of `TASKS`.
        size: at least `smallest`; the same ``seed`` hides the same things at any size.
        seed: non-negative integers.
        options: how large and of what kind.
        prompt_tokens: the prompt's planned length, which sets how often cwe repeats its words.
    """
    hidden, filler, place = (np.random.default_rng([*seed, stream]) for stream in range(3))
    if task in NIAH:
        return _niah(task, size, options, hidden, filler, place)
    if task == "vt":
        return _vt(size, options, hidden, place)
    if task == "cwe":
        return _cwe(size, options, hidden, place, prompt_tokens >= _LONG_PROMPT)
    return _fwe(size, hidden, place)


def _niah(
    task: str,
    size: int,
    options: Options,
    hidden: np.random.Generator,
    filler: np.random.Generator,
    place: np.random.Generator,
) -> Problem:
    count = {"niah_multikey": options.needle_keys, "niah_multiquery": options.needle_queries}.get(
        task, 1
    )
    each = options.needle_values if task == "niah_multivalue" else 1
    keys = _draw(options.key_type, count, hidden)
    values = _draw(options.value_type, count * each, hidden)
    asked = keys if task == "niah_multiquery" else keys[:1]
    answers = tuple(values[: len(asked) * each])
    noun, many = _NOUN[options.value_type], len(answers) > 1

    def needle(key: str, value: str) -> str:
        start = f"One of the magic {noun}s" if each > 1 else f"The magic {noun}"
        return f"{start} for {key} is: {value}."

    needles = [needle(keys[i // each], value) for i, value in enumerate(values)]
    kind = options.haystack
    if kind == "auto":
        kind = "noise" if task == "niah_single" else "essay"
    if kind == "needles":
        others = [k for k in _draw(options.key_type, size + count, filler) if k not in keys]
        units = list(map(needle, others[:size], _draw(options.value_type, size, filler)))
    else:
        units = haystack.noise(size) if kind == "noise" else haystack.essay(size, filler)
    _scatter(units, [needles[i] for i in hidden.permutation(len(needles))], place)
    what = f"magic {noun}s" if many else f"magic {noun}"
    whose = _listed(asked)
    return Problem(
        task,
        before=(
            f"{'Some' if many else 'A'} {what} {'are' if many else 'is'} hidden in the text below. "
            f"Remember {'them' if many else 'it'}: I will ask about {'them' if many else 'it'} "
            "afterwards.\n\n"
        ),
        context=("\n" if kind != "essay" else " ").join(units),
        question=(
            f"\n\nWhat {'are all the' if many else 'is the'} {what} for {whose} "
            "mentioned in the text above?"
        ),
        prefix=f"The {what} for {whose} mentioned in the text {'are' if many else 'is'}",
        answers=answers,
    )


def _vt(
    size: int, options: Options, hidden: np.random.Generator, place: np.random.Generator
) -> Problem:
    length = options.hops + 1
    names = _letters(options.chains * length, 5, string.ascii_uppercase, hidden)
    values = [str(v) for v in hidden.permutation(90_000)[: options.chains] + 10_000]
    units = haystack.noise(size)
    for chain, value in enumerate(values):
        variables = names[chain * length : (chain + 1) * length]
        sources = [value, *(f"VAR {name}" for name in variables[:-1])]
        _scatter(units, [f"VAR {v} = {s}" for v, s in zip(variables, sources, strict=True)], place)
    return Problem(
        "vt",
        before="Follow the variable assignments hidden in the text below.\n\n",
        context="\n".join(units),
        question=(
            f"\n\nWhich variables have the value {values[0]}, directly or through other variables, "
            "in the text above?"
        ),
        prefix=f"By the assignments in the text, {length} variables have the value {values[0]}:",
        answers=tuple(names[:length]),
    )


def _cwe(
    size: int,
    options: Options,
    hidden: np.random.Generator,
    place: np.random.Generator,
    long: bool,
) -> Problem:
    words = haystack.vocabulary(hidden)
    count = options.common_words
    words += haystack.invented(max(0, count + size - len(words)), hidden)
    common, rare = words[:count], words[count : count + size]
    entries = common * (30 if long else 6) + rare * (3 if long else 1)
    order = place.permutation(len(entries))
    return Problem(
        "cwe",
        before="Below is a numbered list of words. Keep in mind which ones come up most often.\n\n",
        context=" ".join(f"{i}. {entries[j]}" for i, j in enumerate(order, 1)),
        question=f"\n\nWhat are the {count} most common words in the list above?",
        prefix=f"The {count} words that come up most often in the list are",
        answers=tuple(common),
    )


def _fwe(size: int, hidden: np.random.Generator, place: np.random.Generator) -> Problem:
    # The word of rank k comes up size / (zeta(2) k^2) times; rank 1 is the noise word.
    counts = [int(size / (_ZETA_2 * rank**2)) for rank in range(1, size + 1)]
    counts = [c for c in counts if c]
    # Rounding must not tie the third coded word with the fourth.
    counts[4:] = [min(c, counts[3] - 1) for c in counts[4:]]
    words = ["...", *_letters(len(counts) - 1, 6, string.ascii_lowercase, hidden)]
    text = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    return Problem(
        "fwe",
        before=(
            "Keep track of how often each coded word comes up in the text below. The sign '...' is "
            "noise: ignore it.\n\n"
        ),
        context=" ".join(text[i] for i in place.permutation(len(text))),
        question="\n\nWhat are the three most frequent coded words in the text above?",
        prefix="The three coded words that come up most often are",
        answers=tuple(words[1:4]),
    )


def _scatter(units: list[str], needles: Sequence[str], rng: np.random.Generator) -> None:
    """Put needles into units, keeping their order, at depths that do not depend on the length."""
    slots = (np.sort(rng.random(len(needles))) * (len(units) + 1)).astype(int)
    for slot, needle in reversed(list(zip(slots.tolist(), needles, strict=True))):
        units.insert(slot, needle)


def _draw(kind: Kind, count: int, rng: np.random.Generator) -> list[str]:
    if kind == "words":
        return haystack.names(count, rng)
    if kind == "numbers":
        return _letters(count, 7, string.digits[1:], rng)
    return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]


def _letters(count: int, length: int, alphabet: str, rng: np.random.Generator) -> list[str]:
    """Distinct random strings."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(alphabet[i] for i in rng.integers(len(alphabet), size=length))] = None
    return list(found)


def _listed(items: Sequence[str]) -> str:
    return " and ".join([*([", ".join(items[:-1])] if len(items) > 1 else []), items[-1]])
