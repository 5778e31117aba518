"""The trained agents that come with kvenv."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from kvenv import plugins
from kvenv.cache import EvictionCache
from kvenv.evaluation.retention import measure
from kvenv.recording import models
from kvenv.scorers import load_scorer
from kvenv.trace import TraceSet

HEADS = {
    "kvp-smollm2-135m": {(layer, head) for layer in range(30) for head in range(3)},
    "kvp-gemma-3-270m": {(5, 0), (11, 0), (17, 0)},
}
TRAINED = sorted(plugins.trained())


def test_both_families_are_there() -> None:
    assert set(TRAINED) == HEADS.keys()


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_agent_scores_every_full_attention_head(name: str) -> None:
    scorer = load_scorer(name)
    assert scorer.heads == HEADS[name]
    assert scorer.pointwise
    assert not scorer.needs


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_agent_is_small_and_has_a_card(name: str) -> None:
    folder = plugins.trained()[name]
    weights = folder / "model.safetensors"
    assert weights.stat().st_size < 8_000_000
    halves = {k for k, v in load_file(weights).items() if v.dtype == torch.float16}
    assert any("weights" in key for key in halves)
    card = ModelCard.load(Path(folder) / "README.md")
    assert card.data["library_name"] == "kvenv"
    figures = {result.metric_type for result in card.data.eval_results or []}
    assert {"closure", "sink_free_closure", "retention@1/4"} <= figures
    assert f"python examples/build_zoo.py {name}" in card.content


def test_it_ranks_the_packaged_traces_better_than_any_heuristic() -> None:
    names = ("kvp-smollm2-135m", "knorm", "keydiff", "streaming", "snapkv", "tova", "observed")
    found = measure([TraceSet("sample")], {name: load_scorer(name) for name in names})
    closure = {m.agent: m.sink_free["closure"].mean() for m in found}
    ours = closure.pop("kvp-smollm2-135m")
    assert ours > 0.9
    assert ours > max(closure.values()) + 0.03


@pytest.mark.slow
def test_it_answers_from_a_quarter_of_the_cache() -> None:
    model, tokenizer = models.load("smollm2-135m")
    text = "The pass key is 71432. " + "The grass is green. " * 60 + "The pass key is"
    inputs = tokenizer(text, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    cache = EvictionCache(model, load_scorer("kvp-smollm2-135m"), budget=length // 4)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert "71432" in tokenizer.decode(output[0, length:])
