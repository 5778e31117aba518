"""Tensors of a forward pass, gathered on the host."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from kvenv.errors import KvenvError
from kvenv.recording import offload
from kvenv.recording.offload import Offload

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def left_by(layer: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(layer)
    keys = torch.randn(2, 5, 4, generator=random)
    sums = torch.rand(2, 5, generator=random)
    return {"keys": keys.to(DEVICE), "past_sum": sums.to(DEVICE)}


@pytest.mark.parametrize("chunk", [1, 500, 2**20])
def test_arrays_are_those_of_the_layers_in_their_order(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "CHUNK", chunk)
    gathered = Offload((7, 2, 3), DEVICE)
    for layer in (2, 3, 7):
        gathered.add(layer, left_by(layer))
    whole = gathered.finish()
    assert whole["keys"].dtype == np.float16
    assert whole["past_sum"].dtype == np.float32
    for row, layer in enumerate((7, 2, 3)):
        right = {name: tensor.cpu() for name, tensor in left_by(layer).items()}
        np.testing.assert_array_equal(whole["keys"][row], right["keys"].half().numpy())
        np.testing.assert_array_equal(whole["past_sum"][row], right["past_sum"].numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 2**20])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, 65536.0, -1e6])
def test_what_float16_cannot_hold_is_named(
    bad: float, chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "CHUNK", chunk)
    gathered = Offload(range(3), DEVICE)
    for layer in range(3):
        keys = left_by(layer)["keys"].to(dtype)
        if layer:
            keys[1, 3, 2] = bad
        gathered.add(layer, {"keys": keys})
    reached = f"{abs(float(torch.tensor(bad).to(dtype))):g}"
    with pytest.raises(KvenvError, match=re.escape(f"keys of layer 1 head 1 reach {reached},")):
        gathered.finish()


def test_the_largest_numbers_of_float16_are_kept() -> None:
    gathered = Offload((0,), DEVICE)
    gathered.add(0, {"keys": torch.tensor([[[65504.0, -65519.0]]], device=DEVICE)})
    np.testing.assert_array_equal(gathered.finish()["keys"], [[[[65504.0, -65504.0]]]])


def test_a_layer_that_never_came_is_named() -> None:
    gathered = Offload((0, 4, 5), DEVICE)
    gathered.add(4, left_by(4))
    with pytest.raises(KvenvError, match=r"layers \[0, 5\] have no attention .* --layers"):
        gathered.finish()
