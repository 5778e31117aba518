from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvenv.errors import KvenvError
from kvenv.rotation import Rotation
from kvenv.trace import TraceSet, batches, same_model
from kvenv.trace.batches import (
    Reader,
    choose_heads,
    deviation,
    moments,
    read_heads,
    split_documents,
)

LENGTHS = ((40, 6), (24, 5), (33, 7))


@pytest.fixture(scope="module")
def traces(tiny_traces: Callable[..., TraceSet], tmp_path_factory: pytest.TempPathFactory):
    return tiny_traces(tmp_path_factory.mktemp("traces") / "tiny", LENGTHS)


@pytest.mark.parametrize(
    "heads", [[(1, 0), (1, 1), (3, 0), (3, 1)], [(3, 1), (1, 1), (3, 0)], [(1, 0)]]
)
def test_a_batch_holds_the_prompt_of_each_head_in_the_order_asked(
    traces: TraceSet, heads: list[tuple[int, int]]
):
    for index, (n, _) in enumerate(LENGTHS):
        batch = read_heads(traces, index, heads)
        assert batch.future == LENGTHS[index][1]
        for row, head in enumerate(heads):
            whole = traces.head(index, *head)
            np.testing.assert_array_equal(batch.keys[row], whole.keys[:n])
            np.testing.assert_array_equal(batch.values[row], whole.values[:n])
            np.testing.assert_array_equal(batch.utility[row], whole.utility)
        for tensor in (batch.keys, batch.values, batch.utility):
            assert tensor.dtype == torch.float32


@pytest.mark.parametrize("layout", ["halves", "pairs"])
def test_keys_in_the_frame_of_now_are_those_of_the_rotation_of_each_layer(
    tiny_traces: Callable[..., TraceSet], tmp_path: Path, layout: Any
):
    rotations = (Rotation((1.0, 0.1, 0.01), layout), Rotation((0.5, 0.02), layout, 4))
    traces = tiny_traces(tmp_path / "rotated", rotation=rotations)
    heads = [(3, 0), (1, 1), (3, 1)]
    for dtype in (np.float32, np.float16):
        batch = read_heads(traces, 0, heads, dtype)
        framed = batch.framed()
        for row, (layer, _) in enumerate(heads):
            own = traces.model.rotation(layer)
            wanted = own.frame(batch.keys[row][None, None], torch.tensor([39]))[0, 0]
            assert torch.equal(framed[row], wanted)
            assert not torch.allclose(wanted, batch.keys[row].float(), atol=0.1)
    one = read_heads(traces, 0, [(1, 0), (1, 1)])
    wanted = rotations[0].frame(one.keys[None], torch.tensor([39]))[0]
    assert torch.equal(one.framed(), wanted)


def test_a_layer_whose_rotation_cannot_be_stated_is_an_error(
    tiny_traces: Callable[..., TraceSet], tmp_path: Path
):
    traces = tiny_traces(tmp_path / "odd", rotation=(Rotation(), "it spins"))
    assert read_heads(traces, 0, [(1, 0)]).framed().shape == (1, 40, 8)
    with pytest.raises(KvenvError, match=r"layer 3 .*no frame of now \(it spins\)"):
        read_heads(traces, 0, [(1, 0), (3, 0)])


def test_a_stream_gives_the_episodes_in_order(traces: TraceSet):
    order = [(0, 2), (1, 0), (0, 2), (0, 1)]
    heads = [(1, 1), (3, 0)]
    given_ = list(Reader([traces, traces], heads).stream(order))
    assert len(given_) == 4
    for batch, (_, index) in zip(given_, order, strict=True):
        assert torch.equal(batch.keys, read_heads(traces, index, heads).keys)
    assert list(Reader([traces], heads).stream([])) == []


def test_a_stream_reads_one_episode_ahead_and_no_more(
    traces: TraceSet, monkeypatch: pytest.MonkeyPatch
):
    started = 0
    ahead = threading.Event()

    def counted(*args: object):
        nonlocal started
        started += 1
        ahead.set()
        return read_heads(*args)

    monkeypatch.setattr(batches, "read_heads", counted)
    endless = ((0, i % 3) for i in itertools.count())  # a stream that hoarded would never return
    data = Reader([traces], [(1, 0)]).stream(endless)
    for used in range(1, 20):
        next(data)
        assert started <= used + 1
    assert ahead.wait(5)
    data.close()
    assert started <= 20


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What has been read so far: the arguments after the set."""
    done: list[tuple[object, ...]] = []

    def recorded(traces: TraceSet, *rest: Any):
        done.append(rest)
        return read_heads(traces, *rest)

    monkeypatch.setattr(batches, "read_heads", recorded)
    return done


ORDER = [(0, 2), (0, 0), (0, 2), (0, 1), (0, 0)]


def test_a_cpu_keeps_nothing(traces: TraceSet, reads: list):
    reader = Reader([traces], [(1, 0)])
    assert len(list(reader.stream(ORDER))) == len(list(reader.stream(ORDER))) == 5
    assert [index for index, *_ in reads] == [i for _, i in ORDER] * 2


# A device that holds shapes alone stands in for a GPU.
@pytest.mark.parametrize("roomy", [True, False])
def test_another_device_keeps_episodes_while_there_is_room(
    traces: TraceSet, monkeypatch: pytest.MonkeyPatch, reads: list, roomy: bool
):
    monkeypatch.setattr(Reader, "_roomy", lambda _: roomy)
    reader = Reader([traces], [(1, 0), (3, 1)], "meta")
    first, again = (list(reader.stream([(0, i) for i in range(3)])) for _ in range(2))
    assert [index for index, *_ in reads] == ([0, 1, 2] if roomy else [0, 1, 2] * 2)
    assert all((a is b) == roomy for a, b in zip(first, again, strict=True))
    for batch, (n, _) in zip(again, LENGTHS, strict=True):
        assert batch.keys.shape == (2, n, 8)
        assert (batch.keys.dtype, batch.values.dtype) == (torch.float16, torch.float16)
        assert batch.utility.dtype == torch.float32
        assert all(x.device.type == "meta" for x in (batch.keys, batch.values, batch.utility))
        assert batch.framed().dtype == torch.float32


def test_a_kept_episode_is_given_in_its_place(
    traces: TraceSet, monkeypatch: pytest.MonkeyPatch, reads: list
):
    monkeypatch.setattr(Reader, "_roomy", lambda _: True)
    reader = Reader([traces, traces], [(1, 0)], "meta")
    lengths = [batch.utility.shape[1] for batch in reader.stream([*ORDER, *ORDER, (1, 1)])]
    assert lengths == [LENGTHS[i][0] for _, i in [*ORDER, *ORDER, (1, 1)]]
    assert [index for index, *_ in reads] == [2, 0, 1, 1]  # the last is of the other set


@pytest.mark.parametrize(("free", "roomy"), [(26, True), (25, False), (0, False)])
def test_a_quarter_of_a_gpu_stays_free(
    traces: TraceSet, monkeypatch: pytest.MonkeyPatch, free: int, roomy: bool
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 100))
    assert Reader([traces], [(1, 0)], "cuda")._roomy() == roomy
    assert not Reader([traces], [(1, 0)], "meta")._roomy()


def test_what_is_kept_as_float16_is_what_was_recorded(traces: TraceSet):
    half = read_heads(traces, 0, [(1, 0), (3, 1)], np.float16)
    whole = read_heads(traces, 0, [(1, 0), (3, 1)])
    assert half.keys.dtype == torch.float16
    assert torch.equal(half.keys.float(), whole.keys)
    assert torch.equal(half.values.float(), whole.values)


def test_a_failed_read_is_raised_where_the_episode_is_wanted(traces: TraceSet):
    data = Reader([traces], [(1, 0)]).stream([(0, 0), (0, 7), (0, 1)])
    assert next(data).keys.shape == (1, 40, 8)
    with pytest.raises(KvenvError, match="no episode 7"):
        next(data)


def test_sets_of_different_models_are_an_error_that_names_both(
    tiny_traces: Callable[..., TraceSet], traces: TraceSet, tmp_path: Path
):
    other = tiny_traces(tmp_path / "other", fingerprint="other")
    same_model([traces, traces])
    with pytest.raises(KvenvError) as caught:
        same_model([traces, traces, other])
    assert str(traces.path) in str(caught.value)
    assert str(other.path) in str(caught.value)
    with pytest.raises(KvenvError, match="no trace sets"):
        same_model([])


def test_heads_are_those_that_every_set_recorded(
    tiny_traces: Callable[..., TraceSet], traces: TraceSet, tmp_path: Path
):
    other = tiny_traces(tmp_path / "other", layers=(0, 3))
    assert choose_heads([traces], None) == [(1, 0), (1, 1), (3, 0), (3, 1)]
    assert choose_heads([traces, other], None) == [(3, 0), (3, 1)]
    assert choose_heads([traces], [(3, 1), (1, 0), (3, 1)]) == [(1, 0), (3, 1)]
    with pytest.raises(
        KvenvError, match=r"heads \[\(1, 0\), \(3, 2\)\] are not recorded"
    ) as caught:
        choose_heads([traces, other], [(3, 0), (3, 2), (1, 0)])
    assert "layers there are [3] with KV heads [0, 1]" in str(caught.value)


class Documents:
    """As much of a trace set as splitting looks at."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def info(self, index: int) -> Documents:
        return Documents([self.names[index]])

    @property
    def document(self) -> str:
        return self.names[0]


@given(
    st.lists(st.lists(st.sampled_from([f"d{i}" for i in range(30)])), min_size=1, max_size=3),
    st.integers(2, 12),
)
def test_no_document_is_on_both_sides(names: list[list[str]], every: int):
    sets = [Documents(part) for part in names]
    train, held = split_documents(sets, every)
    everything = [(w, i) for w, part in enumerate(names) for i in range(len(part))]
    assert sorted(train + held) == everything
    ours, theirs = ({names[w][i] for w, i in part} for part in (train, held))
    assert not ours & theirs
    documents = len(ours | theirs)
    if documents < 2:
        assert not held
    else:
        assert train
        assert len(theirs) == max(1, len(range(every // 2, documents, every)))


def test_about_a_tenth_of_the_documents_is_held_out(traces: TraceSet):
    train, held = split_documents([Documents([f"d{i // 2}" for i in range(60)])])
    assert len(train) == 54
    assert held == [(0, i) for i in (10, 11, 30, 31, 50, 51)]
    assert split_documents([traces]) == ([(0, 0), (0, 2)], [(0, 1)])


def test_moments_are_those_of_all_tokens_and_what_never_varies_is_left_as_it_is():
    parts = [torch.randn(2, n, 3) for n in (5, 1, 8)]
    for part in parts:
        part[..., 2] = 7
    whole = torch.cat(parts, 1).double()
    mean, square = moments(parts)
    torch.testing.assert_close(mean, whole.mean(1, keepdim=True))
    std = deviation(mean, square)
    torch.testing.assert_close(std[..., :2], whole.std(1, correction=0, keepdim=True)[..., :2])
    assert (std[..., 2] == 1).all()
