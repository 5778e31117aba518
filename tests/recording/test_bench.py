"""The recording benchmark, on a model small enough to say nothing about time."""

from __future__ import annotations

import io

import pytest
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
