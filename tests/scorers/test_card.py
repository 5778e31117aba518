"""Model cards: what the hub reads in them, what people read, and that their own code runs."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from kvenv import identity, models, plugins
from kvenv.cli import main
from kvenv.evaluation.retention import measure
from kvenv.evaluation.statistics import summarise
from kvenv.rules import refresh_interval
from kvenv.scorers import NetworkScorer, load_scorer
from kvenv.scorers.card import COLUMNS, _ranges, card, origin, write_card
from kvenv.scorers.network import Architecture
from kvenv.trace import TraceSet

COMMAND = "kvenv record text --out runs/text\nkvenv train kvp --traces runs/text --out NAME"


@pytest.fixture(scope="module")
def evaluated(
    tiny_traces: Callable[..., TraceSet], quick_agent, tmp_path_factory: pytest.TempPathFactory
) -> tuple[NetworkScorer, dict[str, Any]]:
    """A scorer of random traces and its evaluation on others."""
    folder = tmp_path_factory.mktemp("traces")
    scorer = quick_agent("kvp").fit([tiny_traces(folder / "train")])
    held_out = tiny_traces(folder / "test", seed=100)
    rivals = {name: load_scorer(name) for name in ("knorm", "streaming", "oracle")}
    measured = measure([held_out], {"kvp-tiny": scorer, **rivals})
    results = {
        "format": "kvenv-evaluation",
        "version": 2,
        "command": "kvenv evaluate --traces runs/test",
        "date": "2026-01-02",
        "model": held_out.model.id,
        "traces": [held_out.manifest.origin],
        **summarise(measured),
    }
    return scorer, json.loads(json.dumps(results))


def rows_of(text: str, corner: str) -> dict[str, list[str]]:
    """The rows of a Markdown table, by what stands in their first column."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {corner} |"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[first.strip("*")] = cells
    return rows


def test_the_hub_reads_what_was_measured(evaluated):
    scorer, results = evaluated
    text = card(scorer, results, "kvp-tiny", COMMAND, base_model="someone/tiny")
    parsed = ModelCard(text)
    assert str(parsed) == text
    data = parsed.data
    assert data.license == "apache-2.0"
    assert data.base_model == "someone/tiny"
    assert data["library_name"] == "kvenv"
    assert {"kvenv", "kv-cache", "kvp"} <= set(data.tags)
    assert data.model_name == "kvp-tiny"
    own = results["agents"]["kvp-tiny"]
    found = {one.metric_type: one for one in data.eval_results}
    assert len(found) == len(data.eval_results) == 2 * len(COLUMNS)
    for metric in COLUMNS:
        for kind, name in (("full", metric), ("sink_free", f"sink_free_{metric}")):
            one = found[name]
            assert one.dataset_type == "random"
            assert one.metric_value == pytest.approx(own[kind][metric]["mean"], abs=1e-6)
            assert one.metric_args["low"] == pytest.approx(own[kind][metric]["low"], abs=1e-6)
            assert one.metric_args["high"] == pytest.approx(own[kind][metric]["high"], abs=1e-6)
            assert one.metric_args["documents"] == 3


@pytest.mark.parametrize("kind", ["full", "sink_free"])
def test_tables_hold_every_agents_figures_with_their_intervals(evaluated, kind: str):
    scorer, results = evaluated
    text = card(scorer, results, "kvp-tiny", COMMAND)
    rows = rows_of(text, {"full": "all tokens", "sink_free": "sink-free"}[kind])
    assert next(iter(rows)) == "oracle"  # the best first
    assert rows.keys() == results["agents"].keys()
    for name, cells in rows.items():
        for metric, cell in zip(COLUMNS, cells, strict=True):
            one = results["agents"][name][kind][metric]
            assert cell == f"{one['mean']:.3f} ({one['low']:.3f} to {one['high']:.3f})"


def test_what_the_best_heuristic_does_better_is_told(evaluated):
    scorer, results = copy.deepcopy(evaluated)
    versus = results["comparison"]["kvp-tiny"]
    versus["full"]["normalized_score"] = {"difference": -0.0123, "low": -0.02, "high": 0.001}
    versus["full"]["normalized_score"]["baseline"] = "knorm"
    heads = {"wins": 3, "of": 4, "behind": [[3, 1, "streaming", -0.0123]]}
    versus["full"] |= {"heads": heads, "improvement": {"mean": 0.75, "low": 0.5, "high": 0.875}}
    text = card(scorer, results, "kvp-tiny", COMMAND)
    rows = rows_of(text, "difference")
    assert rows["normalized_score"][0] == "-0.012 (-0.020 to +0.001) over knorm"
    other = versus["sink_free"]["retention@1/4"]
    assert rows["1/4"][1].startswith(f"{other['difference']:+.3f} (")
    assert rows["1/4"][1].endswith(f"over {other['baseline']}")
    assert "all tokens, 3 of 4 heads" in text
    assert "with probability 0.750 (0.500 to 0.875)" in text
    assert "Behind: layer 3 head 1 (streaming, by 0.0123)." in text


def test_it_says_what_it_is_and_where_it_comes_from(evaluated):
    scorer, results = evaluated
    text = card(scorer, results, "kvp-tiny", COMMAND, limits=["It was trained on noise."])
    assert f"```bash\n{COMMAND}\n```" in text
    assert "(seed 0)" in text
    assert scorer.model.fingerprint in text
    assert "Each of 4 attention heads (layers 1, 3)" in text
    assert "reads key and value of" in text
    assert "- trace set: random (seed 0)" in text
    assert "steps 2" in text
    assert "- It was trained on noise.\n" in text
    assert "\n\n\n" not in text


def test_without_results_there_is_no_index(make):
    text = card(make(), None, "kvp-tiny", COMMAND)
    assert ModelCard(text).data.eval_results is None
    assert "None were given" in text


def test_evaluations_on_several_workloads_stand_side_by_side(evaluated):
    scorer, results = evaluated
    other = copy.deepcopy(results)
    other["traces"] = [{"workload": "ruler", "arguments": {"prompt_tokens": 1024}, "seed": 1}]
    text = card(scorer, [results, other], "kvp-tiny", COMMAND)
    kinds = [one.dataset_type for one in ModelCard(text).data.eval_results]
    assert kinds == ["random"] * 10 + ["ruler"] * 10
    assert "### ruler (prompt_tokens 1024, seed 1)" in text


def test_the_hub_s_own_name_of_a_known_model(make):
    scorer = make(model=replace(make.info, id="gemma-3-270m"))
    text = card(scorer, None, "kvp-gemma", COMMAND)
    assert ModelCard(text).data.base_model == "google/gemma-3-270m"
    assert 'models.load("gemma-3-270m")' in text


@given(
    folders=st.lists(st.text("abcXYZ_", min_size=1, max_size=8), min_size=1, max_size=4),
    windows=st.booleans(),
)
def test_no_folder_of_a_machine_is_told(folders: list[str], windows: bool):
    path = "/secret/" + "/".join(folders)
    arguments = {"paths": [path], "model": path, "prompt_tokens": 768, "generate": None}
    told = origin({"workload": f"{path}.py", "arguments": arguments, "seed": 3})
    last = folders[-1]
    assert told == f"{last} (paths {last}, model {last}, prompt_tokens 768, seed 3)"


@given(numbers=st.sets(st.integers(0, 40)))
def test_ranges_hold_just_those_numbers(numbers: set[int]):
    found = set()
    for run in _ranges(numbers).split(", ") if numbers else ():
        first, _, last = run.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
        assert int(first) - 1 not in numbers
    assert found == numbers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(format="kvenv-bench"), ["no evaluation", "kvenv evaluate --json"]),
        (lambda r: r.update(model="other"), ["are of other", "is for tiny"]),
        (lambda r: r["agents"].pop("kvp-tiny"), ["no agent 'kvp-tiny'", "knorm, streaming"]),
        (
            lambda r: r["agents"]["knorm"]["sink_free"].pop("retention@1/4"),
            ["lack retention@1/4 (sink_free) of knorm"],
        ),
    ],
)
def test_results_that_are_not_its_own_are_an_error(evaluated, error_of, change, words):
    scorer, results = copy.deepcopy(evaluated)
    change(results)
    message = error_of(lambda: card(scorer, results, "kvp-tiny", COMMAND))
    assert all(word in message for word in words)


# In a folder


def test_a_card_is_written_into_its_bundle(evaluated, tmp_path: Path):
    scorer, results = evaluated
    scorer.save_pretrained(tmp_path / "kvp-tiny", dtype=torch.float16)
    path = write_card(tmp_path / "kvp-tiny", results, COMMAND, limits=["One."])
    assert path == tmp_path / "kvp-tiny" / "README.md"
    assert ModelCard.load(path).data.model_name == "kvp-tiny"
    back = NetworkScorer.from_pretrained(tmp_path / "kvp-tiny")
    assert back.card == path.read_text(encoding="utf-8") == str(ModelCard.load(path))
    # Another name for it, in the place of the first card.
    write_card(tmp_path / "kvp-tiny", results, COMMAND, name="other", agent="kvp-tiny")
    assert path.read_text(encoding="utf-8").splitlines().count("# other") == 1
    files = {"README.md", "config.json", "model.safetensors"}
    assert {file.name for file in path.parent.iterdir()} == files


def test_a_card_that_cannot_be_written_leaves_the_one_there_was(
    make, tmp_path: Path, error_of, monkeypatch: pytest.MonkeyPatch
):
    make().save_pretrained(tmp_path / "kvp")
    path = write_card(tmp_path / "kvp", None, "first")
    was = path.read_text(encoding="utf-8")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    message = error_of(lambda: write_card(tmp_path / "kvp", None, "second"))
    assert "No space left on device" in message
    assert path.read_text(encoding="utf-8") == was
    assert len(list(path.parent.iterdir())) == 3


def test_a_card_needs_a_bundle(tmp_path: Path, error_of):
    assert "not a bundle" in error_of(lambda: write_card(tmp_path, None, COMMAND))


# Its own code


@pytest.mark.parametrize("layers", [(0, 1), (1,)], ids=["every head", "some heads"])
def test_what_a_card_tells_to_run_runs(
    checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, layers: tuple[int, ...]
):
    folder = checkpoints(0)
    info = identity.describe(*models.load(str(folder)))
    heads = [head for head in info.heads if head[0] in layers]
    shape = Architecture(("key",), (4,))
    network = shape.build(heads, info.head_dim, torch.Generator().manual_seed(0))
    shipped = tmp_path / "agents"
    shutil.copytree(plugins.shipped_folder("agents"), shipped)
    monkeypatch.setattr(plugins, "shipped_folder", lambda name: tmp_path / name)
    NetworkScorer(network, shape, info).save_pretrained(shipped / "trained" / "kvp-tiny")
    write_card(shipped / "trained" / "kvp-tiny", None, COMMAND, base_model=str(folder))
    text = load_scorer("kvp-tiny").card
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    told: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), told)
    batch, kept, most = told["cache"].positions(1).shape
    assert (batch, kept) == (1, 2)
    assert 128 - refresh_interval(128) <= most <= 128
    assert told["cache"].get_seq_length() > 128
    command = next(line for line in text.splitlines() if line.startswith("kvenv generate"))
    assert ("--fallback knorm" in command) == (len(heads) < 4)
    capsys.readouterr()
    assert main(shlex.split(command)[1:]) == 0
    assert "tokens a head kept" in capsys.readouterr().out
