"""Static layers whose newcomers get their scores a step later hold what others hold."""

from __future__ import annotations

import copy

import pytest
import torch

from kvenv.cache.padding import LeftPadding
from kvenv.cache.plan import Plan
from kvenv.cache.scoring import CacheScorer
from kvenv.cache.static import SlotLayer
from kvenv.cache.worth import Limits
from kvenv.scorers.bundle import NetworkScorer
from kvenv.scorers.network import Architecture
from kvenv.trace import ModelInfo

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERYTHING = Architecture(
    ("value", "position", "key_norm", "key", "fill", "value_norm"), (24, 20), budget=9, age=True
)


def network():
    """For two heads of 64."""
    draw = torch.Generator().manual_seed(0)
    built = EVERYTHING.build([(0, 0), (0, 1)], 64, draw)
    built.std.uniform_(0.5, 2, generator=draw)
    for weight in [*built.weights, *built.biases]:
        weight.data = (3 * weight.data).half().float()
    assert built.age is not None
    built.age.data.normal_(generator=draw)
    return built.requires_grad_(False)


def slot_layer(backend, recent, capacities, pads=0):
    model = ModelInfo("m", "f", "llama", "t", 1, 2, 2, 64, (0,))
    scorer = NetworkScorer(network(), EVERYTHING, model)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :pads] = 0
    plan = Plan(
        *({0: capacities}, Limits(8, 1, recent), CacheScorer(scorer, None, {0: 2})),
        *(LeftPadding(mask), backend, None),
    )
    return SlotLayer(0, plan, None)


def no_attention(query, *_):
    return query


def feed(layer, key, value):
    """A step whose outputs nobody reads."""
    with torch.no_grad():
        layer.update(key, value)
        if key.shape[2] == 1:
            layer.attend_by(key, 1.0, no_attention)
        else:
            layer.read(key, key, value, 1.0, torch.nn.Module(), lambda: key, no_attention)


def layers_hold_the_same(one, other):
    one._judge.settle(one.slots)
    assert one.slots.pending.eq(-1).all()
    got, want = (layer.positions.sort(-1) for layer in (one, other))
    assert torch.equal(got.values, want.values)
    held = want.values >= 0
    scores = (
        layer.slots.dense(layer.slots.scores).gather(-1, order.indices)[held]
        for layer, order in ((one, got), (other, want))
    )
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("steps", "recent", "capacities", "pads"),
    [(105, 2, (7, 9), 4), (65, 5, (8, 8), 0), (40, 1, (8, 8), 2)],
)
def test_layers_with_and_without_kernels_hold_the_same_tokens(steps, recent, capacities, pads):
    layers = [slot_layer(backend, recent, capacities, pads) for backend in ("triton", "torch")]
    draw = torch.Generator().manual_seed(recent)
    for step in range(steps):
        q = {0: 6, 30: 3, 31: 2, 60: 12}.get(step, 1)
        states = torch.randn(2, 2, 2, q, 64, generator=draw).to(DEVICE)
        for layer in layers:
            feed(layer, *states)
        assert torch.equal(*(layer.positions.sort(-1).values for layer in layers))
        if step % 35 == 20:
            layers_hold_the_same(*layers)
        if step == 40:  # rows change places while a score is pending
            for layer in layers:
                layer.reorder_cache(torch.tensor([1, 0]))
        if step == 45:
            layers = [copy.deepcopy(layer) for layer in layers]
            for layer in layers:
                layer.batch_select_indices(torch.tensor([1, 1]))
    layers_hold_the_same(*layers)


def test_cropping_and_starting_anew_leave_no_score_pending():
    layers = [slot_layer(backend, 2, (30, 30)) for backend in ("triton", "torch")]
    for drop in (1, 3):
        draw = torch.Generator().manual_seed(drop)
        for step in range(12):
            q = 6 if step == 0 else 1
            states = torch.randn(2, 2, 2, q, 64, generator=draw).to(DEVICE)
            for layer in layers:
                feed(layer, *states)
                if step == 8:
                    layer.crop(-drop)
        layers_hold_the_same(*layers)
        for layer in layers:
            layer.reset()
