"""The recording benchmark, on a model small enough to say nothing about time."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from kvenv.errors import KvenvError
from kvenv.recording import bench


def test_every_way_is_measured(checkpoints) -> None:
    console = Console(file=io.StringIO(), width=120)
    result = bench.run(str(checkpoints(0)), [70], 1, console)
    assert [row["tokens"] for row in result["rows"]] == [70]
    for row in result["rows"]:
        for way in ("forward", "last_logits", "record", "output_attentions"):
            assert row[way]["seconds"] > 0
            assert row[way]["peak_bytes"] >= 0
        ratio = row["record"]["seconds"] / row["forward"]["seconds"]
        assert f" {ratio:.3f} " in console.file.getvalue()
    assert console.file.getvalue().count("output_attentions") == 1


TINY = {
    "hidden_size": 128,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 256,
}


def test_a_random_model_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.RANDOM, "random-tiny", TINY)
    console = Console(file=io.StringIO(), width=120)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = bench.run("random-tiny", [70], 1, console, device=device)
    (row,) = result["rows"]
    ways = {"forward", "last_logits", "record", "output_attentions"}
    assert result["model"] == "random-tiny"
    if device == "cpu":
        assert result["dtype"] == "float32"
        assert row.keys() == {"tokens", *ways}
    else:
        assert result["dtype"] == "bfloat16"
        assert row.keys() == {"tokens", "capture", "parts", *ways}
        assert row["parts"].keys() == {"attention", "past_sum", "utility"}
        assert all(seconds > 0 for seconds in row["parts"].values())
        assert row["capture"]["peak_bytes"] > 0
    assert console.file.getvalue().count("record") == 2  # the title and the way


def test_a_way_beyond_the_memory_is_left_out() -> None:
    def greedy() -> None:
        raise torch.OutOfMemoryError("too much")

    ways = {"forward": lambda: None, "output_attentions": greedy}
    assert bench._measure(ways, 1, torch.device("cpu")).keys() == {"forward"}


@pytest.mark.parametrize(
    ("lengths", "repeats", "message"),
    [
        ([100, 64], 1, r"tokens \[64\] do not fit: give lengths above 64 .* 512"),
        ([513], 1, r"tokens \[513\] do not fit"),
        ([100], 0, "repeats is 0"),
    ],
)
def test_errors(checkpoints, lengths: list[int], repeats: int, message: str) -> None:
    with pytest.raises(KvenvError, match=message):
        bench.run(str(checkpoints(0)), lengths, repeats, Console(file=io.StringIO()))
