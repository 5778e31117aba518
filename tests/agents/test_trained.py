"""The trained agents that come with kvenv."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from kvenv import models, plugins
from kvenv.cache import EvictionCache
from kvenv.evaluation.retention import measure
from kvenv.scorers import load_scorer
from kvenv.trace import TraceSet

HEADS = {
    "kvp-smollm2-135m": {(layer, head) for layer in range(30) for head in range(3)},
    "kvp-gemma-3-270m": {(5, 0), (11, 0), (17, 0)},
}
# The sample has no query statistics, which "expected" needs; the oracle is no rival.
HEURISTICS = [
    name
    for name in plugins.available("agent")
    if name not in ("oracle", "expected") and not plugins.load("agent", name).trains
]
TRAINED = sorted(plugins.trained())


def test_both_families_are_there() -> None:
    assert set(TRAINED) == HEADS.keys()


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_agent_scores_every_full_attention_head(name: str) -> None:
    scorer = load_scorer(name)
    assert scorer.heads == HEADS[name]
    assert not scorer.needs
    assert scorer.calibration is not None
    assert set(scorer.calibration.heads) == HEADS[name]


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_agent_is_small_and_has_a_card(name: str) -> None:
    folder = plugins.trained()[name]
    weights = folder / "model.safetensors"
    assert weights.stat().st_size < 4_000_000
    halves = {k for k, v in load_file(weights).items() if v.dtype == torch.float16}
    assert any("weights" in key for key in halves)
    card = ModelCard.load(Path(folder) / "README.md")
    assert card.data["library_name"] == "kvenv"
    figures = {result.metric_type for result in card.data.eval_results or []}
    assert {"normalized_score", "sink_free_normalized_score", "retention@1/4"} <= figures
    assert f"python examples/build_zoo.py {name}" in card.content


def test_it_ranks_the_packaged_traces_better_than_any_heuristic() -> None:
    names = ["kvp-smollm2-135m", *HEURISTICS]
    found = measure([TraceSet("sample")], {name: load_scorer(name) for name in names})
    normalized_score = {m.agent: m.sink_free["normalized_score"].mean() for m in found}
    ours = normalized_score.pop("kvp-smollm2-135m")
    assert ours > 0.9
    assert ours > max(normalized_score.values()) + 0.03


@pytest.mark.slow
def test_it_answers_from_a_quarter_of_the_cache() -> None:
    model, tokenizer = models.load("smollm2-135m")
    text = "The pass key is 71432. " + "The grass is green. " * 60 + "The pass key is"
    inputs = tokenizer(text, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    cache = EvictionCache(model, load_scorer("kvp-smollm2-135m"), budget=length // 4)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert "71432" in tokenizer.decode(output[0, length:])
