"""Kills, full disks and other people's folders."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest

from kvenv.errors import KvenvError
from kvenv.trace import TraceSet, TraceWriter

ROOT = Path(__file__).parents[2]
FORK = multiprocessing.get_context("fork")
CALLS = ("open", "write", "ftruncate", "fsync", "replace")


def in_child(task, *args, kill_after: float | None = None) -> int:
    """Run in a forked process, killed after a while; its exit code."""
    child = FORK.Process(target=task, args=args)
    child.start()
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    return child.exitcode


def intercept(patch, act) -> list[str]:
    """Call ``act(how many before)`` ahead of every system call that changes the folder."""
    seen: list[str] = []
    for name in CALLS:
        real = getattr(os, name)

        def call(*args, name=name, real=real, **kw):
            if name != "open" or args[1] & os.O_CREAT:
                seen.append(name)
                act(len(seen) - 1)
            return real(*args, **kw)

        patch.setattr(os, name, call)
    return seen


def count_calls(tiny, folder) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        seen = intercept(patch, lambda _: None)
        tiny.write(folder)
    return seen


def moments(calls: list[str]) -> list[int]:
    """Every sync and rename, and a sample of the many writes."""
    rare = [i for i, name in enumerate(calls) if name in ("fsync", "replace")]
    return sorted({*rare, *(i + 1 for i in rare if i + 1 < len(calls)), *range(0, len(calls), 97)})


def die_at(tiny, folder, moment):
    def act(index):
        if index == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    intercept(pytest.MonkeyPatch(), act)
    tiny.write(folder)


def check_what_is_left(folder):
    """After a kill, what the manifest names is whole."""
    manifest = folder / "manifest.json"
    shards = json.loads(manifest.read_bytes())["shards"] if manifest.exists() else []
    for shard in shards:
        data = (folder / shard["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]


def test_killed_at_every_step(tiny, undisturbed, tmp_path):
    calls = count_calls(tiny, tmp_path / "count")
    assert calls.count("replace") == 4 + 3  # a first manifest, then a shard and a manifest each
    for moment in moments(calls):
        folder = tmp_path / str(moment)
        assert in_child(die_at, tiny, folder, moment) == -signal.SIGKILL
        check_what_is_left(folder)
        tiny.write(folder)
        assert tiny.contents(folder) == tiny.contents(undisturbed), calls[moment]


def test_killed_again_and_again_at_random_moments(tiny, undisturbed, tmp_path):
    rng = random.Random(0)
    for trial in range(3):
        folder = tmp_path / str(trial)
        for _ in range(6):
            in_child(tiny.write, folder, 5, 0.02, kill_after=rng.uniform(0, 0.15))
            check_what_is_left(folder)
        tiny.write(folder)
        assert tiny.contents(folder) == tiny.contents(undisturbed)


def test_an_exception_drops_only_the_shard_in_hand(tiny, undisturbed, tmp_path):
    def interrupted(index):
        if index == 3:
            raise KeyboardInterrupt
        return episode(index)

    episode = tiny.episode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "episode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiny.write(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["manifest.json", "shard-00000.h5"]
    with pytest.warns(UserWarning, match="2 of 5 episodes: run the same record command again"):
        assert len(TraceSet(tmp_path)) == 2
    tiny.write(tmp_path)
    assert tiny.contents(tmp_path) == tiny.contents(undisturbed)


def test_a_finished_set_is_left_alone(tiny, undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "set")
    with TraceWriter(folder, tiny.manifest(), 2) as writer:
        assert writer.done == 5
        with pytest.raises(KvenvError, match="complete with its 5 episodes"):
            writer.add(tiny.episode(5))
    assert tiny.contents(folder) == tiny.contents(undisturbed)


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(b"short")])
def test_a_missing_or_truncated_shard_is_recorded_again(tiny, undisturbed, tmp_path, damage):
    folder = shutil.copytree(undisturbed, tmp_path / "set")
    damage(folder / "shard-00001.h5")
    with TraceWriter(folder, tiny.manifest(), 2) as writer:
        assert writer.done == 2
        assert sorted(os.listdir(folder)) == ["manifest.json", "shard-00000.h5"]
    tiny.write(folder)
    assert tiny.contents(folder) == tiny.contents(undisturbed)


def test_another_set_is_not_overwritten(tiny, undisturbed):
    before = tiny.contents(undisturbed)
    other = tiny.manifest(seed=4, arguments={"prompt_tokens": 10})
    with pytest.raises(KvenvError) as error:
        TraceWriter(undisturbed, other)
    assert "seed: 3 there, 4 here" in str(error.value)
    assert "arguments.prompt_tokens: 9 there, 10 here" in str(error.value)
    assert "another --out" in str(error.value)
    assert tiny.contents(undisturbed) == before


def test_a_folder_of_something_else_is_untouched(tiny, tmp_path):
    (tmp_path / "shard-00000.h5").write_text("mine")
    with pytest.raises(KvenvError, match=r"no trace set .*shard-00000.h5.*another --out"):
        TraceWriter(tmp_path, tiny.manifest())
    assert tiny.contents(tmp_path) == {"shard-00000.h5": b"mine"}
    with pytest.raises(KvenvError, match="is a file"):
        TraceWriter(tmp_path / "shard-00000.h5", tiny.manifest())


def test_one_recorder_at_a_time(tiny, tmp_path):
    with TraceWriter(tmp_path, tiny.manifest(), 2) as writer:
        writer.add(tiny.episode(0))
        with pytest.raises(KvenvError, match="being recorded already"):
            TraceWriter(tmp_path, tiny.manifest(), 2)
        assert (tmp_path / ".shard-00000.h5.tmp").exists()
    with pytest.raises(KvenvError, match="closed"):
        writer.add(tiny.episode(1))


def test_a_failure_of_any_step_is_one_clear_error(tiny, undisturbed, tmp_path):
    calls = count_calls(tiny, tmp_path / "count")
    gc.collect()
    objects = h5py.h5f.get_obj_count()
    for moment in moments(calls)[::2]:
        folder = tmp_path / str(moment)

        def act(index, moment=moment):
            if index >= moment:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.MonkeyPatch.context() as patch:
            intercept(patch, act)
            with pytest.raises(KvenvError, match=r"cannot write .*No space left.*free some space"):
                tiny.write(folder)
        assert h5py.h5f.get_obj_count() == objects
        assert not list(folder.glob(".*"))
        tiny.write(folder)
        assert tiny.contents(folder) == tiny.contents(undisturbed), calls[moment]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB, and a way to make it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> int:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True).returncode

    if os.getuid() != 0 or shutil.which("mount") is None or mount("size=32k") != 0:
        pytest.skip("only root can mount a small file system")
    yield folder, lambda: mount("remount", "size=1m")
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(tiny, undisturbed, small_disk):
    disk, enlarge = small_disk
    with pytest.raises(KvenvError) as error:
        tiny.write(disk / "set")
    assert "shard-00001.h5 (No space left on device)" in str(error.value)
    assert str(error.value).endswith("run the same command again; it goes on at episode 2")
    assert sorted(os.listdir(disk / "set")) == ["manifest.json", "shard-00000.h5"]
    assert enlarge() == 0
    tiny.write(disk / "set")
    assert tiny.contents(disk / "set") == tiny.contents(undisturbed)


def test_a_limit_on_file_sizes_ends_in_one_line(tiny, tmp_path):
    script = """
import resource, sys, conftest
from kvenv.errors import KvenvError
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    conftest.write(sys.argv[1])
except KvenvError as error:
    print(error)
    raise
"""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "set")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stderr  # the exception's own, not a crash at exit
    assert len(run.stdout.splitlines()) == 1
    assert "shard-00000.h5 (File too large): raise the limit on file sizes" in run.stdout
    assert run.stderr.count("Error") == 1 + run.stderr.count("raise KvenvError"), run.stderr
    assert os.listdir(tmp_path / "set") == ["manifest.json"]
