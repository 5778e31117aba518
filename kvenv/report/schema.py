"""Checks an evaluation's JSON before it is shown: what is there is well formed, or an error."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from kvenv.errors import KvenvError

FORMAT = "kvenv-evaluation"
VERSIONS = (1, 2)
HEURISTICS_1 = ("random", "streaming", "knorm", "keydiff")
"""Version 1 does not say what kind an agent is; these are the heuristics it knew."""

KINDS = ("learned", "oracle", "heuristic")
VIEWS = ("full", "sink_free")
TASKS = ("accuracy", "perplexity", "streaming", "conversation", "streams")
SECTIONS = ("agents", "comparison", "texts", *TASKS)


@dataclass(frozen=True)
class Field:
    """A value of the JSON and the way to it, for errors that say where."""

    value: Any
    where: str

    def fail(self, need: str) -> NoReturn:
        """Raise the error that this value is not what is needed."""
        shown = repr(self.value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise KvenvError(f"{self.where} is {shown}: it must be {need}; evaluate again to mend it")

    def get(self, key: str) -> Field | None:
        """The field of that key; None where it is absent or null."""
        value = self.mapping().get(key)
        return None if value is None else Field(value, f"{self.where}[{key!r}]")

    def need(self, key: str) -> Field:
        """The field of that key, which must be there."""
        return self.get(key) or Field(None, f"{self.where}[{key!r}]").fail("given")

    def mapping(self) -> Mapping[str, Any]:
        """The value as an object with text keys."""
        if not isinstance(self.value, Mapping) or not all(isinstance(k, str) for k in self.value):
            self.fail("an object")
        return self.value

    def fields(self) -> Iterator[tuple[str, Field]]:
        """Each key of an object and its field."""
        for key, value in self.mapping().items():
            yield key, Field(value, f"{self.where}[{key!r}]")

    def items(self, count: int | None = None) -> list[Field]:
        """The fields of a list, of ``count`` if given."""
        if not isinstance(self.value, Sequence) or isinstance(self.value, str | bytes):
            self.fail("a list")
        if count is not None and len(self.value) != count:
            raise KvenvError(
                f"{self.where} holds {len(self.value)} values, not {count}: evaluate again"
            )
        return [Field(value, f"{self.where}[{i}]") for i, value in enumerate(self.value)]

    def number(self) -> None:
        """Check that this is a number, or null for one that was not finite."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float | None):
            self.fail("a number")

    def whole(self, least: int = 0) -> int:
        """The value as a whole number."""
        if type(self.value) is not int or self.value < least:
            self.fail(f"a whole number of at least {least}")
        return self.value

    def text(self) -> str:
        """The value as text."""
        if not isinstance(self.value, str):
            self.fail("text")
        return self.value

    def interval(self, middle: str = "mean") -> None:
        """Check that this is an object with a middle, "low" and "high"."""
        for key in (middle, "low", "high"):
            if key not in self.mapping():
                self.fail(f"an object with {middle!r}, 'low' and 'high'")
            Field(self.value[key], f"{self.where}[{key!r}]").number()


def checked(result: Any, name: str) -> dict[str, Any]:
    """The result, made of plain finite values, with every agent's kind.

    Args:
        result: an evaluation's JSON, version 1 or 2.
        name: of its file, for errors.

    Raises:
        KvenvError: naming the file, the place in it, what is there and what should be.
    """
    try:
        root = Field(_finite(result, name), name)
    except RecursionError as error:
        raise KvenvError(f"{name} is nested too deeply to be an evaluation") from error
    if not isinstance(result, Mapping) or result.get("format") != FORMAT:
        raise KvenvError(
            f"{name} is no evaluation (its format is not {FORMAT!r}): give a file that "
            "`kvenv evaluate --json` wrote"
        )
    version = root.value.get("version")
    if version not in VERSIONS or isinstance(version, bool):
        raise KvenvError(
            f"{name} has version {version!r}, and this kvenv reads {VERSIONS[0]} to {VERSIONS[-1]}:"
            " update kvenv, or evaluate again"
        )
    if not any(root.value.get(section) for section in SECTIONS):
        raise KvenvError(f"{name} holds no figures: give one of {', '.join(SECTIONS)}")
    for key in ("model", "command", "date"):
        if field := root.get(key):
            field.text()
    for key in ("versions", "machine"):
        if field := root.get(key):
            field.mapping()
    for entry in field.items() if (field := root.get("traces")) else []:
        if arguments := entry.get("arguments"):
            arguments.mapping()
    for key in ("documents", "episodes", "model_layers", "kv_heads"):
        if field := root.get(key):
            field.whole()
    heads = _heads(root)
    _agents(root, heads)
    _comparison(root)
    _texts(root, heads)
    for task in TASKS:
        if field := root.get(task):
            _task(field)
    return root.value


def _finite(value: Any, name: str) -> Any:
    """A copy in which NaN and infinities, which JSON in a page cannot hold, are None."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, name) for item in value]
    if value is None or isinstance(value, str) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    raise KvenvError(f"{name} holds {value!r:.60}, which no evaluation does: evaluate again")


def _heads(root: Field) -> int:
    pairs = root.get("heads")
    seen = [
        tuple(number.whole() for number in pair.items(2))
        for pair in (pairs.items() if pairs else [])
    ]
    if pairs and len(set(seen)) < len(seen):
        pairs.fail("a list in which every (layer, head) stands once")
    return len(seen)


def _agents(root: Field, heads: int) -> None:
    budgets = root.get("budgets")
    points = budgets.items() if budgets else []
    for point in points:
        if isinstance(point.value, bool) or not isinstance(point.value, int | float):
            point.fail("a fraction of the prompt")
        if not 0 < point.value <= 1:
            point.fail("in (0, 1]")
    if not (agents := root.get("agents")):
        return
    for name, agent in agents.fields():
        if (kind := agent.get("kind")) and kind.value not in KINDS:
            kind.fail(f"one of {', '.join(KINDS)}")
        if not kind:
            heuristic = "heuristic" if name in HEURISTICS_1 else "learned"
            agent.value["kind"] = "oracle" if name == "oracle" else heuristic
        for view in VIEWS:
            if metrics := agent.get(view):
                for _, metric in metrics.fields():
                    metric.interval()
            normalized_scores = per_head.get(view) if (per_head := agent.get("per_head")) else None
            for number in normalized_scores.items(heads) if normalized_scores else []:
                number.number()
            if (curves := agent.get("curve")) and (curve := curves.get(view)):
                for key in ("mean", "low", "high"):
                    for number in curve.need(key).items(len(points)):
                        number.number()


def _comparison(root: Field) -> None:
    for _, agent in field.fields() if (field := root.get("comparison")) else ():
        for view in VIEWS:
            for key, entry in view_field.fields() if (view_field := agent.get(view)) else ():
                if key == "heads":
                    entry.need("wins").whole()
                    entry.need("of").whole()
                    for row in entry.need("behind").items():
                        layer, head, rival, margin = row.items(4)
                        layer.whole()
                        head.whole()
                        rival.text()
                        margin.number()
                elif key == "improvement":
                    entry.interval()
                else:
                    entry.interval("difference")
                    entry.need("baseline").text()


def _texts(root: Field, heads: int) -> None:
    for text in field.items() if (field := root.get("texts")) else []:
        text.need("document").text()
        tokens = text.need("tokens").items()
        for token in tokens:
            token.text()
        if not tokens or not heads:
            text.fail("a text of at least one token, beside the heads that read it")
        for _, agent in text.need("agents").fields():
            ranks = agent.need("ranks")
            try:
                size = len(base64.b64decode(ranks.text(), validate=True))
            except (ValueError, binascii.Error):
                ranks.fail("base64")
            if size != 2 * heads * len(tokens):
                raise KvenvError(
                    f"{ranks.where} holds {size} bytes, not 2 for each of {heads} heads and "
                    f"{len(tokens)} tokens: evaluate again"
                )


def _task(task: Field) -> None:
    if left_out := task.get("left_out"):
        for _, why in left_out.fields():
            why.text()
    groups = task.get("groups")
    for group in (groups.items() if groups else []) or [task]:
        if full := group.get("full"):
            full.interval()
        for _, agent in group.need("agents").fields():
            for budget, cell in agent.fields():
                try:
                    above = 0 < float(budget) < math.inf
                except ValueError:
                    above = False
                if not above:
                    cell.fail("given under a budget: a fraction of the prompt, or tokens")
                for part in (cell, *(part for _, part in cell.fields())):
                    if isinstance(part.value, Mapping) and "mean" in part.value:
                        part.interval()
