from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from kvenv import plugins
from kvenv.errors import KvenvError

AGENT = """
from dataclasses import dataclass

@dataclass
class Mine:
    strength: float = 1.5
    trains = False

    def fit(self, traces, heads=None, run=None):
        return self
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with an agents folder."""
    (tmp_path / "agents").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", plugins.FOLDERS)
def test_every_shipped_plugin_loads_by_name(kind: plugins.Kind, workplace: Path):
    shipped = plugins.shipped_folder(plugins.FOLDERS[kind])
    names = {path.stem for path in shipped.glob("*.py")}
    assert names
    assert plugins.available(kind).keys() == names
    for name in names:
        plugin = plugins.load(kind, name)
        assert callable(getattr(plugin, plugins.METHODS[kind]))
        assert plugin.__doc__


def test_an_agent_of_the_working_directory_loads_by_name(workplace: Path):
    (workplace / "agents" / "mine.py").write_text(AGENT)
    assert plugins.available("agent")["mine"] == workplace / "agents" / "mine.py"
    plugin = plugins.load("agent", "mine")
    assert plugin.__name__ == "Mine"
    assert "mine" not in plugins.available("workload")


def test_the_working_directory_cannot_replace_a_shipped_agent(workplace: Path):
    (workplace / "agents" / "knorm.py").write_text(AGENT)
    assert plugins.load("agent", "knorm").__name__ == "KNorm"
    assert plugins.load("agent", "agents/knorm.py").__name__ == "Mine"


@pytest.mark.parametrize("spelling", ["my-agent.py", "./my-agent.py", "{}/my-agent.py"])
def test_an_agent_loads_by_path(workplace: Path, spelling: str):
    (workplace / "my-agent.py").write_text(AGENT)
    plugin = plugins.load("agent", spelling.format(workplace))
    assert plugin(strength=2.0).strength == 2.0
    # Dataclasses and type hints find the module that they were defined in.
    assert sys.modules[plugin.__module__].__file__.endswith("my-agent.py")
    assert [field.name for field in dataclasses.fields(plugin)] == ["strength"]


def test_two_files_of_one_name_stay_apart(workplace: Path):
    for folder, strength in (("a", "1.0"), ("b", "2.0")):
        (workplace / folder).mkdir()
        (workplace / folder / "same.py").write_text(AGENT.replace("1.5", strength))
    first, second = (plugins.load("agent", f"{folder}/same.py") for folder in "ab")
    assert (first().strength, second().strength) == (1.0, 2.0)
    assert first.__module__ != second.__module__


def test_imported_and_private_classes_are_not_counted(workplace: Path):
    (workplace / "one.py").write_text(
        "from kvenv.learning.agent import Heuristic\n"
        "class _Base(Heuristic):\n    pass\n"
        "class Options:\n    pass\n" + AGENT
    )
    assert plugins.load("agent", "one.py").__name__ == "Mine"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("knrom", ["unknown agent 'knrom'", "knorm", "path"]),
        ("./missing.py", ["'./missing.py'", "does not exist"]),
        ("agents/", ["'agents/'", "does not exist"]),
        ("notes.txt", ["unknown agent 'notes.txt'"]),
        ("./notes.txt", ["not a Python file", ".py"]),
    ],
)
def test_what_is_not_there_is_an_error_that_helps(workplace: Path, name: str, words: list[str]):
    (workplace / "notes.txt").write_text("notes")
    with pytest.raises(KvenvError) as caught:
        plugins.load("agent", name)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1", ["exactly one public class", "fit()", "none"]),
        (AGENT + AGENT.replace("Mine", "Other"), ["exactly one", "Mine, Other"]),
        ("class Sampler:\n    def sample(self): ...", ["exactly one", "none"]),
        ("import no_such_module", ["failed to load", "ModuleNotFoundError", "no_such_module"]),
        ("def broken(:", ["failed to load", "SyntaxError"]),
        ("1 / 0", ["failed to load", "ZeroDivisionError: division by zero"]),
    ],
)
def test_a_file_that_defines_no_agent_is_an_error(workplace: Path, source: str, words: list[str]):
    (workplace / "mine.py").write_text(source)
    before = set(sys.modules)
    with pytest.raises(KvenvError) as caught:
        plugins.load("agent", "./mine.py")
    assert all(word in str(caught.value) for word in ["mine.py", *words])
    if "failed to load" in words:
        assert not {name for name in set(sys.modules) - before if name.startswith("kvenv_agent")}
