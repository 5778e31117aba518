"""Damaged, foreign and missing files, and readers in many processes."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import shutil
import threading
import warnings

import h5py
import numpy as np
import pytest

from kvenv.errors import KvenvError
from kvenv.trace import FIELDS, TraceSet, TraceWriter, packaged, reader, summary


@pytest.fixture
def copy(undisturbed, tmp_path):
    return shutil.copytree(undisturbed, tmp_path / "set")


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def test_any_flipped_byte_is_found(tiny, copy):
    good = tiny.everything(TraceSet(copy))
    shard = copy / "shard-00001.h5"
    data = shard.read_bytes()
    for place in range(0, len(data), 397):
        shard.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        traces = TraceSet(copy)  # the size is right: opening is cheap and does not look inside
        with pytest.raises(KvenvError, match=r"shard-00001.h5 is damaged .*record command again"):
            assert tiny.everything(traces) == good
        with pytest.raises(KvenvError, match=r"shard-00001.h5 is damaged \(other SHA-256\)"):
            traces.verify()
        np.testing.assert_array_equal(traces.tokens(0), tiny.episode(0).tokens)  # others still read
        traces.close()


def test_truncated_and_missing_shards(copy):
    shard = copy / "shard-00002.h5"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(KvenvError, match=r"shard-00002.h5 is damaged \(\d+ bytes, not \d+\)"):
        TraceSet(copy)
    shard.unlink()
    with pytest.raises(KvenvError, match=r"shard-00002.h5 is missing: .*record command again"):
        TraceSet(copy)


def test_a_shard_that_vanishes_later(copy):
    traces = TraceSet(copy)
    (copy / "shard-00000.h5").unlink()
    with pytest.raises(KvenvError, match=r"shard-00000.h5 is missing"):
        traces.info(0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "minari"}, "has format 'minari', not 'kvenv-traces'"),
        ({"version": 1}, "has format version 1, this kvenv reads 2: record the set again"),
        ({"version": 3}, "has format version 3, this kvenv reads 2: upgrade kvenv"),
        ({"episodes": "many"}, "is damaged .episodes is 'many'"),
        ({"dtype": "bfloat16"}, "is damaged .dtype"),
        ({"model": None}, "is damaged"),
        ({"shards": [{"file": "../x"}]}, "is damaged"),
        ({"shards": [{"file": "../x", "episodes": 1, "bytes": 1, "sha256": ""}]}, "is damaged"),
    ],
)
def test_foreign_manifests(copy, changes, words):
    edit(copy, **changes)
    with pytest.raises(KvenvError, match=f"manifest.json {words}") as error:
        TraceSet(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\xff", "[" * 100_000])
def test_manifests_that_are_none(copy, text):
    (copy / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(KvenvError, match=r"manifest.json (is damaged|has format \[1\])"):
        TraceSet(copy)


def test_sources_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(KvenvError, match="missing does not exist"):
        TraceSet(tmp_path / "missing")
    with pytest.raises(KvenvError, match=r"is no trace set \(it has no manifest.json\)"):
        TraceSet(str(tmp_path))
    monkeypatch.setattr(reader, "packaged", lambda: {"sample": tmp_path})
    with pytest.raises(KvenvError, match=r"no trace set 'samples': .* \(sample\)"):
        TraceSet("samples")


def test_packaged_ids_come_before_folders(tiny, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_PACKAGE", tmp_path / "site" / "kvenv")
    shutil.copytree(undisturbed, tmp_path / "site/traces/small")
    shutil.copytree(undisturbed, tmp_path / "site/kvenv/_data/traces/sample")
    (tmp_path / "site/traces/empty").mkdir()
    assert set(packaged()) == {"small", "sample"}
    monkeypatch.chdir(tmp_path)
    tiny.write(tmp_path / "small", 2)
    assert len(TraceSet("small")) == 5
    assert len(TraceSet("./small")) == 2
    shutil.copytree(tmp_path / "small", tmp_path / "own")
    assert len(TraceSet("own")) == 2
    monkeypatch.chdir("/")
    assert len(TraceSet("sample")) == 5
    os.truncate(tmp_path / "site/traces/small/shard-00000.h5", 9)
    with pytest.raises(KvenvError, match="install kvenv again"):
        TraceSet("small")


def test_a_set_without_an_episode(tiny, tmp_path):
    TraceWriter(tmp_path, tiny.manifest()).close()
    with pytest.raises(KvenvError, match="0 of 5 episodes: run the same record command again"):
        TraceSet(tmp_path)


def test_what_is_not_there_is_named(undisturbed):
    traces = TraceSet(undisturbed)
    for bad in (-1, 5):
        with pytest.raises(KvenvError, match=f"no episode {bad}: .* has 0..4"):
            traces.info(bad)
    with pytest.raises(KvenvError, match=r"layer 2 is not in .*: recorded are 1, 4"):
        traces.head(0, 2, 0)
    with pytest.raises(KvenvError, match=r"KV head 2 is not in .*: it has 0..1"):
        traces.head(0, 1, 2)
    with pytest.raises(KvenvError, match=r"no field 'utility': give one of keys, .*past/sum"):
        traces.read(0, "utility")


def test_datasets_it_does_not_know_are_left_alone(tiny, copy):
    good = tiny.everything(TraceSet(copy))
    shard = copy / "shard-00000.h5"
    with h5py.File(shard, "r+") as file:
        file["episode_000000/stats/query_mean"] = np.zeros((2, 4, 8), np.float32)
    shards = json.loads((copy / "manifest.json").read_bytes())["shards"]
    shards[0]["bytes"] = shard.stat().st_size
    edit(copy, shards=shards)
    assert tiny.everything(TraceSet(copy)) == good


def test_arrays_are_the_callers_own(undisturbed):
    traces = TraceSet(undisturbed)
    first = traces.read(0, "keys", 1, 0)
    first[:] = 0
    assert traces.read(0, "keys", 1, 0).any()


def test_open_files_are_bounded(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_OPEN_SHARDS", 2)
    traces = TraceSet(tiny.write(tmp_path / "set", 9))
    gc.collect()
    before = h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE)
    for i in (0, 8, 3, 5, 0, 7):
        np.testing.assert_array_equal(traces.tokens(i), tiny.episode(i).tokens)
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE) == before + 2
    traces.close()
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE) == before


def test_pickles_are_small_and_silent(tiny, copy):
    edit(copy, episodes=6)
    with pytest.warns(UserWarning, match="5 of 6"):
        traces = TraceSet(copy)
    good = tiny.everything(traces)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = pickle.loads(pickle.dumps(traces))  # noqa: S301
    assert tiny.everything(again) == good


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_many_processes(tiny, undisturbed, method):
    traces = TraceSet(undisturbed)
    wanted = [(i, field, 4, 1) for i in range(5) for field in FIELDS] * 3
    good = [traces.read(*request) for request in wanted]  # opens files before the fork
    with multiprocessing.get_context(method).Pool(2) as pool:
        read = pool.starmap_async(traces.read, wanted, chunksize=5)
        again = [traces.read(*request) for request in wanted]
        for one, two, three in zip(good, again, read.get(60), strict=True):
            np.testing.assert_array_equal(one, two)
            np.testing.assert_array_equal(one, three)


def test_fork_while_another_thread_reads(tiny, undisturbed):
    traces = TraceSet(undisturbed)
    good, stop = tiny.everything(traces), threading.Event()

    def busy():
        while not stop.is_set():
            traces.head(0, 1, 0)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(8):
            child = multiprocessing.get_context("fork").Process(
                target=lambda: os._exit(0 if tiny.everything(traces) == good else 1)
            )
            child.start()
            child.join(20)
            child.kill()
            assert child.exitcode == 0
    finally:
        stop.set()
        thread.join()


def test_summary(undisturbed):
    traces = TraceSet(undisturbed)
    found = summary(traces)
    assert found["model"] == "tiny"
    assert (found["heads"], found["layers"]) == (4, [1, 4])
    assert (found["episodes"], found["planned"], found["complete"]) == (5, 5, True)
    assert (found["prompt_tokens"], found["future_tokens"], found["documents"]) == (45, 15, 3)
    assert found["bytes"] == sum(p.stat().st_size for p in undisturbed.glob("*.h5"))
    json.dumps(found)
    assert repr(traces) == f"TraceSet('{undisturbed}': 5 episodes of text, 4 heads of tiny)"
