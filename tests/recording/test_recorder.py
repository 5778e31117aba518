"""Recording a workload: what ends up on disk, and that it does so whatever happens."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvenv import models
from kvenv.errors import KvenvError
from kvenv.recording import recorder
from kvenv.recording.capture import capture
from kvenv.recording.workload import Sample
from kvenv.trace import TraceSet

N, T = 20, 5


class Numbers:
    """Random tokens; ``limit`` episodes, and ``change`` to make a sample unusable."""

    def __init__(self, limit: int = 99, change: Callable[[Sample], Sample] | None = None) -> None:
        self.limit = limit
        self.change = change

    def sample(self, index, *, tokenizer, rng, prompt_tokens, future_tokens, seed):
        if index >= self.limit:
            raise KvenvError(f"episode {index} does not exist: there are {self.limit}")
        ids = rng.integers(0, 256, prompt_tokens - index % 3 + future_tokens).tolist()
        cut = prompt_tokens - index % 3
        sample = Sample(ids[:cut], ids[cut:], f"document {index // 2}", {"index": index})
        return self.change(sample) if self.change else sample


@pytest.fixture(scope="module")
def pair(checkpoints: Callable[[int], Path]) -> tuple[Any, Any]:
    return models.load(str(checkpoints(0)))


def record(pair: tuple[Any, Any], out: Path, workload: Any = None, **changes: Any) -> TraceSet:
    plain = {"episodes": 5, "prompt_tokens": N, "future_tokens": T, "shard_episodes": 2}
    return recorder.record(*pair, workload or Numbers(), out, **(plain | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_set_holds_what_the_workload_gave_and_the_model_did(pair, tmp_path) -> None:
    traces = record(pair, tmp_path / "set", seed=3, name="numbers", arguments={"limit": 99})
    assert len(traces) == 5
    assert traces.manifest.workload == "numbers"
    assert traces.manifest.arguments == {
        "limit": 99,
        "prompt_tokens": N,
        "future_tokens": T,
        "generate": None,
    }
    for i in range(5):
        rng = np.random.default_rng([3, i])
        sample = Numbers().sample(
            i, tokenizer=None, rng=rng, prompt_tokens=N, future_tokens=T, seed=3
        )
        info = traces.info(i)
        assert (info.n, info.T, info.document) == (N - i % 3, T, f"document {i // 2}")
        assert info.metadata == {"index": i}
        assert traces.tokens(i).tolist() == sample.prompt + sample.future
        kept, _ = capture(pair[0], torch.from_numpy(traces.tokens(i)).long(), info.n)
        for field, name in (
            ("keys", "keys"),
            ("values", "values"),
            ("queries", "queries"),
            ("utility/sum", "utility_sum"),
            ("utility/max", "utility_max"),
            ("past/sum", "past_sum"),
        ):
            np.testing.assert_array_equal(traces.read(i, field), kept.stack(name))


def test_queries_and_layers(pair, tmp_path) -> None:
    sizes = {"prompt_tokens": 90, "episodes": 1}
    future = record(pair, tmp_path / "future", **sizes)
    every = record(pair, tmp_path / "all", queries="all", **sizes)
    assert future.read(0, "queries").shape == (2, 4, recorder.QUERY_WINDOW + T, 8)
    assert every.read(0, "queries").shape == (2, 4, 90 + T, 8)
    np.testing.assert_array_equal(
        every.read(0, "queries")[:, :, -64 - T :], future.read(0, "queries")
    )
    one = record(pair, tmp_path / "one", layers=[1], **sizes)
    assert one.heads == [(1, 0), (1, 1)]
    np.testing.assert_allclose(one.read(0, "keys", 1), future.read(0, "keys", 1), atol=2e-3)


def test_statistics_are_recorded_when_asked_for(pair, tmp_path) -> None:
    traces = record(pair, tmp_path / "set", stats=True)
    plain = record(pair, tmp_path / "plain")
    assert traces.read(0, "stats/query_mean").shape == (2, 4, 8)
    for i in range(5):
        tokens = torch.from_numpy(traces.tokens(i)).long()
        kept, _ = capture(pair[0], tokens, traces.info(i).n, stats=True)
        for name in ("query_mean", "query_cov"):
            np.testing.assert_array_equal(traces.read(i, f"stats/{name}"), kept.stack(name))
        np.testing.assert_array_equal(traces.read(i, "queries"), plain.read(i, "queries"))
    with pytest.raises(KvenvError, match="record it again with --stats"):
        plain.read(0, "stats/query_mean")


def test_the_same_command_again_has_nothing_to_do(pair, tmp_path, monkeypatch) -> None:
    record(pair, tmp_path / "set")
    before = contents(tmp_path / "set")
    monkeypatch.delattr(recorder, "capture")
    assert len(record(pair, tmp_path / "set")) == 5
    assert contents(tmp_path / "set") == before


@pytest.mark.parametrize("last", range(5))
def test_recording_goes_on_after_an_exception(pair, tmp_path, last: int) -> None:
    record(pair, tmp_path / "whole", generate="sampled")
    out = tmp_path / "broken"
    with pytest.raises(KvenvError, match=f"episode {last} does not exist"):
        record(pair, out, Numbers(limit=last), generate="sampled")
    shards = {f"shard-{i:05d}.h5" for i in range(last // 2)}
    assert {path.name for path in out.iterdir()} == {"manifest.json", *shards}
    record(pair, out, generate="sampled")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("how", ["greedy", "sampled"])
def test_generated_futures(pair, tmp_path, how) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = record(pair, tmp_path / "first", generate=how, episodes=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = record(pair, tmp_path / "again", generate=how, episodes=2)
    other = record(pair, tmp_path / "other", generate=how, episodes=2, seed=1)
    assert contents(first.path) == contents(again.path)
    assert first.info(0).metadata == {"index": 0, "generated": how}
    plain = record(pair, tmp_path / "plain", episodes=2)
    for i in range(2):
        n = first.info(i).n
        assert first.tokens(i)[:n].tolist() == plain.tokens(i)[:n].tolist()
        assert first.tokens(i)[n:].tolist() != plain.tokens(i)[n:].tolist()
        if how == "greedy":
            _, logits = capture(
                pair[0], torch.from_numpy(first.tokens(i)).long(), n, logits_to_keep=0
            )
            assert logits[0, n - 1 : -1].argmax(-1).tolist() == first.tokens(i)[n:].tolist()
    assert other.tokens(0).tolist() != first.tokens(0).tolist()


def test_sampling_depends_on_the_seed(pair) -> None:
    prompt = torch.arange(9)[None]
    drawn = [
        models.continue_text(*pair, prompt, 12, sample=True, seed=seed).tolist()
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_stop_token_ends_the_future(pair, tmp_path, monkeypatch) -> None:
    whole = record(pair, tmp_path / "whole", generate="greedy", episodes=1, future_tokens=8)
    future = whole.tokens(0)[whole.info(0).n :].tolist()
    stop = future[2]
    monkeypatch.setattr(pair[0].generation_config, "eos_token_id", stop)
    short = record(pair, tmp_path / "short", generate="greedy", episodes=1, future_tokens=8)
    assert short.tokens(0)[short.info(0).n :].tolist() == future[: future.index(stop) + 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes": 0}, "episodes is 0"),
        ({"prompt_tokens": 0}, "prompt tokens is 0"),
        ({"future_tokens": 0}, "future tokens is 0"),
        ({"shard_episodes": 0}, "shard episodes is 0"),
        ({"prompt_tokens": 508}, r"508 \+ 5 tokens exceed the 512-token context"),
        ({"layers": [1, 2]}, r"layers \[2\] are not full-attention layers .* \[0, 1\]"),
        ({"layers": []}, "layers"),
        ({"seed": -1}, "seed is -1"),
        ({"arguments": {"x": object()}}, "JSON"),
    ],
)
def test_impossible_requests_write_nothing(pair, tmp_path, changes, message) -> None:
    with pytest.raises(KvenvError, match=message):
        record(pair, tmp_path / "set", **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: Sample([], s.future, "d"), "0 prompt and 5 future tokens for 'd'"),
        (lambda s: Sample(s.prompt, [], "d"), "20 prompt and 0 future tokens for 'd'"),
        (lambda s: Sample(s.prompt * 2, s.future, "d"), "40 prompt .* more than the 20 and 5"),
        (lambda s: Sample(s.prompt, s.future * 2, "d"), "10 future .* more than the 20 and 5"),
        (lambda s: Sample(s.prompt, [256], "d"), r"token 256 for 'd': .* tokens 0\.\.255"),
        (lambda s: Sample([-1], s.future, "d"), "token -1 for 'd'"),
    ],
)
def test_unusable_samples(pair, tmp_path, change, message) -> None:
    with pytest.raises(KvenvError, match=message):
        record(pair, tmp_path / "set", Numbers(change=change))
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["manifest.json"]


def test_a_generated_future_needs_a_prompt_and_nothing_else(pair, tmp_path) -> None:
    with pytest.raises(KvenvError, match="0 prompt"):
        record(
            pair, tmp_path / "a", Numbers(change=lambda s: Sample([], [], "d")), generate="greedy"
        )
    traces = record(
        pair, tmp_path / "b", Numbers(change=lambda s: Sample(s.prompt, [], "d")), generate="greedy"
    )
    assert traces.info(0).T == T


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"episodes": 6}, "episodes: 5 there, 6 here"),
        ({"prompt_tokens": 21}, "prompt_tokens"),
        ({"generate": "greedy"}, "generate"),
        ({"queries": "all"}, "queries"),
        ({"stats": True}, "stats: False there, True here"),
        ({"layers": [0]}, "layers"),
        ({"name": "other"}, "workload"),
    ],
)
def test_other_arguments_do_not_resume(pair, tmp_path, changes, named) -> None:
    record(pair, tmp_path / "set")
    before = contents(tmp_path / "set")
    with pytest.raises(KvenvError, match=f"holds another trace set .*{named}"):
        record(pair, tmp_path / "set", **changes)
    assert contents(tmp_path / "set") == before


def test_another_rotation_does_not_resume(pair, tmp_path) -> None:
    model, tokenizer = models.load(pair[0].config._name_or_path)
    traces = record((model, tokenizer), tmp_path / "set")
    rotation = traces.manifest.model.rotation(0)
    assert rotation.width == 8
    assert record((model, tokenizer), tmp_path / "set").manifest == traces.manifest
    model.model.rotary_emb.inv_freq.mul_(0.5)
    with pytest.raises(KvenvError, match=r"holds another trace set .*model.rotations"):
        record((model, tokenizer), tmp_path / "set")


def test_a_rotation_that_cannot_be_stated_is_recorded_with_the_reason(pair, tmp_path) -> None:
    model, tokenizer = models.load(pair[0].config._name_or_path)
    rotary = model.model.rotary_emb
    right = rotary.forward
    rotary.forward = lambda x, position_ids: right(x, position_ids**2)
    traces = record((model, tokenizer), tmp_path / "set")
    with pytest.raises(KvenvError, match=r"layer 0 of .* no frame of now \(llama rotates in a way"):
        traces.manifest.model.rotation(0)


def test_recorded_keys_turn_with_the_text(pair, tmp_path) -> None:
    """Keys of the same text, recorded later in a longer one, differ by the stated rotation."""
    traces = record(pair, tmp_path / "set")
    rotation = traces.manifest.model.rotation(0)
    ids = torch.tensor([*traces.tokens(0)[:6]] * 2)  # layer 0: keys depend on the token alone
    kept, _ = capture(pair[0], ids, 9)
    keys = torch.from_numpy(kept.keys[0])
    turned = rotation.turn(keys[:, :6], torch.tensor(6))
    torch.testing.assert_close(turned, keys[:, 6:].float(), atol=1e-2, rtol=1e-2)
    recorded = torch.from_numpy(traces.read(0, "keys", 0))[:, :6]
    torch.testing.assert_close(rotation.turn(recorded, torch.tensor(6)), turned, atol=0, rtol=0)


def test_another_model_does_not_resume(pair, tmp_path, checkpoints) -> None:
    record(pair, tmp_path / "set")
    with pytest.raises(KvenvError, match=r"holds another trace set .*fingerprint"):
        record(models.load(str(checkpoints(1))), tmp_path / "set")


WORKLOAD = """
import time
from kvenv.recording.workload import Sample

class Slow:
    def sample(self, index, *, tokenizer, rng, prompt_tokens, future_tokens, seed):
        time.sleep(0.02)  # so that a signal finds it at work
        ids = rng.integers(0, 256, prompt_tokens + future_tokens).tolist()
        return Sample(ids[:prompt_tokens], ids[prompt_tokens:], f"document {index}")
"""


def command(folder: Path, model: Path, out: str) -> list[str]:
    (folder / "workload.py").write_text(WORKLOAD)
    return [
        *(sys.executable, "-m", "kvenv.cli", "record", "./workload.py", "--model", str(model)),
        *("--out", out, "--episodes", "40", "--prompt-tokens", "64", "--future-tokens", "16"),
        *("--shard-episodes", "3", "--seed", "7"),
    ]


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    while not path.exists():
        assert process.poll() is None, "the recorder ended early"
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_kills_and_interrupts_at_random_moments_leave_no_trace(tmp_path, checkpoints) -> None:
    def run(out: str) -> list[str]:
        return command(tmp_path, checkpoints(0), out)

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"cwd": tmp_path, "env": environment, "stdout": subprocess.DEVNULL}
    # A shell's background job, as CI may be, ignores interrupts, and so would its children.
    quiet["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    subprocess.run(run("whole"), check=True, **quiet)
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    last = 0
    for how in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(run("killed"), stderr=subprocess.PIPE, **quiet)
        wait_for(tmp_path / "killed" / f"shard-{last:05d}.h5", process)
        time.sleep(chance.uniform(0, 0.1))
        process.send_signal(how)
        _, error = process.communicate(timeout=60)
        if how == signal.SIGINT:
            assert process.returncode == 130
            assert error.decode().strip().splitlines()[-1].startswith("interrupted;")
            assert not list((tmp_path / "killed").glob(".*"))
        last = len(list((tmp_path / "killed").glob("shard-*.h5")))
        assert 0 < last < 13, f"seed {seed}: not in the middle of the work"
    subprocess.run(run("killed"), check=True, **quiet)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole"), f"seed {seed}"
