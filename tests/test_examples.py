"""Every example and every snippet of the README runs."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from kvenv.cli import main
from kvenv.plugins import load
from kvenv.rules import refresh_interval
from kvenv.scorers import load_scorer
from kvenv.scorers.network import Architecture

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_rank_env_draws_the_oracle(monkeypatch, capsys) -> None:
    run("rank_env.py", monkeypatch=monkeypatch)
    assert "normalized score 1.000" in capsys.readouterr().out
    picture = np.asarray(Image.open("rank.png"))
    assert picture.shape == (540, 960, 3)
    assert picture.std() > 10


def test_train_kvp_beats_chance(monkeypatch, capsys) -> None:
    run("train_kvp.py", "--steps", "30", monkeypatch=monkeypatch)
    assert load_scorer("kvp").metrics["normalized_score"] > 0.5
    assert "sink-free" in capsys.readouterr().out


@pytest.mark.slow
def test_generate_stays_within_its_budget(monkeypatch, capsys) -> None:
    run("generate.py", "--max-new-tokens", "8", monkeypatch=monkeypatch)
    held = re.search(r"(\d+) of (\d+) tokens held", capsys.readouterr().out)
    assert held is not None
    assert 128 - refresh_interval(128) < int(held[1]) <= 128 < int(held[2])


@pytest.mark.slow
def test_a_workload_and_an_agent_of_ones_own() -> None:
    """The README's two commands, shortened."""
    commands = re.findall(r"^    kvenv (.*examples/my_.*)$", README, flags=re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command.replace("examples/", f"{EXAMPLES}/"))
        short = ["--json", "r.json"] if words[0] == "evaluate" else ["--episodes", "2"]
        assert main([*words, *short]) == 0
    agents = json.loads(Path("r.json").read_text())["agents"]
    assert agents.keys() == {"my_agent.py", "knorm", "oracle"}


def test_watch_stream_writes_a_gif_and_a_film(monkeypatch, capsys) -> None:
    pytest.importorskip("moviepy")
    run("watch_stream.py", "--mp4", "--every", "40", monkeypatch=monkeypatch)
    assert "retention 0.9" in capsys.readouterr().out
    picture = Image.open("stream.gif")
    assert (picture.size, picture.n_frames) == ((960, 540), 9)
    assert [path.suffix for path in Path("videos").iterdir()] == [".mp4"]


def test_sb3_ppo_beats_chance(monkeypatch, capsys) -> None:
    run("sb3_ppo.py", "--steps", "256", monkeypatch=monkeypatch)
    normalized_score = float(re.findall(r"normalized score (.*)", capsys.readouterr().out)[-1])
    assert normalized_score > 0.5
    assert load_scorer("ppo").heads == {(10, 1)}


ABLATION = ["--train", "sample", "--validation", "sample", "--heads", "10:1", "--steps", "4"]


def test_ablation_compares_variants(monkeypatch, capsys) -> None:
    run("ablation.py", *ABLATION, "--only", "s*: *double", monkeypatch=monkeypatch)
    run("ablation.py", *ABLATION, "--only", "signal: [pl]*[!d]", monkeypatch=monkeypatch)
    names = ["signal: pairwise", "signal: pairwise, 64 pairs", "signal: listwise"]
    results = json.loads(Path("ablation.json").read_text())["variants"]
    assert list(results) == names
    for name, figures in results.items():
        assert figures["agent"] in name
        assert figures["options"]["steps"] == 4
        assert figures["options"]["lr"] == load("agent", figures["agent"])().lr
        for part in ("normalized_score", "sink_free"):
            assert figures[part]["low"] <= figures[part]["mean"] <= figures[part]["high"] <= 1
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("steps: double", *names))


def test_ablation_knows_its_variants(monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        run("ablation.py", "--only", "luck*", monkeypatch=monkeypatch)
    assert "matches none of: signal: pairwise, then expected" in capsys.readouterr().err


def test_every_variant_of_the_ablation_is_one_that_its_agent_takes() -> None:
    variants = runpy.run_path(str(EXAMPLES / "ablation.py"))["VARIANTS"]
    for name, (agent, options) in variants.items():
        plugin = load("agent", agent)
        made = plugin(**{**options, "steps": 4, "lr": plugin().lr})
        architecture = Architecture(tuple(made.inputs), tuple(made.hidden))
        assert architecture.width(64) >= 64, name


def test_learning_curves_are_drawn(monkeypatch) -> None:
    sets = [
        word for option in ("train", "validation", "test") for word in (f"--{option}", "sample")
    ]
    run("learning_curves.py", *sets, "--heads", "10:1", "--share", "0.005", monkeypatch=monkeypatch)
    results = json.loads(Path("learning_curves.json").read_text())
    for title in ("PPO on Rank-v1", "MaskablePPO on Evict-v1"):
        assert len(results[title]["curves"]["10:1"]) >= 1
        assert results[title]["test"].keys() == {
            "learned",
            "random",
            "streaming",
            "knorm",
            "oracle",
        }
        assert results[title]["test"]["oracle"]["10:1"]["mean"] > 0.9
    assert np.asarray(Image.open("learning_curves.png")).std() > 10


@pytest.fixture
def tiny(checkpoints) -> str:
    """A model of bytes, in the working directory."""
    shutil.copytree(checkpoints(0), "tiny")
    return "tiny"


def module(name: str) -> ModuleType:
    """An example whose constants can be changed before it runs."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def commands(printed: str) -> list[str]:
    """The first two words of every command that an example said it ran."""
    return [" ".join(line.split()[2:4]) for line in printed.splitlines() if line.startswith("$ ")]


def test_the_zoo_is_rebuilt_and_what_is_trained_is_not_trained_again(
    tiny: str, monkeypatch, capsys
) -> None:
    zoo = module("build_zoo")
    sizes = {"text": "60 --future-tokens 8", "ruler": "300 --future-tokens 120"}
    sizes["long"] = "240 --future-tokens 8"
    for workload, size in sizes.items():
        zoo.LENGTHS[workload] = f"--prompt-tokens {size}"
    for name, line in zoo.SETS.items():
        needles = " --tasks niah_single --prompting agnostic" if "ruler" in name else ""
        zoo.SETS[name] = f"{line}{needles}"
    sets = next(iter(zoo.AGENTS.values()))[1]
    zoo.AGENTS["kvp-tiny"] = (tiny, sets, "--steps 200 --hidden 4")
    words = ["build_zoo.py", "kvp-tiny", "--work", "zoo", "--share", "0.01"]
    monkeypatch.setattr(sys, "argv", words)
    zoo.main()
    first = commands(capsys.readouterr().out)
    assert first.count("train kvp") == 1
    assert len([line for line in first if line.startswith("record")]) == len(zoo.SETS)
    bundle = Path("zoo/kvp-tiny")
    scorer = load_scorer(bundle)
    assert scorer.training["options"]["steps"] == 2
    assert len(scorer.training["traces"]) == len(sets.split(","))
    assert scorer.network.weights[0].shape == (4, 16, 4)
    for figures in ("text-test", "ruler-test", "long-test"):
        agents = json.loads(Path(f"zoo/tiny/{figures}.json").read_text())["agents"]
        assert list(agents) == ["kvp-tiny", *zoo.OTHERS.split(",")]
    card = (bundle / "README.md").read_text()
    assert "\npython examples/build_zoo.py kvp-tiny --share 0.01\n" in card
    assert all(limit in card for limit in zoo.LIMITS)
    zoo.main()
    assert "train kvp" not in commands(capsys.readouterr().out)
    assert (bundle / "README.md").read_text() == card


@pytest.mark.slow
def test_the_ruler_table_measures_what_is_missing(tiny: str, monkeypatch, capfd) -> None:
    table = module("ruler_table")

    def measured(agents: str) -> list[str]:
        line = f"--model {tiny} --agents {agents} --tasks niah_single --lengths 300"
        monkeypatch.setattr(sys, "argv", ["ruler_table.py", *line.split(), "--prompts", "2"])
        table.main()
        (group,) = json.loads(Path("ruler.json").read_text())["accuracy"]["groups"]
        assert (group["task"], group["prompts"]) == ("niah_single", 2)
        assert list(group["agents"]) == agents.split(",")
        return commands(capfd.readouterr().out)

    both = ["record ruler", "evaluate --traces"]
    assert measured("knorm,expected") == both
    assert measured("knorm,expected") == []
    assert measured("knorm") == both


@pytest.mark.slow
def test_linear_agent_learns_and_decodes(monkeypatch, capsys) -> None:
    run("linear_agent.py", monkeypatch=monkeypatch)
    assert "of 30 layers evict" in capsys.readouterr().out


@pytest.mark.slow
def test_demo(monkeypatch) -> None:
    sizes = ["--episodes", "2", "--held-out", "2", "--prompt-tokens", "200", "--steps", "4"]
    run("demo.py", "--out", "demo", *sizes, monkeypatch=monkeypatch)
    results = json.loads(Path("demo/retention.json").read_text())
    assert len(results["heads"]) == 90
    assert results["documents"] == 4


def test_the_readme_has_its_five_snippets() -> None:
    assert len(SNIPPETS) == 5


@pytest.mark.parametrize(
    "snippet",
    [pytest.param(s, marks=pytest.mark.slow if "generate" in s else ()) for s in SNIPPETS],
)
def test_readme_snippets_run(snippet: str) -> None:
    exec(compile(snippet, "README.md", "exec"), {})
