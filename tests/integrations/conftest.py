"""A tiny model, caches that remember all they were given, and a replay of presses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer

from kvenv.identity import describe
from kvenv.scorers import NetworkScorer, Scorer
from kvenv.scorers.network import Architecture

LAYERS, HEADS = 2, 2


@pytest.fixture(scope="session")
def kvpress() -> Any:
    return pytest.importorskip("kvpress")


@pytest.fixture
def model(checkpoints) -> Any:
    """A Llama of 2 layers, 2 KV and 4 query heads of 8; a press changes its modules."""
    return AutoModelForCausalLM.from_pretrained(checkpoints(0)).eval()


@pytest.fixture(scope="session")
def tokenizer(checkpoints) -> Any:
    return AutoTokenizer.from_pretrained(checkpoints(0))


class Witness(DynamicLayer):
    """Remembers every key and value it was given, in the order of the text."""

    ever: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states, value_states, *args, **kwargs):
        new = (key_states, value_states)
        before = self.ever or tuple(x[:, :, :0] for x in new)
        self.ever = tuple(torch.cat(pair, dim=2) for pair in zip(before, new, strict=True))
        return super().update(key_states, value_states, *args, **kwargs)

    def held(self) -> torch.Tensor:
        """Positions (B, H, n) of what it holds, by comparing it with all it was given."""
        same = (self.keys.unsqueeze(3) == self.ever[0].unsqueeze(2)).all(-1)
        assert (same.sum(-1) == 1).all(), "two tokens have the same key, or one was changed"
        return same.int().argmax(-1)


@pytest.fixture(scope="session")
def witness() -> Callable[[], Cache]:
    return lambda: Cache(layers=[Witness() for _ in range(LAYERS)])


@pytest.fixture
def network(model, tokenizer) -> Callable[..., NetworkScorer]:
    """Makes a random network scorer of features; ``age`` gives it age terms that matter."""

    def make(*features: Any, age: bool = False, heads: Any = None) -> NetworkScorer:
        noise = torch.Generator().manual_seed(3)
        every = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
        architecture = Architecture(features, hidden=(16,), age=age)
        built = architecture.build(heads or every, 8, noise)
        if built.age is not None:
            built.age.data.normal_(generator=noise)
        return NetworkScorer(built, architecture, describe(model, tokenizer))

    return make


@pytest.fixture(scope="session")
def replay() -> Callable[..., list[torch.Tensor]]:
    return _replay


@torch.no_grad()
def _replay(cache: Cache, scorer: Scorer, events: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """What each layer of a witness must hold, token by token, after cuts (tokens seen, budget).

    Asks the scorer for the tokens in shuffled order, as one that goes by slot would get wrong.
    """
    result = []
    for number, layer in enumerate(cache.layers):
        keys, values = layer.ever
        heads: list[list[int]] = [[] for _ in range(keys.shape[1])]
        seen = 0
        for upto, budget in events:
            heads = [[*held, *range(seen, upto)] for held in heads]
            seen = upto
            shuffled = torch.randperm(len(heads[0]), generator=torch.Generator().manual_seed(seen))
            at = torch.tensor(heads)[None][..., shuffled]
            wide = at.unsqueeze(-1)
            worth = scorer.score(
                number, keys.take_along_dim(wide, 2), values.take_along_dim(wide, 2), at
            )
            if scorer.age_term is not None:
                worth = worth + scorer.age_term(number, seen - 1 - at)
            for head, (places, scores) in enumerate(zip(at[0], worth[0], strict=True)):
                ranked = sorted(zip((-scores).tolist(), places.tolist(), strict=True))
                heads[head] = sorted(place for _, place in ranked[:budget])
        rest = list(range(seen, keys.shape[2]))
        result.append(torch.tensor([[*held, *rest] for held in heads])[None])
    return result
