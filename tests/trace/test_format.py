"""What is written is what is read, byte for byte, and what cannot be written is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvenv.errors import KvenvError
from kvenv.trace import FIELDS, STATS, ModelInfo, TraceSet, TraceWriter

ROOT = Path(__file__).parents[2]


@st.composite
def models(draw):
    kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    total = draw(st.integers(1, 5))
    layers = draw(st.sets(st.integers(0, total - 1), min_size=1))
    return ModelInfo(
        "m",
        "f",
        "llama",
        "t",
        total,
        kv,
        kv * group,
        draw(st.integers(1, 9)),
        tuple(sorted(layers)),
    )


@settings(max_examples=25)
@given(model=models(), n=st.integers(1, 40), T=st.integers(1, 9), data=st.data())
def test_round_trip(tiny, tmp_path_factory, model, n, T, data):
    tail = data.draw(st.integers(T, n + T))
    episode = tiny.episode(7, n, T, tail, model)
    folder = tmp_path_factory.mktemp("set")
    with TraceWriter(folder, tiny.manifest(1, model=model)) as writer:
        writer.add(episode)
    with_all = TraceSet(folder)
    info = with_all.info(0)
    assert (info.n, info.T, info.S, info.seed) == (n, T, n + T, 107)
    assert (info.document, info.workload) == (episode.document, "text")
    assert info.metadata == episode.metadata
    assert info.text_hash == hashlib.sha256(episode.tokens.tobytes()).hexdigest()
    np.testing.assert_array_equal(with_all.tokens(0), episode.tokens, strict=True)
    for field in FIELDS:
        written = getattr(episode, field.replace("/", "_"))
        np.testing.assert_array_equal(with_all.read(0, field), written, strict=True)
    layer, head = data.draw(st.sampled_from(with_all.heads))
    row, group = model.layers.index(layer), model.query_heads // model.kv_heads
    one = with_all.head(0, layer, head)
    np.testing.assert_array_equal(one.tokens, episode.tokens, strict=True)
    np.testing.assert_array_equal(one.keys, episode.keys[row, head], strict=True)
    np.testing.assert_array_equal(one.values, episode.values[row, head], strict=True)
    queries = episode.queries[row, head * group : (head + 1) * group]
    np.testing.assert_array_equal(one.queries, queries, strict=True)
    np.testing.assert_array_equal(one.utility, episode.utility_sum[row, head], strict=True)
    np.testing.assert_array_equal(one.utility_max, episode.utility_max[row, head], strict=True)
    np.testing.assert_array_equal(one.past, episode.past_sum[row, head], strict=True)
    assert (one.n, one.T, one.layer, one.head, one.episode) == (n, T, layer, head, 0)
    np.testing.assert_array_equal(with_all.read(0, "values", layer), episode.values[row])
    np.testing.assert_array_equal(
        with_all.read(0, "queries", head=head),
        episode.queries[:, head * group : (head + 1) * group],
    )
    with_all.verify()


@settings(max_examples=10)
@given(model=models(), data=st.data())
def test_statistics_round_trip(tiny, tmp_path_factory, model, data):
    episode = tiny.episode(3, model=model, stats=True)
    folder = tmp_path_factory.mktemp("set")
    with TraceWriter(folder, tiny.manifest(1, model=model, stats=True)) as writer:
        writer.add(episode)
    traces = TraceSet(folder)
    assert traces.manifest.stats
    layer, head = data.draw(st.sampled_from(traces.heads))
    group = slice(head * model.group, (head + 1) * model.group)
    for field in STATS:
        written = getattr(episode, field.removeprefix("stats/"))
        np.testing.assert_array_equal(traces.read(0, field), written, strict=True)
        one = traces.read(0, field, layer, head)
        np.testing.assert_array_equal(one, written[model.layers.index(layer), group], strict=True)
    traces.close()
    with h5py.File(folder / "shard-00000.h5") as file:
        for field, rows in zip(STATS, ((), (model.head_dim,)), strict=True):
            dataset = file["episode_000000"][field]
            assert dataset.chunks == (1, 1, *rows, model.head_dim)
            assert dataset.fletcher32


def test_a_head_is_a_chunk_with_a_checksum(tiny, undisturbed):
    with h5py.File(undisturbed / "shard-00000.h5") as file:
        group = file["episode_000001"]
        assert group["keys"].chunks == (1, 1, 12, 8)
        assert group["queries"].chunks == (1, 1, 12, 8)
        assert group["utility/sum"].chunks == (1, 1, 9)
        datasets = ["tokens", *FIELDS]
        assert all(group[name].fletcher32 and group[name].compression is None for name in datasets)
        assert set(group.attrs) == {
            "workload", "n", "T", "seed", "document", "text_hash", "metadata",
        }  # fmt: skip


def test_manifest_on_disk(tiny, undisturbed):
    plain = json.loads((undisturbed / "manifest.json").read_bytes())
    assert (plain["format"], plain["version"], plain["dtype"]) == ("kvenv-traces", 2, "float16")
    assert plain["model"]["layers"] == [1, 4]
    for shard, episodes in zip(plain["shards"], (2, 2, 1), strict=True):
        data = (undisturbed / shard["file"]).read_bytes()
        assert shard["episodes"] == episodes
        assert shard["bytes"] == len(data)
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
    assert sorted(os.listdir(undisturbed)) == [
        "manifest.json",
        *(s["file"] for s in plain["shards"]),
    ]


def test_the_same_bytes_from_another_process_at_another_time(tiny, undisturbed, tmp_path):
    # MALLOC_PERTURB_ fills memory with rubbish: bytes that nobody set would differ.
    command = f"import conftest; conftest.write({str(tmp_path / 'set')!r})"
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    subprocess.run(
        [sys.executable, "-c", command],
        env={**os.environ, "PYTHONPATH": path, "MALLOC_PERTURB_": "85"},
        check=True,
    )
    assert tiny.contents(tmp_path / "set") == tiny.contents(undisturbed)


def test_large_metadata(tiny, tmp_path):
    facts = {"text": "x" * 200_000}
    with TraceWriter(tmp_path, tiny.manifest(1)) as writer:
        writer.add(dataclasses.replace(tiny.episode(0), metadata=facts, document=""))
    assert TraceSet(tmp_path).info(0).metadata == facts
    assert TraceSet(tmp_path).info(0).document == ""


def spoilt(array, value, where=(1, 0, 2)):
    copy = array.copy()
    copy[where] = value
    return copy


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (lambda e: {"keys": spoilt(e.keys, np.inf)}, "keys of layer 4, head 0 .* not finite"),
        (lambda e: {"queries": spoilt(e.queries, np.nan)}, "queries of layer 4, head 0"),
        (lambda e: {"past_sum": spoilt(e.past_sum, np.nan)}, "past_sum of layer 4, head 0"),
        (lambda e: {"utility_sum": spoilt(e.utility_sum, -1)}, "utility_sum of layer 4.*-1.0"),
        (lambda e: {"keys": e.keys.astype(np.float32)}, "keys is float32 .* give float16"),
        (lambda e: {"values": e.values[:, :1]}, r"values is float16 \(2, 1, 12, 8\)"),
        (lambda e: {"tokens": e.tokens[:-1]}, r"tokens is int32 \(11,\)"),
        (lambda e: {"queries": e.queries[:, :, :2]}, "of 2 tokens: give those of 3..12"),
        (lambda e: {"T": 0}, "T is 0"),
        (lambda e: {"seed": -1}, "seed is -1"),
        (lambda e: {"document": "a\0"}, "document is"),
        (lambda e: {"metadata": {"x": np.float32(1)}}, "metadata is not JSON-safe"),
        (lambda e: {"metadata": {"x": float("nan")}}, "metadata is not JSON-safe"),
    ],
)
def test_what_does_not_fit_is_refused(tiny, tmp_path, changes, words):
    good = [tiny.episode(0), tiny.episode(1)]
    with TraceWriter(tmp_path, tiny.manifest(2)) as writer:
        writer.add(good[0])
        with pytest.raises(KvenvError, match=f"episode 1: .*{words}"):
            writer.add(dataclasses.replace(good[1], **changes(good[1])))
        writer.add(good[1])  # a refused episode leaves the shard as it was
    assert len(TraceSet(tmp_path)) == 2


@pytest.mark.parametrize(
    ("promised", "changes", "words"),
    [
        (True, {"query_cov": None}, r"query_cov is None: give float32 \(2, 4, 8, 8\)"),
        (True, {"query_mean": np.zeros((2, 2, 8), np.float32)}, r"query_mean is float32 \(2, 2, 8"),
        (
            True,
            {"query_mean": np.full((2, 4, 8), np.nan, np.float32)},
            "query_mean of layer 1, hea",
        ),
        (False, {}, "query_mean is given, but the manifest has no stats"),
    ],
)
def test_statistics_are_checked(tiny, tmp_path, promised, changes, words):
    episode = dataclasses.replace(tiny.episode(0, stats=True), **changes)
    with (
        TraceWriter(tmp_path, tiny.manifest(1, stats=promised)) as writer,
        pytest.raises(KvenvError, match=f"episode 0: {words}"),
    ):
        writer.add(episode)


def test_all_queries_means_all(tiny, tmp_path):
    with TraceWriter(tmp_path, tiny.manifest(1, queries="all")) as writer:
        with pytest.raises(KvenvError, match="of 5 tokens: give those of 12"):
            writer.add(tiny.episode(0, tail=5))
        writer.add(tiny.episode(0))


@pytest.mark.parametrize(
    "changes",
    [
        {"queries": "some"},
        {"stats": 1},
        {"episodes": 0},
        {"seed": -1},
        {"arguments": {"x": {1, 2}}},
    ],
)
def test_manifests_are_checked(tiny, changes):
    with pytest.raises(KvenvError, match=f"{next(iter(changes))} is"):
        tiny.manifest(**changes)


@pytest.mark.parametrize(
    "changes", [{"layers": ()}, {"layers": (4, 1)}, {"layers": (6,)}, {"query_heads": 3}]
)
def test_models_are_checked(tiny, changes):
    with pytest.raises(KvenvError, match=f"model.{next(iter(changes))} is"):
        dataclasses.replace(tiny.MODEL, **changes)
