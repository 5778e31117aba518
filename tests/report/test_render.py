"""The page as a text: what it says, that nothing in it is taken for markup, what is left out."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvenv.errors import KvenvError
from kvenv.report import render

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\" ' & {{ 7 * 7 }} <!--"


class Page(HTMLParser):
    """A page's elements, ids and what stands in each cell, heading and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.scripts: list[tuple[dict[str, Any], str]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._path: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        if tag == "script":
            self.scripts.append((values, ""))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self._path.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._path and self._path.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._path and self._path[-1] == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = attributes, before + data
        elif "style" not in self._path:
            self.text += data
            if "td" in self._path or "th" in self._path:
                self.rows[-1][-1] = f"{self.rows[-1][-1]} {data.strip()}".strip()

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0][1])

    def row(self, heading: str) -> list[str]:
        """The first row of that heading."""
        return next(row for row in self.rows if row and row[0] == heading)


def parts(page: Page) -> set[str]:
    """The sections of the first result."""
    return {name.removeprefix("result-1-") for name in page.ids if name.startswith("result-1-")}


def test_every_section_of_a_real_evaluation_is_there(evaluation) -> None:
    page = Page(render([evaluation], ["out.json"]))
    assert parts(page) == {
        "curves",
        "heads",
        "metrics",
        "compared",
        "accuracy",
        "perplexity",
        "streaming",
        "conversation",
        "tokens",
    }
    text = " ".join(page.text.split())
    for word in (
        "tiny · questions",
        "3 held-out documents · 4 heads · 4 agents",
        evaluation["command"],
        evaluation["date"],
        f"kvenv {evaluation['versions']['kvenv']}",
        f"{evaluation['machine']['cores']} cores",
        "4 in 2 of 2 layers (0, 1)",
        "question-aware · 48 prompt tokens · 3 prompts · 4 sinks · 4 recent",
        "oracle is left out: it needs utility",
    ):
        assert word in text


def test_tables_hold_the_evaluation_s_figures_with_intervals(evaluation) -> None:
    page = Page(render([evaluation]))
    normalized_score = evaluation["agents"]["knorm"]["full"]["normalized_score"]
    metrics = page.rows.index(
        next(r for r in page.rows if r[:3] == ["agent", "reward", "normalized score"])
    )
    knorm = next(row for row in page.rows[metrics:] if row[0] == "knorm")
    minus = {ord("-"): "\N{MINUS SIGN}"}
    mean, low, high = (
        f"{normalized_score[key]:.3f}".translate(minus) for key in ("mean", "low", "high")
    )
    assert knorm[2] in (f"{mean} {low}\N{EN DASH}{high}", f"{mean} {low} to {high}")
    curve = evaluation["agents"]["kvp"]["curve"]["full"]
    names = next(row for row in page.rows if row[0] == "budget")
    assert page.row("1/4")[names.index("kvp")].startswith(
        f"{curve['mean'][evaluation['budgets'].index(0.25)]:.3f}"
    )
    assert page.row("layer 1, head 0")[1].startswith(
        f"{evaluation['agents']['kvp']['per_head']['full'][2]:.3f}".translate(minus)
    )
    assert page.row("full cache")[1].startswith(
        f"{evaluation['accuracy']['groups'][0]['full']['mean']:.2f}"
    )


def test_heads_behind_their_best_heuristic_are_listed(evaluation) -> None:
    entry = evaluation["comparison"]["kvp"]["full"]["heads"]
    entry.update(wins=3, of=4, behind=[[1, 0, "knorm", -0.0123]])
    page = " ".join(Page(render([evaluation])).text.split())
    assert "3 of 4 heads above their own best heuristic" in page
    assert "layer 1, head 0: 0.0123 below knorm" in page


def test_the_best_of_a_column_is_bold_and_the_oracle_does_not_compete(evaluation) -> None:
    text = render([evaluation])
    rows = re.findall(r"<tr class=\"oracle\">.*?</tr>", text, flags=re.DOTALL)
    assert rows
    assert not [row for row in rows if "<strong>" in row]
    perplexity = text[text.index('id="result-1-perplexity"') :]
    cut = evaluation["perplexity"]["agents"]
    best = min((name for name in cut if name != "oracle"), key=lambda n: cut[n]["0.25"]["mean"])
    marked = re.findall(r"<strong>(.*?)</strong>", perplexity.split("</table>")[0])
    assert f"{cut[best]['0.25']['mean']:.2f}" in marked


def test_what_is_absent_is_left_out(evaluation) -> None:
    kept = {key: evaluation[key] for key in ("format", "version", "perplexity")}
    assert parts(Page(render([kept]))) == {"perplexity"}
    for key in ("comparison", "texts", "accuracy", "streaming", "conversation", "perplexity"):
        del evaluation[key]
    assert parts(Page(render([evaluation]))) == {"curves", "heads", "metrics"}
    for agent in evaluation["agents"].values():
        del agent["per_head"], agent["sink_free"], agent["curve"]["sink_free"]
    page = Page(render([evaluation]))
    assert parts(page) == {"curves", "metrics"}
    assert "sink-free" not in [label for row in page.rows for label in row]
    assert 'type="radio"' not in render([evaluation])


def test_version_1_shows_curves_through_its_four_budgets(published) -> None:
    page = Page(render([published]))
    assert parts(page) == {"curves", "heads", "metrics"}
    data = page.data["result-1"]
    assert data["budgets"] == [1 / 16, 1 / 8, 1 / 4, 1 / 2]
    kinds = {agent["name"]: agent["kind"] for agent in data["agents"]}
    assert kinds == {
        "kvp": "learned",
        "oracle": "oracle",
        **dict.fromkeys(("random", "streaming", "knorm", "keydiff"), "heuristic"),
    }
    kvp = next(agent for agent in data["agents"] if agent["name"] == "kvp")
    figures = published["agents"]["kvp"]["sink_free"]
    assert kvp["curve"]["sink_free"]["low"][2] == figures["retention@1/4"]["low"]


def test_numbers_that_are_not_finite_are_shown_as_missing(evaluation) -> None:
    evaluation["agents"]["kvp"]["full"]["reward"] = dict.fromkeys(("mean", "low", "high"), None)
    evaluation["agents"]["kvp"]["curve"]["full"]["mean"][3] = float("nan")
    evaluation["perplexity"]["agents"]["random"]["0.25"].update(
        dict.fromkeys(("mean", "low", "high"), float("inf"))
    )
    page = Page(render([evaluation]))
    curve = page.data["result-1"]["agents"][0]["curve"]["full"]["mean"]
    assert curve[3] is None
    assert curve[2] is not None
    random = [row for row in page.rows if row[0] == "random"]
    assert [cell for row in random for cell in row].count("\N{EN DASH}") == 1


def test_several_results_are_told_apart_by_their_files(evaluation, published) -> None:
    text = render([evaluation, published, published], ["a.json", "x/old.json", "x/older.json"])
    tabs = re.findall(r'role="tab".*?>(.*?)</button>', text)
    titles = ["tiny · questions", "smollm2-135m · text · old", "smollm2-135m · text · older"]
    assert tabs == titles
    assert list(Page(text).data) == ["result-1", "result-2", "result-3"]
    assert 'role="tab"' not in render([published])


def test_no_result_is_an_error() -> None:
    with pytest.raises(KvenvError, match="give at least one result"):
        render([])


def hostile(made: Any, word: str) -> dict[str, Any]:
    """An evaluation that says ``word`` wherever words go."""
    spread = {"mean": 0.5, "low": 0.25, "high": 0.75}
    task = {"full": spread, "agents": {word: {"0.5": spread}}, "left_out": {word: word}}
    agent = {"full": {word: spread}, "per_head": {"full": [0.5]}}
    versus = {word: {"baseline": word, "difference": 0.1, "low": 0.0, "high": 0.2}}
    heads = {"wins": 0, "of": 1, "behind": [[5, 0, word, -0.1]]}
    result = made(
        [word, "b"],
        word,
        model=word,
        command=word,
        date=word,
        versions={word: word},
        machine={"system": word, word: word},
        traces=[{"workload": word, "arguments": {word: [word]}, "seed": 0}],
        agents={word: {"kind": "learned", **agent}},
        comparison={word: {"full": {**versus, "heads": heads}}},
        accuracy={"groups": [{"task": word, "prompting": word, **task}]},
    )
    entry = result["texts"][0]["agents"]
    entry[word] = entry["first"]
    return result


def test_no_word_of_a_result_is_taken_for_markup(made) -> None:
    text = render([hostile(made, NASTY)], [NASTY])
    page, plain = Page(text), Page(render([hostile(made, "plain")], ["plain"]))
    assert page.tags == plain.tags
    assert page.ids == plain.ids
    assert len(page.scripts) == 2
    assert page.data["result-1"]["texts"][0]["tokens"][0] == NASTY
    assert "49" not in page.row(NASTY)[0]
    assert page.text.count(NASTY) >= 15


@given(word=st.text(st.characters(codec=None, exclude_characters="\x00\r"), min_size=1))
def test_any_word_is_shown_as_it_is(made, word: str) -> None:
    page = Page(render([hostile(made, word)], [word]))
    assert page.data["result-1"]["texts"][0]["tokens"][0] == word
    assert len(page.scripts) == 2
    assert word.encode("utf-8", "replace").decode() in page.text


def test_the_page_s_policy_allows_its_own_style_and_script_alone(published) -> None:
    text = render([published])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules.keys() == {"default-src", "style-src", "script-src", "base-uri", "form-action"}
    assert {rules[key] for key in ("default-src", "base-uri", "form-action")} == {"'none'"}
    for kind, rule in (("style", "style-src"), ("script", "script-src")):
        inline = re.search(rf"<{kind}>(.*?)</{kind}>", text, flags=re.DOTALL)
        assert inline
        digest = base64.b64encode(hashlib.sha256(inline[1].encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", text)
    assert not re.findall(r"<[^>]* style=", text)
