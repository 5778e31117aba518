"""Scores equal kvpress 0.5.5's, in an environment of its own: it wants transformers < 5.3."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvenv import plugins
from kvenv.recording.capture import capture
from kvenv.scorers.query_stats import QueryStats

kvpress = pytest.importorskip("kvpress")

N, WINDOW, HEADS, GROUP, LAYER = 300, 64, 2, 2, 1


@dataclass(frozen=True)
class Seen:
    """A layer of a tiny Llama that read a text, as kvpress and as kvenv take it."""

    press: dict[str, Any]
    ours: dict[str, torch.Tensor]
    tokens: torch.Tensor
    model: Any


@pytest.fixture(scope="module")
def seen() -> Seen:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS * GROUP,
        num_key_value_heads=HEADS,
        head_dim=16,
        max_position_embeddings=2048,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():  # large enough that attention is far from uniform
        weight.data.mul_(4 if weight.ndim > 1 else 1)
    module = model.model.layers[LAYER].self_attn
    module.rotary_emb = model.model.rotary_emb  # as a press has it while it is on
    caught: dict[str, Any] = {}
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: caught.update(kwargs), with_kwargs=True
    )
    tokens, cache = torch.randint(128, (1, N)), DynamicCache(config=config)
    with torch.no_grad():
        attentions = model(tokens, past_key_values=cache, output_attentions=True).attentions[LAYER]
        hook.remove()
        held, hidden = cache.layers[LAYER], caught["hidden_states"]
        plain = module.q_proj(hidden).view(1, N, HEADS * GROUP, 16).transpose(1, 2)
        apply = kvpress.presses.snapkv_press.rotate_half
        cos, sin = (part.unsqueeze(1) for part in caught["position_embeddings"])
        queries = plain * cos + apply(plain) * sin
        mean, covariance = QueryStats(model, N, N).measure(module, LAYER, queries[0])
    press = {
        "module": module,
        "hidden_states": hidden,
        "keys": held.keys,
        "values": held.values,
        "attentions": attentions,
        "kwargs": caught,
    }
    ours = {
        "keys": held.keys,
        "values": held.values,
        "positions": torch.arange(N).expand(1, HEADS, N),
        "now": torch.tensor([N - 1]),
        "queries": queries[:, :, -WINDOW:],
        "past_attention": attentions.sum(2).unflatten(1, (HEADS, GROUP)).sum(2),
        "query_mean": mean[None],
        "query_cov": covariance[None],
    }
    return Seen(press, ours, tokens[0], model)


def theirs(seen: Seen, name: str, options: dict[str, Any], attentions: bool) -> torch.Tensor:
    """The press's scores; from queries of its own making unless it is to use ``attentions``."""
    press = getattr(kvpress, name)(**options)
    with torch.no_grad():
        return press.score(**seen.press | ({} if attentions else {"attentions": None}))


def ours(seen: Seen, name: str, options: dict[str, Any]) -> torch.Tensor:
    agent = plugins.load("agent", name)(**options)
    wanted = {"keys", "values", "positions", "now", *agent.needs}
    return agent.score(LAYER, **{part: seen.ours[part] for part in wanted})


def lag_tail(lag: int) -> Callable[[], list[int]]:
    """Sinks, the last whole chunk and the rest."""
    return lambda: [*range(4), *range(4 + ((N - 4) // lag - 1) * lag, N)]


# agent, its options, press, its options, whether it needs attentions, tokens that always stay
CASES: list[tuple[str, dict[str, Any], str, dict[str, Any], bool, Callable[[], list[int]]]] = [
    ("knorm", {}, "KnormPress", {}, False, list),
    ("keydiff", {}, "KeyDiffPress", {}, False, list),
    ("snapkv", {}, "SnapKVPress", {}, False, lambda: [*range(N - 64, N)]),
    ("snapkv", {}, "SnapKVPress", {}, True, lambda: [*range(N - 64, N)]),
    (
        "snapkv",
        {"window": 16, "kernel": 7},
        "SnapKVPress",
        {"window_size": 16, "kernel_size": 7},
        False,
        lambda: [*range(N - 16, N)],
    ),
    ("tova", {}, "TOVAPress", {}, False, lambda: [N - 1]),
    ("tova", {}, "TOVAPress", {}, True, lambda: [N - 1]),
    ("observed", {}, "ObservedAttentionPress", {}, True, list),
    ("lagkv", {}, "LagKVPress", {}, False, lag_tail(128)),
    ("lagkv", {"lag": 32}, "LagKVPress", {"lag_size": 32}, False, lag_tail(32)),
    (
        "lagkv",
        {"lag": 32, "cross_scoring": True},
        "LagKVPress",
        {"lag_size": 32, "cross_scoring": True},
        False,
        lag_tail(32),
    ),
    ("expected", {}, "ExpectedAttentionPress", {}, False, lambda: [*range(4)]),
    (
        "expected",
        {"use_covariance": False, "epsilon": 0.1},
        "ExpectedAttentionPress",
        {"use_covariance": False, "epsilon": 0.1},
        False,
        lambda: [*range(4)],
    ),
    (
        "expected",
        {"use_vnorm": False},
        "ExpectedAttentionPress",
        {"use_vnorm": False},
        False,
        lambda: [*range(4)],
    ),
]


@pytest.mark.parametrize(("agent", "options", "press", "its", "attentions", "kept"), CASES)
def test_scores_equal_the_press(
    seen, record_property, agent, options, press, its, attentions, kept
):
    expected, got = theirs(seen, press, its, attentions), ours(seen, agent, options)
    if agent == "observed":
        got = got / GROUP  # a sum over query heads, where kvpress takes the mean
    stays = torch.zeros(N, dtype=torch.bool)
    stays[kept()] = True
    difference = (got - expected)[..., ~stays].abs().max() / expected[..., ~stays].abs().max()
    record_property("difference", float(difference))
    print(f"{agent} {options}: largest difference {difference:.1e} of the largest score")
    assert difference < 2e-6
    if stays.any():  # one score for all of them there, an order here; before all others in both
        for scores in (expected, got):
            assert (scores[..., stays].amin(-1) > scores[..., ~stays].amax(-1)).all()


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.7])
def test_streaming_keeps_the_same_tokens(seen, ratio):
    stays = theirs(seen, "StreamingLLMPress", {"compression_ratio": ratio}, False) == 1
    best = ours(seen, "streaming", {}).argsort(descending=True)[..., : int(stays[0, 0].sum())]
    assert stays.take_along_dim(best, -1).all()


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.7])
@pytest.mark.parametrize("case", [case for case in CASES if case[0] != "lagkv"])
def test_a_press_keeps_the_same_tokens(seen, case, ratio):
    agent, options, press, its, attentions, _ = case
    budget = int(N * (1 - ratio))
    there = theirs(seen, press, its, attentions).topk(budget).indices.sort().values
    here = ours(seen, agent, options).topk(budget).indices.sort().values
    assert torch.equal(there, here)


def test_short_prompts_of_lagkv_rank_alike(seen):
    options = {"lag_size": 200}  # 4 sinks and two chunks would be 404 tokens
    there = theirs(seen, "LagKVPress", options, False)[..., 4:]
    here = ours(seen, "lagkv", {"lag": 200})[..., 4:]
    assert torch.equal(there.argsort(), here.argsort())


def test_recorded_statistics_are_the_press_s(seen):
    """From what the recorder watches, future included, not from hidden states."""
    future = torch.randint(128, (7,))
    kept, _ = capture(seen.model, torch.cat([seen.tokens, future]), N, stats=True)
    press = kvpress.ExpectedAttentionPress()
    with torch.no_grad():
        mean, covariance = press.get_query_statistics(
            seen.press["module"], seen.press["hidden_states"]
        )
    for got, want in ((kept.query_mean, mean), (kept.query_cov, covariance)):
        difference = (torch.from_numpy(got[LAYER]) - want[0]).abs().max() / want.abs().max()
        print(f"statistics: largest difference {difference:.1e} of the largest")
        assert difference < 2e-5
