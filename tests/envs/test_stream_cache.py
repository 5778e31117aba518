"""Stream-v1 is what an EvictionCache does while decoding, token for token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvenv import models
from kvenv.cache import EvictionCache
from kvenv.envs import StreamEnv
from kvenv.evaluation.play import ScorerPolicy
from kvenv.learning.agent import Heuristic
from kvenv.recording import recorder
from kvenv.recording.workload import Sample
from kvenv.scorers import load_scorer

TOKENS = 90


class Noise:
    """Random tokens."""

    def sample(self, index, *, tokenizer, rng, prompt_tokens, future_tokens, seed):
        ids = rng.integers(0, 256, prompt_tokens + future_tokens).tolist()
        return Sample(ids[:prompt_tokens], ids[prompt_tokens:], f"noise {index}")


class Recorded(Heuristic):
    """A heuristic on keys and values as a trace holds them, in float16."""

    def __init__(self, agent: str) -> None:
        self._scorer = load_scorer(agent)

    def score(self, layer, keys, values, positions, now, **needs):
        return self._scorer.score(layer, keys.half(), values.half(), positions, now)


@pytest.mark.parametrize("agent", ["knorm", "keydiff", "streaming"])
@pytest.mark.parametrize(("budget", "refresh"), [(24, None), (20, 3)])
def test_stream_holds_what_an_eviction_cache_holds(
    checkpoints, tmp_path, agent: str, budget: int, refresh: int | None
) -> None:
    model, tokenizer = models.load(str(checkpoints(0)), dtype="float32")
    traces = recorder.record(
        *(model, tokenizer, Noise(), tmp_path / "set"),
        episodes=1,
        prompt_tokens=TOKENS - 10,
        future_tokens=10,
        queries="all",
    )
    scorer = Recorded(agent)
    guards = {"sinks": 2, "recent": 4}
    cache = EvictionCache(model, scorer, budget=budget, refresh=refresh, **guards)
    tokens = torch.from_numpy(traces.tokens(0)).long()[None]
    held = []
    with torch.no_grad():
        for first, last in [(0, budget), *((t, t + 1) for t in range(budget, TOKENS))]:
            model(tokens[:, first:last], past_key_values=cache)
            held.append(cache.positions(0)[0].clone())  # layer 0: no eviction before it
    for head in range(2):
        env = StreamEnv(traces.path, budget=budget, interval=refresh, **guards)
        observation, info = env.reset(options={"episode": 0, "layer": 0, "head": head})
        policy, over = ScorerPolicy(scorer, env), False
        while not over:
            observation, _, over, _, info = env.step(policy(observation, info))
            places = env.batch.positions[0]
            found = held[info["position"] - budget][head]
            np.testing.assert_array_equal(places[places >= 0], found[found >= 0].numpy())
