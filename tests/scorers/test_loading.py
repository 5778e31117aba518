from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvenv import plugins
from kvenv.errors import KvenvError
from kvenv.scorers import NetworkScorer, load_scorer
from kvenv.trace import TraceSet


@pytest.fixture(scope="module")
def trained(tiny_traces: Callable[..., TraceSet], tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("trained")
    scorer = plugins.load("agent", "kvp")(steps=1).fit([tiny_traces(folder / "traces")])
    scorer.save_pretrained(folder / "mine")
    return folder / "mine"


@pytest.mark.parametrize("form", [str, Path])
def test_a_bundles_folder(trained: Path, form: type):
    scorer = load_scorer(form(trained))
    assert isinstance(scorer, NetworkScorer)
    assert scorer.training["agent"] == "kvp"


@pytest.fixture
def zoo(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped agents, with two trained ones and a folder that is none."""
    shutil.copytree(
        plugins.shipped_folder("agents"),
        tmp_path / "agents",
        ignore=shutil.ignore_patterns("trained"),
    )
    monkeypatch.setattr(plugins, "shipped_folder", lambda name: tmp_path / name)
    for name in ("kvp-tiny", "kvp-small"):
        scorer = NetworkScorer.from_pretrained(trained)
        scorer.save_pretrained(tmp_path / "agents" / "trained" / name, dtype=torch.float16)
    (tmp_path / "agents" / "trained" / "notes").mkdir()
    return tmp_path / "agents" / "trained"


def test_a_shipped_trained_agent(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert plugins.trained() == {name: zoo / name for name in ("kvp-small", "kvp-tiny")}
    (tmp_path / "elsewhere" / "kvp-tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")  # where a folder of that name hides nothing
    assert isinstance(load_scorer("kvp-tiny"), NetworkScorer)


def test_no_agent_is_trained_where_none_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plugins, "shipped_folder", lambda name: tmp_path / name)
    assert plugins.trained() == {}


@pytest.mark.parametrize("asked", ["kvp-huge", "notes", "trained"])
def test_an_unknown_agent_is_an_error_that_names_the_trained_ones_too(zoo: Path, asked: str):
    with pytest.raises(KvenvError, match=rf"unknown agent '{asked}'.*knorm.*kvp-small, kvp-tiny"):
        load_scorer(asked)


def test_an_agent_that_has_to_be_trained_is_an_error_that_names_those_that_are(zoo: Path):
    with pytest.raises(KvenvError, match=r"'kvp' has .*, or use one that is: kvp-small, kvp-tiny"):
        load_scorer("kvp")


def test_a_heuristic():
    assert type(load_scorer("knorm")).__name__ == "KNorm"


@pytest.mark.parametrize("form", [str, Path])
def test_an_agents_file(tmp_path: Path, form: type):
    path = tmp_path / "mine.py"
    path.write_text(
        "from kvenv.learning.agent import Heuristic\nclass Mine(Heuristic):\n    pass\n"
    )
    assert type(load_scorer(form(path))).__name__ == "Mine"


def test_an_agent_that_has_to_be_trained_is_an_error_that_says_how():
    with pytest.raises(KvenvError, match="'kvp' has to be trained first: run `kvenv train kvp"):
        load_scorer("kvp")


def test_a_heuristic_whose_options_have_no_defaults_is_an_error(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from kvenv.learning.agent import Heuristic\nclass Mine(Heuristic):\n"
        "    def __init__(self, strength: float):\n        self.strength = strength\n"
    )
    with pytest.raises(KvenvError, match=r"mine.py' cannot be used by name .*'strength'.*defaults"):
        load_scorer(path)


def test_an_unknown_agent_is_an_error_that_names_those_there_are():
    with pytest.raises(KvenvError, match=r"unknown agent 'knrom'.*knorm.*streaming"):
        load_scorer("knrom")


def test_a_folder_that_is_no_bundle_is_an_error(tmp_path: Path):
    with pytest.raises(KvenvError, match="is not a bundle"):
        load_scorer(tmp_path)


def test_a_folder_hides_no_heuristic_but_a_bundle_may_be_named_like_its_agent(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("kvp", "knorm"):
        NetworkScorer.from_pretrained(trained).save_pretrained(name)
    assert isinstance(load_scorer("kvp"), NetworkScorer)
    assert type(load_scorer("knorm")).__name__ == "KNorm"
