"""Per-head networks in a cache, with what they learned of age, against a plain loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import erf

from kvenv.cache import EvictionCache
from kvenv.scorers import NetworkScorer
from kvenv.scorers.network import Architecture

SMALL = {"budget": 14, "sinks": 2, "recent": 4}
ARCHITECTURES = {
    "age": Architecture(("key", "value"), (8, 6), age=True),
    "norms, position and age": Architecture(
        ("key_norm", "position", "value_norm", "value"), (8,), age=True
    ),
    "mean key": Architecture(("mean_key", "key"), (8,)),
    "mean key and age": Architecture(("value", "mean_key"), (8,), age=True),
}
Tokens = dict[int, tuple[np.ndarray, np.ndarray]]
"""Position -> key and value."""


def worth_of(scorer: NetworkScorer, row: int, held: Tokens, now: int) -> dict[int, float]:
    """What each token held is worth to one head, in float64 and a token at a time."""
    net = {name: t[row].double().numpy() for name, t in scorer.network.state_dict().items()}
    worth = {}
    for position, (key, value) in held.items():
        mean = np.mean([k for p, (k, _) in held.items() if p <= position], axis=0)
        # The pad token, which a model may write too, has a key and a value of zeros.
        norms = [max(float(np.linalg.norm(x)), 1e-6) for x in (key, value, mean)]
        inputs = {
            "key": key,
            "value": value,
            "position": [math.log2(1 + position) / 16],
            "key_norm": [math.log2(norms[0])],
            "value_norm": [math.log2(norms[1])],
            "mean_key": [key @ mean / norms[0] / norms[2]],
        }
        x = np.concatenate([inputs[name] for name in scorer.architecture.features])
        x = (x - net["mean"][0]) / net["std"][0]
        for depth in range(len(scorer.network.weights)):
            if depth:
                x = x * (1 + erf(x / math.sqrt(2))) / 2
            x = x @ net[f"weights.{depth}"] + net[f"biases.{depth}"][0]
        worth[position] = float(x[0])
        if scorer.architecture.age:
            place = math.log2(1 + now - position)
            worth[position] += float(np.interp(place, np.arange(17), net["age"]))
    return worth


def simulate(scorer: NetworkScorer, row: int, steps: list[Tokens]) -> Iterator[list[int]]:
    """Positions that one head of one text holds after every step."""
    held: Tokens = {}
    for new in steps:
        held = held | new
        now = max(held)
        worth = worth_of(scorer, row, held, now)
        free = [p for p in held if SMALL["sinks"] <= p <= now - SMALL["recent"]]
        free.sort(key=lambda p: (worth[p], -p))
        for p in free[: max(0, len(held) - SMALL["budget"])]:
            del held[p]
        yield sorted(held)


def watch(cache: EvictionCache, layer: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Keys (B, H, q, d) and values that a layer is given, and positions (B, H, m) held then."""
    seen, update = [], cache.layers[layer].update

    def watched(keys, values, *args, **kwargs):
        given = keys.double().numpy().copy(), values.double().numpy().copy()
        attended = update(keys, values, *args, **kwargs)
        seen.append((*given, cache.positions(layer).numpy().copy()))
        return attended

    cache.layers[layer].update = watched
    return seen


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_cache_keeps_what_a_plain_loop_keeps(model, learned, batch, generate, family, name):
    lm, inputs = model(family), batch(2, 30, padded=True)
    scorer = learned(family, ARCHITECTURES[name])
    mask = inputs["attention_mask"]
    cache = EvictionCache(lm, scorer, attention_mask=mask, **SMALL)
    seen = {layer: watch(cache, layer) for layer in scorer.model.layers}
    generate(lm, inputs, cache, max_new_tokens=111)
    pads = (1 - mask).sum(-1).tolist()
    assert pads == [0, 4]
    for row, (layer, head) in enumerate(scorer.network.heads):
        assert len(seen[layer]) == 111  # the prompt and 110 single tokens
        for text, pad in enumerate(pads):
            steps, at = [], -pad
            for keys, values, _ in seen[layer]:
                pairs = enumerate(zip(keys[text, head], values[text, head], strict=True), at)
                steps.append({p: pair for p, pair in pairs if p >= 0})
                at += keys.shape[2]
            expected = simulate(scorer, row, steps)
            for (_, _, positions), held in zip(seen[layer], expected, strict=True):
                kept = positions[text, head]
                assert sorted(kept[kept >= 0].tolist()) == held


def test_the_age_term_changes_what_is_kept(model, learned, batch, generate):
    lm, inputs = model("llama"), batch(1, 30)
    kept = []
    for age in (True, False):
        scorer = learned("llama", Architecture(("key", "value"), (8, 6), age=age))
        cache = EvictionCache(lm, scorer, **SMALL)
        generate(lm, inputs, cache, max_new_tokens=2)
        kept.append(cache.positions(0))
    assert not torch.equal(*kept)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoding_never_waits_for_the_device(model, learned, no_waiting, name):
    scorer = learned("llama", ARCHITECTURES[name])
    mask = torch.ones(1, 24, dtype=torch.long)
    cache = EvictionCache(model("llama"), scorer, attention_mask=mask, **SMALL)
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    cache.update(*draw(2, 1, 2, 24, 16), 1)
    for _ in range(3):
        state = draw(2, 1, 2, 1, 16)
        with no_waiting():
            cache.update(state[0], state[1], 1)
