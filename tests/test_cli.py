"""The command line: what users type, what they get, and what they are told when it cannot be."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvenv import cli, commands, parsing
from kvenv.commands import recording
from kvenv.errors import KvenvError
from kvenv.evaluation.calibrating import calibrate as fit
from kvenv.scorers import Calibration, NetworkScorer, load_scorer
from kvenv.trace import TraceSet

WORKLOAD = '''
from kvenv.recording.workload import Sample

class Numbers:
    """Random tokens.

    Args:
        shift: added to every token.
        tags: kept as metadata.
    """

    def __init__(self, shift: int = 0, tags: list[str] | None = None) -> None:
        self.shift = shift
        self.tags = tags

    def sample(self, index, *, tokenizer, rng, prompt_tokens, future_tokens, seed):
        ids = (rng.integers(0, 256, prompt_tokens + future_tokens) + self.shift).tolist()
        return Sample(
            ids[:prompt_tokens], ids[prompt_tokens:], f"document {index}", {"tags": self.tags}
        )
'''
SIZES = "--episodes 4 --prompt-tokens 24 --future-tokens 6 --shard-episodes 2".split()


def kvenv(*arguments: object) -> int:
    """Run a command in this process."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as ended:  # argparse's way to end after --help
        return int(ended.code or 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, checkpoints) -> Path:
    """A folder with two models' traces and bundles of all heads and of one; not to be changed."""
    root = tmp_path_factory.mktemp("made")
    (root / "source.py").write_text(WORKLOAD)
    for seed in (0, 1):
        (root / f"model{seed}").symlink_to(checkpoints(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for seed in (0, 1):
            out = f"traces{seed}"
            model = f"model{seed}"
            assert kvenv("record", "./source.py", "--model", model, "--out", out, *SIZES) == 0
        train = ("train", "kvp", "--traces", "traces0", "--steps", "2", "--hidden", "8")
        assert kvenv(*train, "--out", "bundle") == 0
        assert kvenv(*train, "--out", "one/bundle", "--heads", "0:1") == 0
    return root


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `made` as the working directory."""
    shutil.copytree(made, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def listing(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


Refused = Callable[..., str]


@pytest.fixture
def refused(work: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must fail: status 2, one line, nothing written. Returns the line."""

    def run(command: str, *parts: str) -> str:
        before = listing(work)
        capfd.readouterr()
        assert kvenv(*command.split(" ")) == 2
        line = capfd.readouterr().err
        assert line.startswith("kvenv: error: ")
        assert line.endswith("\n")
        assert line.count("\n") == 1, line
        assert "Traceback" not in line
        for part in parts:
            assert part in line
        assert listing(work) == before
        return line

    return run


RECORD = "record ./source.py --model model0 --out new --prompt-tokens 24"
TRAIN = "train kvp --traces traces0 --out new"
GENERATE = "generate hello --model model0"


@pytest.mark.parametrize(
    "command",
    [
        *("", "record", "record text", "record ruler", "record chat", "train", "train kvp"),
        *("record boolq", "record arc", "record longbench", "record govreport"),
        *("inspect", "evaluate", "generate", "calibrate", "report"),
    ],
)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert kvenv(*command.split(), "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: kvenv {command}".rstrip())
    assert not re.search(r"--\w+_", text), "an option is spelt with an underscore"
    for ugly in ("<class", "Optional[", "Union[", "Literal[", "null", "+ ", "=flags", "None"):
        assert ugly not in text
    for line in text.splitlines():
        assert len(line) <= 100


def test_help_shows_defaults_choices_and_what_is_required(capsys) -> None:
    kvenv("record", "text", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--prompt-tokens PROMPT_TOKENS length of the prompts, whose tokens" in text
    assert "(default: 512)" in text
    assert "--out OUT the trace set's folder (required)" in text
    assert "(one of greedy, sampled)" in text
    assert "(separated by commas; default: .py,.md,.txt,.rst)" in text
    assert "{train,validation,test,all}" in text


def test_version(capsys) -> None:
    assert kvenv("--version") == 0
    assert re.fullmatch(r"kvenv \d+\.\d+\S*\n", capsys.readouterr().out)


def test_inspect_tells_and_verifies(work, capsys) -> None:
    assert kvenv("inspect", "traces0", "--verify") == 0
    text = capsys.readouterr().out
    assert "all 2 shards match their checksums" in text
    for key, value in (("model", "model0"), ("complete", "yes"), ("prompt tokens", "96")):
        assert re.search(rf"{key}\s+│ {value} ", text)


def test_options_and_yaml_do_the_same(work) -> None:
    record = f"model: model0\nout: {{out}}\nseed: 5\nshift: 0\ntags: [a, b]\n{''.join(YAML)}"
    Path("r.yaml").write_text(record.format(out="a"))
    assert kvenv("record", "./source.py", "--config", "r.yaml") == 0
    options = ("--model", "model0", "--seed", 5, "--shift", 0, "--tags", "a,b", *SIZES)
    assert kvenv("record", "./source.py", *options, "--out", "b") == 0
    assert listing(work / "a") == listing(work / "b")
    assert TraceSet("a").info(0).metadata == {"tags": ["a", "b"]}

    Path("t.yaml").write_text("traces: a\nout: c\nsteps: 2\nhidden: [8, 4]\nheads: '0:1,1:0'\n")
    assert kvenv("train", "kvp", "--config", "t.yaml", "--seed", 3) == 0
    options = ("--traces", "a", "--steps=2", "--hidden", "8,4", "--heads", "0:1,1:0")
    assert kvenv("train", "kvp", *options, "--out", "d", "--seed", 3) == 0
    weights = [load_file(Path(out) / "model.safetensors") for out in "cd"]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])

    Path("e.yaml").write_text("traces: b\nagents: knorm,c\njson: e.json\nheads: 0:1\n")
    assert kvenv("evaluate", "--config", "e.yaml") == 0
    options = ("--traces", "b", "--agents", "knorm, d", "--heads", "0:1")
    assert kvenv("evaluate", *options, "--json", "f.json") == 0
    first, second = (json.loads(Path(name).read_text()) for name in ("e.json", "f.json"))
    assert first["heads"] == second["heads"] == [[0, 1]]
    assert first["agents"]["c"] == second["agents"]["d"]
    assert first["agents"]["knorm"] == second["agents"]["knorm"]


YAML = "episodes: 4\nprompt_tokens: 24\nfuture_tokens: 6\nshard_episodes: 2\n"


def test_a_prompt_comes_from_options_yaml_a_file_or_standard_input(
    work, capsys, monkeypatch
) -> None:
    def answer(*arguments: object) -> str:
        settings = ("--model", "model0", "--max-new-tokens", 8, "--budget", 24)
        assert kvenv("generate", *arguments, *settings) == 0
        return capsys.readouterr().out

    expected = answer("hello there")
    assert expected != answer("hello then")
    Path("prompt.txt").write_text("hello there")
    Path("g.yaml").write_text("prompt: hello there\nagent: knorm\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello there"))
    assert answer("@prompt.txt") == expected
    assert answer("-") == expected
    assert answer("--config", "g.yaml") == expected
    assert answer("--config", "g.yaml", "hello then") == answer("hello then")


def test_print_config_is_a_config(work, capsys) -> None:
    options = ("record", "./source.py", "--model", "model0", "--out", "new", "--tags", "a,b")
    assert kvenv(*options, *SIZES, "--print-config") == 0
    Path("all.yaml").write_text(capsys.readouterr().out)
    assert not Path("new").exists()
    assert kvenv("record", "./source.py", "--config", "all.yaml") == 0
    assert TraceSet("new").info(3).metadata == {"tags": ["a", "b"]}


def test_a_bare_generate_is_greedy(work) -> None:
    assert kvenv(*RECORD.split(), *SIZES, "--generate", "--seed", 1, "--layers", "1") == 0
    manifest = TraceSet("new").manifest
    assert manifest.arguments["generate"] == "greedy"
    assert manifest.model.layers == (1,)


@pytest.mark.parametrize(
    ("text", "hint", "spelt"),
    [
        ("1,2", list[int] | None, "[1,2]"),
        ("1", list[int], "[1]"),
        ("[1, 2]", list[int], "[1, 2]"),
        ("null", list[int] | None, "null"),
        ("a: b, c", list[str], '["a: b", "c"]'),
        ("1,2", str | None, "1,2"),
    ],
)
def test_lists_are_given_with_commas(text: str, hint: Any, spelt: str) -> None:
    assert parsing._value(text, hint) == spelt


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("recrod", ["unknown command 'recrod'", "record, inspect"]),
        ("record nosuch --out new", ["unknown workload 'nosuch'", "ruler", "a .py file"]),
        ("record ./no.py --out new", ["'./no.py' does not exist"]),
        ("record --out new ./source.py", ["the workload comes first: kvenv record WORKLOAD"]),
        ("record ./source.py", ["--out must be given", "--help"]),
        (f"{RECORD} --bogus 3", ["--bogus"]),
        (f"{RECORD} --episodes x", ["--episodes 'x': give a whole number"]),
        (f"{RECORD} --prompt-tokens", ["--prompt-tokens: expected one argument"]),
        (f"{RECORD} --queries some", ["--queries 'some': give one of future, all"]),
        (f"{RECORD} --generate fast", ["--generate 'fast': give one of greedy, sampled"]),
        (f"{RECORD} --layers 0,x", ["--layers", "a whole number, or several separated by commas"]),
        (f"{RECORD} --layers 7", ["layers [7]", "choose from [0, 1]"]),
        (f"{RECORD} --episodes 0", ["episodes is 0"]),
        (f"{RECORD} --prompt-tokens 600", ["600 + 64 tokens exceed the 512-token context"]),
        (f"{RECORD} --dtype foo", ["dtype 'foo'", "float32"]),
        (f"{RECORD} --device foo", ["device 'foo'", "give cpu"]),
        (f"{RECORD} --config no.yaml", ["no.yaml"]),
        ("record ./source.py --out new --model nosuch", ["'nosuch'", "folder", "pip install"]),
        ("record ./source.py --out new --model traces0", ["'traces0' has no config.json"]),
        (
            "record ./source.py --out bundle --model model0 --prompt-tokens 9",
            ["not empty and no trace set"],
        ),
        (
            "record ./source.py --out traces0 --model model1 --prompt-tokens 9",
            ["holds another trace set"],
        ),
        ("inspect", ["folder must be given"]),
        ("inspect nosuch", ["no trace set 'nosuch'"]),
        ("inspect bundle", ["bundle is no trace set", "kvenv record"]),
        ("inspect traces0 more", ["more"]),
        ("train knorm --traces traces0 --out new", ["'knorm' learns nothing", "--agents knorm"]),
        ("train nosuch --traces traces0 --out new", ["unknown agent 'nosuch'", "kvp"]),
        ("train kvp --traces traces0,traces1 --out new", ["different models", "model0", "model1"]),
        (f"{TRAIN} --validation traces1", ["different models", "model0", "model1"]),
        ("train kvp --traces , --out new", ["--traces ',' names nothing"]),
        ("train kvp --traces bundle --out new", ["bundle is no trace set"]),
        ("train kvp --traces traces0 --out bundle", ["holds a bundle already", "--overwrite"]),
        ("train kvp --traces traces0 --out traces1", ["exists and is not a bundle"]),
        ("train kvp --traces traces0 --out model1 --overwrite", ["exists and is not a bundle"]),
        (f"{TRAIN} --seed -1", ["seed is -1"]),
        (f"{TRAIN} --credit plain --samples 1", ["samples is 1", "give 2 or more"]),
        ("evaluate --traces traces0 --agents one/bundle --heads 1:1", ["no head is covered"]),
        (f"{TRAIN} --warm-start 2", ["warm_start is 2.0", "from 0 to 1"]),
        ("train pairwise --traces traces0 --out new --pairs 0", ["pairs is 0"]),
        (f"{TRAIN} --heads 0", ["heads '0'", "layer:head"]),
        (f"{TRAIN} --heads 9:9", ["heads [(9, 9)] are not recorded"]),
        (f"{TRAIN} --credit both", ["--credit 'both': give one of expected, reward_to_go"]),
        (f"{TRAIN} --evaluate-every 0", ["evaluate-every is 0"]),
        (f"{TRAIN} --checkpoint-every 0", ["checkpoint-every is 0"]),
        ("evaluate --traces traces0 --agents nosuch", ["unknown agent 'nosuch'", "knorm"]),
        ("evaluate --traces traces0 --agents kvp", ["'kvp' has to be trained first"]),
        ("evaluate --traces traces0 --agents model0", ["model0", "kvenv train"]),
        ("evaluate --traces traces1 --agents bundle", ["trained on model0", "score model1"]),
        ("evaluate --traces traces0,traces1 --agents knorm", ["different models"]),
        ("evaluate --traces traces0 --agents knorm --heads 5:0", ["heads [(5, 0)]"]),
        ("evaluate --traces traces0 --agents knorm --json traces1", ["'traces1' could not be"]),
        ("generate", ["give a prompt", "--traces with --episode"]),
        ("generate hello --traces traces0", ["give a prompt", "--traces with --episode"]),
        ("generate @no.txt --model model0", ["'no.txt'", "No such file"]),
        ("generate --traces traces1 --model model0", ["recorded from model1, not model0"]),
        ("generate --traces traces0 --model model0 --episode 9", ["no episode 9", "0..3"]),
        ("generate hello --model model1 --agent bundle", ["trained on model0", "score model1"]),
        (f"{GENERATE} --agent nosuch", ["unknown agent 'nosuch'"]),
        (f"{GENERATE} --agent oracle", ["utility"]),
        (f"{GENERATE} --agent one/bundle", ["no scores for 3 of the 4 heads", "fallback"]),
        (f"{GENERATE} --budget 0", ["budget 0 holds no token"]),
        (f"{GENERATE} --budget -3", ["budget -3 holds no token"]),
        (f"{GENERATE} --budget 1.5", ["budget 1.5 is not in (0, 1]"]),
        (f"{GENERATE} --budget 19", ["budget 19 cannot hold sinks and recent"]),
        (f"{GENERATE} --budget 0.5", ["budget 0.5 of 5 prompt tokens is 2"]),
        (f"{GENERATE} --budget lots", ["--budget 'lots': give a number"]),
        (f"{GENERATE} --max-new-tokens 0", ["max-new-tokens is 0"]),
    ],
)
def test_unusable_input_is_one_line(refused: Refused, command: str, parts: list[str]) -> None:
    refused(command, *parts)


def test_a_share_of_the_prompt_is_a_budget(work, capsys) -> None:
    command = "generate --traces traces0 --model model0 --budget 0.5 --recent 2 --max-new-tokens 3"
    assert kvenv(*command.split()) == 0
    assert "11 of 26 tokens a head kept" in capsys.readouterr().out


def test_compare_shows_both(work, capsys) -> None:
    command = f"{GENERATE} --compare --agent bundle --budget 6 --recent 1 --max-new-tokens 9"
    assert kvenv(*command.split()) == 0
    rows = re.findall(r"│ (full|bundle) +│ (\d+) ", capsys.readouterr().out)
    assert rows == [("full", "13"), ("bundle", "6")]


def test_a_bundle_of_some_heads_generates_with_a_fallback(work, capsys) -> None:
    command = f"{GENERATE} --agent one/bundle --fallback knorm --budget 24 --max-new-tokens 3"
    assert kvenv(*command.split()) == 0
    assert "7 of 7 tokens a head kept" in capsys.readouterr().out


def test_bundles_of_one_name_are_told_apart(work) -> None:
    agents = "bundle,one/bundle,knorm,oracle"
    assert kvenv("evaluate", "--traces", "traces0", "--agents", agents, "--json", "a.json") == 0
    result = json.loads(Path("a.json").read_text())
    assert set(result["agents"]) == {"bundle", "one/bundle", "knorm", "oracle"}
    assert result["heads"] == [[0, 1]]
    assert result["agents"]["oracle"]["full"]["normalized_score"]["mean"] == pytest.approx(1)


ADAPTIVE = "--tasks perplexity --allocations uniform,adaptive --budgets 0.5 --sinks 1 --recent 2"


def test_a_bundle_is_calibrated_in_place(work, capsys) -> None:
    before = load_scorer("bundle")
    assert isinstance(before, NetworkScorer)
    assert kvenv("calibrate", "bundle", "--traces", "traces0") == 0
    assert "calibrated 4 heads on 4 episodes; wrote bundle" in capsys.readouterr().out
    after, expected = load_scorer("bundle"), fit(before, [TraceSet("traces0")])
    assert isinstance(after, NetworkScorer)
    assert after.calibration is not None
    assert after.calibration.heads == expected.heads
    assert torch.equal(after.calibration.masses, expected.masses)
    for mine, theirs in zip(after.network.parameters(), before.network.parameters(), strict=True):
        assert torch.equal(mine, theirs)

    command = f"evaluate --traces traces0 --agents bundle --json a.json {ADAPTIVE}"
    assert kvenv(*command.split()) == 0
    agents = json.loads(Path("a.json").read_text())["perplexity"]["agents"]
    assert set(agents) == {"bundle", "bundle (adaptive)"}
    assert agents["bundle"] != agents["bundle (adaptive)"]


def test_a_heuristic_s_calibration_is_a_file(work, capsys) -> None:
    assert kvenv("calibrate", "knorm", "--traces", "traces0", "--out", "knorm.table") == 0
    assert "calibrated 4 heads on 4 episodes; wrote knorm.table" in capsys.readouterr().out
    found = Calibration.load("knorm.table")
    assert torch.equal(found.masses, fit(load_scorer("knorm"), [TraceSet("traces0")]).masses)

    command = "generate --traces traces0 --model model0 --budget 12 --recent 2 --max-new-tokens 3"
    assert kvenv(*command.split(), "--allocation=adaptive", "--calibration=knorm.table") == 0
    assert re.search(r"\b11 of 26 tokens a head kept", capsys.readouterr().out)
    command = f"evaluate --traces traces0 --agents knorm --json a.json {ADAPTIVE}"
    assert kvenv(*command.split(), "--calibrate-on", "traces0") == 0
    agents = json.loads(Path("a.json").read_text())["perplexity"]["agents"]
    assert agents["knorm"] != agents["knorm (adaptive)"]


def test_what_has_no_calibration_does_not_compete(refused: Refused) -> None:
    refused("calibrate knorm --traces traces0", "'knorm' is no bundle's folder", "--out FILE")
    refused(f"evaluate --traces traces0 --agents knorm {ADAPTIVE}", "knorm", "--calibrate-on")
    refused(f"{GENERATE} --allocation adaptive", "KNorm has no calibration", "kvenv calibrate")


def test_a_plug_in_may_not_take_the_command_s_options(refused: Refused, work: Path) -> None:
    agent = "class A:\n    trains = True\n    def __init__(self, {0}: int = 1): ...\n"
    agent += "    def fit(self, traces, heads=None, run=None): ...\n"
    for name in ("traces", "resume", "config"):
        Path("agent.py").write_text(agent.format(name))
        refused("train ./agent.py --traces traces0 --out new", f"options {name} are", "rename")


def spoil(file: str, change: Callable[[bytes], bytes]) -> None:
    Path(file).write_bytes(change(Path(file).read_bytes()))


def test_damaged_traces(refused: Refused, work: Path) -> None:
    shard = "traces0/shard-00001.h5"
    middle = Path(shard).stat().st_size // 2
    whole = Path(shard).read_bytes()
    # Past the keys' first chunk, wherever HDF5 puts it, lies data that evaluation reads.
    spoil(shard, lambda b: b[:middle] + bytes(x ^ 255 for x in b[middle:-99]) + b[-99:])
    refused("inspect traces0 --verify", "shard-00001.h5 is damaged", "record command again")
    refused("evaluate --traces traces0 --agents knorm", "shard-00001.h5 is damaged")
    refused(f"{TRAIN} --steps 4", "shard-00001.h5 is damaged")
    Path(shard).write_bytes(whole)
    spoil(shard, lambda b: b[:middle] + bytes([b[middle] ^ 1]) + b[middle + 1 :])
    refused("inspect traces0 --verify", "shard-00001.h5 is damaged")
    Path(shard).write_bytes(whole[:middle])
    for command in (
        "inspect traces0",
        "evaluate --traces traces0 --agents knorm",
        TRAIN,
        "generate --traces traces0 --model model0",
    ):
        refused(command, f"shard-00001.h5 is damaged ({middle} bytes, not {len(whole)})")


def test_nan_in_a_bundle(refused: Refused, work: Path) -> None:
    file = Path("bundle/model.safetensors")
    weights = load_file(file)
    key = sorted(weights)[0]
    weights[key][2].flatten()[0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    for command in (
        "evaluate --traces traces0 --agents bundle",
        f"{GENERATE} --agent bundle",
    ):
        refused(command, "NaN", "layer 1 head 0", str(file))


@pytest.fixture
def small_disk(work: Path) -> Iterator[Path]:
    """A folder that takes 60 kB; needs the right to mount."""
    folder = work / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no right to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_files(work: Path) -> Callable[[Sequence[str], int], subprocess.CompletedProcess[str]]:
    """Run a command in a process whose files may not grow beyond a size."""
    resource = pytest.importorskip("resource")

    def run(command: Sequence[str], size: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "kvenv.cli", *command],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        )

    return run


def test_a_full_disk(refused: Refused, small_disk: Path, capfd) -> None:
    fill = small_disk / "fill"

    def leave(size: int) -> None:
        """Fill the disk up to its last ``size`` bytes."""
        fill.unlink(missing_ok=True)
        free = os.statvfs(small_disk)
        fill.write_bytes(b"x" * (free.f_bavail * free.f_frsize - size))

    leave(8192)
    more = "--prompt-tokens 200 --episodes 2"
    assert kvenv(*f"record ./source.py --model model0 --out disk/t {more}".split()) == 2
    error = capfd.readouterr().err
    assert "No space left" in error
    assert "free some space" in error
    assert error.count("\n") == 1
    assert {path.name for path in (small_disk / "t").iterdir()} == {"manifest.json"}
    shutil.rmtree(small_disk / "t")

    leave(4096)
    train = "train kvp --traces traces0 --steps 3 --out disk/b"
    refused(train, "disk/b", "No space left", "free some space")
    assert kvenv(*f"{train} --checkpoint-every 1".split()) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "checkpoint" in error
    shutil.rmtree(small_disk / "b.checkpoint")

    leave(0)
    refused("evaluate --traces traces0 --agents knorm --json disk/a.json", "No space left")


@pytest.mark.slow
def test_a_limit_on_file_sizes(small_files, work: Path) -> None:
    """What a full disk does, where no disk can be mounted; and the exit of a whole process."""
    for command, named in (
        (f"{RECORD} --episodes 2", "new"),
        ("train kvp --traces traces0 --steps 2 --out new", "new"),
        ("evaluate --traces traces0 --agents knorm --json new.json", "new.json"),
    ):
        before = listing(work)
        result = small_files(command.split(), 2048)
        assert result.returncode == 2
        assert result.stderr.startswith("kvenv: error: ")
        assert result.stderr.count("\n") == 1
        assert named in result.stderr
        written = {name for name in listing(work) if name not in before}
        assert written <= {"new", "new/manifest.json"}, "something half-written is left"
        shutil.rmtree(work / "new", ignore_errors=True)


@pytest.mark.slow
def test_the_installed_command(work: Path) -> None:
    program = Path(sys.executable).with_name("kvenv")
    inspected = subprocess.run([program, "inspect", "traces0"], capture_output=True, text=True)
    assert (inspected.returncode, inspected.stderr) == (0, "")
    assert "model0" in inspected.stdout
    wrong = subprocess.run([program, "inspect", "nosuch"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert re.fullmatch(r"kvenv: error: [^\n]+\n", wrong.stderr)


def test_an_interrupt_ends_with_130(work, capsys, monkeypatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recording, "TraceSet", interrupted)
    assert kvenv("inspect", "traces0") == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on where it can\n"


def test_a_warning_is_one_line(work, capsys) -> None:
    spoil("traces0/manifest.json", lambda b: b.replace(b'"episodes": 4', b'"episodes": 9'))
    shown = warnings.showwarning
    warnings.simplefilter("default")  # as outside of pytest
    assert kvenv("inspect", "traces0") == 0
    assert re.fullmatch(
        r"kvenv: warning: \S+traces0 has 4 of 9 episodes: [^\n]+\n", capsys.readouterr().err
    )
    assert warnings.showwarning is shown


def test_errors_of_the_system_name_their_file(work, capsys, monkeypatch) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "some/file")

    monkeypatch.setattr(recording, "TraceSet", denied)
    assert kvenv("inspect", "traces0") == 2
    assert capsys.readouterr().err.startswith("kvenv: error: 'some/file': Permission denied")


@pytest.mark.parametrize("text", ["", "0", "0:", ":1", "0:1,", "a:b", "0:-1", "0:1;1:0"])
def test_heads_that_are_none(text: str) -> None:
    with pytest.raises(KvenvError, match="write them as layer:head"):
        commands.parse_heads(text)
