"""Of which kind a scorer is, and on which device it is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvenv import plugins
from kvenv.errors import KvenvError
from kvenv.evaluation.retention import METRICS, kind_of, measure
from kvenv.learning.agent import Heuristic
from kvenv.scorers import NetworkScorer
from kvenv.scorers.network import Architecture
from kvenv.trace import TraceSet


@pytest.fixture(scope="module")
def traces(tiny_traces: Callable[..., TraceSet], tmp_path_factory: pytest.TempPathFactory):
    return tiny_traces(tmp_path_factory.mktemp("traces") / "tiny")


def test_agents_are_learned_heuristic_or_oracle(traces: TraceSet):
    learned = Architecture(hidden=(4,)).build(traces.heads, 8, torch.Generator())
    scorers = {
        "kvp": NetworkScorer(learned, Architecture(hidden=(4,)), traces.model, {}, {}),
        "oracle": plugins.load("agent", "oracle")(),
        "knorm": plugins.load("agent", "knorm")(),
        "positions": plugins.load("agent", "streaming")(),
    }
    assert [kind_of(scorer) for scorer in scorers.values()] == [
        *("learned", "oracle", "heuristic", "heuristic")
    ]
    kinds = {m.agent: m.kind for m in measure([traces], scorers)}
    assert kinds == {name: kind_of(scorer) for name, scorer in scorers.items()}


def test_scores_are_made_where_they_are_asked_for(traces: TraceSet):
    """On the meta device nothing can be read back, so the scorer's answer is all that is seen."""
    seen: list[torch.device] = []

    class Where(Heuristic):
        needs = frozenset({"queries", "past_attention"})

        def score(self, layer: int, keys: torch.Tensor, *given: torch.Tensor, **needs: Any):
            seen.extend(t.device for t in (keys, *given, *needs.values()))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        measure([traces], {"where": Where()}, device="meta")
    assert len(seen) == 6  # keys, values, positions, now and two needs
    assert {device.type for device in seen} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_figures(traces: TraceSet):
    network = Architecture(hidden=(4,)).build(traces.heads, 8, torch.Generator().manual_seed(0))
    scorers = {
        name: plugins.load("agent", name)() for name in ("oracle", "knorm", "keydiff", "random")
    }
    scorers["mine"] = NetworkScorer(network, Architecture(hidden=(4,)), traces.model, {}, {})
    pairs = zip(*(measure([traces], scorers, device=d) for d in ("cpu", "cuda")), strict=True)
    for here, there in pairs:
        for metric in METRICS:
            np.testing.assert_allclose(here.full[metric], there.full[metric], rtol=1e-9)
            np.testing.assert_allclose(here.sink_free[metric], there.sink_free[metric], rtol=1e-9)
        for name in ("full", "sink_free"):
            np.testing.assert_allclose(here.curves[name], there.curves[name], rtol=1e-6)


def test_a_device_that_is_not_there_is_an_error(traces: TraceSet):
    with pytest.raises(KvenvError, match="device 'cuda:99' cannot be used: give cpu"):
        measure([traces], {"knorm": plugins.load("agent", "knorm")()}, device="cuda:99")
