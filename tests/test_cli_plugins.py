"""Plug-ins on the command line: what their options may be, and what is made of their results."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvenv import cli, commands, parsing, plugins
from kvenv.errors import KvenvError
from kvenv.learning.plackett_luce import Credit
from kvenv.scorers import NetworkScorer
from kvenv.trace import TraceSet

LEARNERS = sorted(n for n in plugins.available("agent") if plugins.load("agent", n).trains)

AGENT = """
from dataclasses import replace
from kvenv import plugins

class Mine(plugins.load("agent", "kvp")):
    def __init__(self, told: float = 0.5):
        super().__init__(steps=1, hidden=[4])
        self.told = told

    def fit(self, traces, heads=None, run=None):
        metrics = {"loss": "low", "rank_loss": self.told, "rounds": 3}
        return replace(super().fit(traces, heads, run), training={}, metrics=metrics)
"""

WORKLOAD = """
from dataclasses import dataclass
from kvenv.recording.workload import Sample

@dataclass(slots=True)
class Mine:
    shift: int = 1
    _words: object = None

    def sample(self, index, *, tokenizer, rng, prompt_tokens, future_tokens, seed):
        ids = (rng.integers(0, 99, prompt_tokens + future_tokens) + self.shift).tolist()
        return Sample(ids[:prompt_tokens], ids[prompt_tokens:], f"document {index}")
"""


@pytest.fixture
def work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_traces: Callable[..., TraceSet]
) -> Path:
    """A working directory with traces and plug-ins of one's own."""
    tiny_traces(tmp_path / "traces")
    (tmp_path / "agent.py").write_text(AGENT)
    (tmp_path / "workload.py").write_text(WORKLOAD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAIN = ("train", "./agent.py", "--traces", "traces", "--out", "new")


def test_a_learner_tells_what_it_likes(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TRAIN, "--told", "0.25"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    figures = "held out: loss low, rank-loss 0.250, rounds 3; wrote new"
    assert re.search(rf"trained 4 heads in \d+ s; {figures}", said)
    metrics = NetworkScorer.from_pretrained("new").metrics
    assert metrics == {"loss": "low", "rank_loss": 0.25, "rounds": 3}


def test_a_figure_that_is_not_finite_is_named(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*TRAIN, "--told", ".nan"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kvenv: error: metrics 'rank_loss' of a scorer is not JSON-safe")
    assert error.count("\n") == 1
    assert not Path("new").exists()


def test_a_workload_may_have_slots(work: Path, checkpoints: Callable[[int], Path]) -> None:
    sizes = "--episodes 1 --prompt-tokens 12 --future-tokens 3 --shift 5".split()
    model = ["--model", str(checkpoints(0))]
    assert cli.main(["record", "./workload.py", *model, "--out", "new", *sizes]) == 0
    arguments = TraceSet("new").manifest.arguments
    assert arguments["shift"] == 5
    assert "_words" not in arguments


@pytest.mark.parametrize("name", LEARNERS)
def test_what_a_shipped_agent_learnt_is_saved_and_used(work: Path, name: str, quick_agent) -> None:
    commands.train(name, quick_agent(name), "traces", Path("new"))
    assert sorted(path.name for path in work.glob("new*")) == ["new"]
    commands.evaluate("traces", "new,knorm", json=Path("figures.json"))
    assert Path("figures.json").stat().st_size


@pytest.mark.parametrize("name", LEARNERS)
def test_help_of_a_shipped_agent(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", name, "--help"])
    text = capsys.readouterr().out
    assert f"usage: kvenv train {name}" in text
    for ugly in ("<class", "Optional[", "Union[", "Literal[", "null", "=flags", "None", ": )"):
        assert ugly not in text
    own = parsing.hints_of(plugins.load("agent", name))
    assert all(f"--{option.replace('_', '-')}" in text for option in own)


# --- options ---------------------------------------------------------------------------------

KVP = plugins.load("agent", "kvp")  # its types are names that this module does not know


@dataclass
class Fields(KVP):
    a: float = 1
    made: int = field(default=2, init=False)


class Inherits(Fields): ...


class Own(KVP):
    def __init__(self, a: float = 2, *rest: int, **others: int): ...


@dataclass(init=False)
class OwnOfDataclass(KVP):
    steps: Unknown = 3  # noqa: F821  # pyright: ignore

    def __init__(self, a: float = 2): ...


@dataclass
class OwnKept(KVP):
    def __init__(self, a: float = 2): ...


class Nothing: ...


class Untyped:
    def __init__(self, a: float, b=3, *, c): ...


class Unknowable:
    def __init__(self, a: Unknown = None): ...  # noqa: F821  # pyright: ignore


class Unparsable:
    def __init__(self, a: "int |" = 1): ...  # noqa  # pyright: ignore


def test_options_are_those_of_the_init_that_is_called() -> None:
    inherited = parsing.hints_of(KVP)
    assert inherited["credit"] == Credit
    assert parsing.hints_of(Fields) == parsing.hints_of(Inherits) == {**inherited, "a": float}
    for plugin in (Own, OwnOfDataclass, OwnKept):
        assert parsing.hints_of(plugin) == {"a": float}
    assert parsing.hints_of(Nothing) == {}


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (Untyped, "^Untyped's options b, c have no type: write one for each, e.g. "),
        (
            Unknowable,
            "^the types of Unknowable's options .*'Unknown' is not defined.*: import",
        ),
        (Unparsable, "^the types of Unparsable's options cannot be read"),
    ],
)
def test_options_without_a_readable_type_are_refused(plugin: type, message: str) -> None:
    with pytest.raises(KvenvError, match=message):
        parsing.parse("kvenv train mine", commands.train, plugin, ["--help"])


def test_postponed_types_of_a_derived_dataclass_are_read(tmp_path: Path, capsys) -> None:
    file = tmp_path / "strong.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from kvenv.learning.agent import Heuristic\n\n"
        "@dataclass\nclass Strong(Heuristic):\n"
        '    """Strong."""\n\n    strength: float = 1.0\n'
    )
    options = ["--traces", "sample", "--out", str(tmp_path / "out")]
    assert cli.main(["train", str(file), "--strength", "abc", *options]) == 2
    assert "--strength 'abc': give a number" in capsys.readouterr().err
