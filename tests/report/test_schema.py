"""What is no evaluation, or a damaged one: an error that names the place and the cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvenv import cli
from kvenv.errors import KvenvError
from kvenv.report import render

Path_ = tuple[Any, ...]
WRONG: list[tuple[Path_, Any, str]] = [
    (("format",), "kvenv-scorer", "is no evaluation"),
    (("version",), 3, "has version 3, and this kvenv reads 1 to 2: update kvenv"),
    (("version",), True, "has version True"),
    (("model",), 7, r"out.json\['model'\] is 7: it must be text"),
    (("machine",), ["x"], r"\['machine'\] is \['x'\]: it must be an object"),
    (("traces", 0, "arguments"), 1, r"\['traces'\]\[0\]\['arguments'\] is 1"),
    (("documents",), -1, "whole number of at least 0"),
    (("heads", 1), [0], r"\['heads'\]\[1\] holds 1 values, not 2"),
    (("heads", 1), [0, 0], "every .layer, head. stands once"),
    (("heads", 1), [0, "1"], "whole number"),
    (("budgets", 0), 0, r"in \(0, 1\]"),
    (("budgets", 0), "1/64", "a fraction of the prompt"),
    (("agents",), [], "no figures|an object"),
    (("agents", "kvp"), 1, r"\['agents'\]\['kvp'\] is 1: it must be an object"),
    (("agents", "kvp", "kind"), "good", "one of learned, oracle, heuristic"),
    (
        ("agents", "kvp", "full", "normalized_score"),
        {"mean": 1},
        "an object with 'mean', 'low' and 'high'",
    ),
    (("agents", "kvp", "full", "normalized_score", "low"), "x", "it must be a number"),
    (("agents", "kvp", "per_head", "full"), [1.0], r"\['per_head'\]\['full'\] holds 1 values"),
    (("agents", "kvp", "curve", "full", "low"), [1.0], "holds 1 values, not 33"),
    (("agents", "kvp", "curve", "full", "low"), None, r"\['low'\] is None: it must be given"),
    (
        ("comparison", "kvp", "full", "normalized_score", "baseline"),
        None,
        r"\['baseline'\] is None",
    ),
    (("comparison", "kvp", "full", "normalized_score", "difference"), True, "a number"),
    (("comparison", "kvp", "full", "heads", "behind"), [[0, 0, "x"]], "holds 3 values, not 4"),
    (("comparison", "kvp", "full", "improvement"), {}, "an object with 'mean'"),
    (("texts", 0, "tokens"), [], "at least one token"),
    (("texts", 0, "tokens", 0), 5, "text"),
    (("texts", 0, "tokens"), "abc", "a list"),
    (("texts", 0, "agents", "kvp", "ranks"), "?", "base64"),
    (("texts", 0, "agents", "kvp", "ranks"), "AAAA", "holds 3 bytes, not 2 for each of 4 heads"),
    (("perplexity", "agents"), None, r"\['agents'\] is None"),
    (("perplexity", "agents", "kvp"), {"a lot": {}}, "under a budget"),
    (("perplexity", "agents", "kvp"), {"nan": {}}, "under a budget"),
    (("perplexity", "agents", "kvp", "0.5", "low"), "x", "a number"),
    (("perplexity", "agents", "kvp", "0.5", "versus_full"), {"mean": 0.1}, "'low' and 'high'"),
    (("streaming", "left_out"), {"oracle": 1}, "text"),
    (("accuracy", "groups"), {}, "a list"),
    (("accuracy", "groups"), [], "'agents'"),
    (("accuracy", "groups", 0, "full"), 1, "an object"),
    (("episodes",), 10**30, "no evaluation does"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG)
def test_damage_is_named_with_its_place(evaluation, path, value, message) -> None:
    *way, last = path
    place = evaluation
    for key in way:
        place = place[key]
    place[last] = value
    with pytest.raises(KvenvError, match=message) as error:
        render([evaluation], ["out.json"])
    assert str(error.value).startswith("out.json")


@pytest.mark.parametrize("value", [None, 5, "text", [], {}, {"format": "kvenv-evaluation"}])
def test_other_json_is_no_evaluation(value) -> None:
    with pytest.raises(KvenvError, match="result 1"):
        render([value])


def test_an_evaluation_without_figures_says_which_there_could_be() -> None:
    with pytest.raises(KvenvError, match="no figures: give one of agents, comparison, texts"):
        render([{"format": "kvenv-evaluation", "version": 2, "agents": {}}])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(data=st.data())
def test_any_damage_is_shown_or_refused_but_never_crashes(measured, data) -> None:
    damaged = json.loads(json.dumps({k: v for k, v in measured.items() if k != "texts"}))
    place, way = damaged, []
    while isinstance(place, dict | list) and place and (not way or data.draw(st.booleans())):
        keys = range(len(place)) if isinstance(place, list) else sorted(place)
        way.append(place)
        key = data.draw(st.sampled_from(keys))
        place = place[key]
    way[-1][key] = data.draw(JSON)
    try:
        page = render([damaged])
    except KvenvError:
        return
    assert page.endswith("</html>\n")


@pytest.fixture
def saved(evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the evaluation as out.json."""
    (tmp_path / "out.json").write_text(json.dumps(evaluation))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_writes_one_page_of_several_files(saved, published, capsys) -> None:
    (saved / "old.json").write_text(json.dumps(published))
    assert cli.main(["report", "out.json, old.json", "--out", "pages/a.html"]) == 0
    page = (saved / "pages/a.html").read_text(encoding="utf-8")
    assert page == render([json.loads((saved / "out.json").read_text()), published], NAMES)
    assert "wrote pages/a.html" in capsys.readouterr().out
    assert [path.name for path in (saved / "pages").iterdir()] == ["a.html"]


NAMES = ["out.json", "old.json"]


def test_the_page_is_report_html_unless_told_otherwise(saved) -> None:
    assert cli.main(["report", "out.json"]) == 0
    assert (saved / "report.html").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "'bad.json' could not be read (No such file or directory)"),
        (b"{", "'bad.json' is no JSON"),
        (b"\xff\xfe\x00", "'bad.json' is no JSON"),
        (b"[" * 200_000, "'bad.json' is no JSON"),
        (b"[" * 900 + b"]" * 900, "bad.json is n"),
        (b"[1]", "bad.json is no evaluation"),
    ],
)
def test_a_bad_file_is_one_line_and_writes_nothing(saved, capsys, content, message) -> None:
    if content is not None:
        (saved / "bad.json").write_bytes(content)
    assert cli.main(["report", "out.json,bad.json"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (saved / "report.html").exists()


def test_a_page_that_cannot_be_written_leaves_nothing_behind(saved, capsys) -> None:
    (saved / "report.html").mkdir()
    before = sorted(saved.iterdir())
    assert cli.main(["report", "out.json"]) == 2
    assert "report.html" in capsys.readouterr().err
    assert sorted(saved.iterdir()) == before
