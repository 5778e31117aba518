"""`KvenvPress` keeps what it should, and knows which tokens those are, cut after cut."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from kvenv import KvenvError, plugins
from kvenv.cache import EvictionCache
from kvenv.scorers import load_scorer

N = 40
IDS = torch.randperm(256, generator=torch.Generator().manual_seed(1))[None]
"""Tokens that all differ, and their keys with them."""


@pytest.fixture
def ours(kvpress):
    from kvenv.integrations.kvpress import KvenvPress

    return KvenvPress


def test_without_kvpress_the_error_names_the_extra():
    code = (
        "import sys; sys.modules['kvpress'] = None\n"
        "from kvenv import KvenvError\n"
        "try:\n    import kvenv.integrations.kvpress\n"
        "except ImportError as error:\n"
        "    assert isinstance(error, KvenvError); print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'kvenv[kvpress]'" in done.stdout


def read(model, press, cache, ids=IDS[:, :N]):
    """A text read under a press."""
    with torch.no_grad(), press(model):
        model(ids, past_key_values=cache)
    return cache


SAME = [
    ("knorm", {}, "KnormPress", {}),
    ("keydiff", {}, "KeyDiffPress", {}),
    ("streaming", {}, "StreamingLLMPress", {}),
    ("snapkv", {"window": 8}, "SnapKVPress", {"window_size": 8}),
    ("tova", {}, "TOVAPress", {}),
    ("expected", {}, "ExpectedAttentionPress", {}),
    ("observed", {}, "ObservedAttentionPress", {}),
]


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize(("agent", "options", "press", "its"), SAME)
def test_heuristics_keep_the_tokens_of_kvpress_s_own_presses(
    kvpress, ours, witness, checkpoints, agent, options, press, its, ratio
):
    attention = "eager" if agent == "observed" else "sdpa"
    folder = checkpoints(0)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    scorer = plugins.load("agent", agent)(**options)
    kept = []
    for one in (getattr(kvpress, press)(ratio, **its), ours(ratio, scorer=scorer)):
        cache = read(model, one, witness())
        kept.append([layer.held() for layer in cache.layers])
    for number, (theirs, own) in enumerate(zip(*kept, strict=True)):
        assert own.shape[-1] == max(1, int(N * (1 - ratio)))
        assert torch.equal(theirs.sort(-1).values, own)
        assert torch.equal(ours.positions(cache, number), own)


# StreamingLLMPress gives all the tokens that stay one score.
@pytest.mark.parametrize(
    ("agent", "options", "press", "its"), [case for case in SAME if case[0] != "streaming"]
)
def test_scores_are_those_of_kvpress_s_own_presses(
    kvpress, ours, checkpoints, record_property, agent, options, press, its
):
    attention = "eager" if agent == "observed" else "sdpa"
    folder = checkpoints(0)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    own = ours(0.5, scorer=plugins.load("agent", agent)(**options))
    theirs = getattr(kvpress, press)(0.5, **its)
    differences = []

    class Both(kvpress.BasePress):
        def compress(self, *args):
            got, want = own.score(*args), theirs.score(*args)
            scored = slice(4, -8) if agent in ("snapkv", "tova", "expected") else slice(None)
            got, want = got[..., scored], want[..., scored]
            if agent == "observed":
                got = got / 2  # a sum over the group's 2 query heads, theirs the mean
            differences.append(float((got - want).abs().max() / want.abs().max()))
            return args[2], args[3]

    with torch.no_grad(), Both()(model):
        model(IDS[:, :N], past_key_values=DynamicCache())
    record_property("difference", max(differences))
    print(f"{agent}: largest difference {max(differences):.1e} of the largest score")
    assert len(differences) == 2
    assert max(differences) < 2e-6


def run(model, cache, press, prompt, steps, how):
    """A prompt and decoded tokens under a press; ``how`` the tokens get their position ids."""
    with torch.no_grad(), press(model):
        if how == "generate":
            whole = IDS[:, :prompt]
            options = {"max_new_tokens": steps + 1, "do_sample": False}
            model.generate(whole, past_key_values=cache, **options)
            return
        model(IDS[:, :prompt], past_key_values=cache)
        for at in range(prompt, prompt + steps):
            given = {"position_ids": torch.tensor([[at]])} if how == "position_ids" else {}
            model(IDS[:, at : at + 1], past_key_values=cache, **given)


def scorers(network):
    yield load_scorer("random")
    yield load_scorer("streaming")
    yield plugins.load("agent", "lagkv")(sinks=2, lag=4)
    yield load_scorer("keydiff")
    yield network("key", "value", "position")
    yield network("key", "value", "position", age=True)
    yield network("key", "mean_key", age=True)


@pytest.mark.parametrize("how", ["position_ids", "generate", "none"])
@pytest.mark.parametrize("number", range(7))
def test_repeated_cuts_are_those_of_a_replay_with_true_positions(
    kvpress, ours, model, witness, network, replay, number, how
):
    scorer, cache = list(scorers(network))[number], witness()
    press = kvpress.PrefillDecodingPress(
        ours(0.5, scorer=scorer),
        kvpress.DecodingPress(ours(scorer=scorer), compression_interval=7, target_size=16),
    )
    run(model, cache, press, N, 30, how)
    events = [(N, N // 2), *((N + 7 * i, 16) for i in range(1, 5))]
    for number, (layer, expected) in enumerate(
        zip(cache.layers, replay(cache, scorer, events), strict=True)
    ):
        positions = ours.positions(cache, number)
        assert torch.equal(positions, expected)
        for now, ever in zip((layer.keys, layer.values), layer.ever, strict=True):
            assert torch.equal(now, ever.take_along_dim(positions.unsqueeze(-1), 2))


def test_scores_fixed_by_position_keep_the_best_of_all_that_was_ever_seen(
    kvpress, ours, model, witness
):
    """What top-b of top-b is: no cut may have scored a token at a place that is not its own."""
    cache = witness()
    press = kvpress.DecodingPress(ours(scorer="random"), compression_interval=1, target_size=12)
    run(model, cache, press, N, 60, "position_ids")
    everything = torch.arange(N + 60).expand(1, 2, -1)
    for number, layer in enumerate(cache.layers):
        scores = load_scorer("random").score(number, *layer.ever, everything)
        assert torch.equal(ours.positions(cache, number), scores.topk(12).indices.sort(-1).values)


def test_turns_after_a_cut_context_and_copies_of_the_cache(
    kvpress, ours, model, witness, network, replay
):
    scorer, cache = network("key", "value", "position", age=True), witness()
    read(model, ours(0.4, scorer=scorer), cache)
    asked = {20: copy.deepcopy(cache), 31: copy.deepcopy(cache)}
    for turn, branch in asked.items():
        later = kvpress.DecodingPress(ours(scorer=scorer), compression_interval=100, target_size=18)
        with torch.no_grad(), later(model):
            for start, end in ((N, N + turn), (N + turn, N + turn + 25)):
                ids = torch.arange(start, end)[None]
                model(IDS[:, start:end], past_key_values=branch, position_ids=ids)
        events = [(N, 24), (N + turn, 18), (N + turn + 25, 18)]
        for number, expected in enumerate(replay(branch, scorer, events)):
            assert torch.equal(ours.positions(branch, number), expected)


def test_one_press_serves_one_text_after_another(ours, model, witness, network):
    press = ours(0.5, scorer=network("value", "position"))
    texts = (IDS[:, :N], IDS[:, 100:190], IDS[:, :N])
    kept = [ours.positions(read(model, press, witness(), ids), 1) for ids in texts]
    assert kept[1].shape[-1] == 45
    assert torch.equal(kept[0], kept[2])


def test_sinks_and_recent_make_it_the_cut_of_an_eviction_cache(ours, model, network):
    scorer = network("key", "value", age=True)
    cache = read(model, ours(0.4, scorer=scorer, sinks=4, recent=16), DynamicCache())
    reference = EvictionCache(model, scorer, budget=24)
    with torch.no_grad():
        model(IDS[:, :N], past_key_values=reference)
    for number in range(2):
        assert torch.equal(ours.positions(cache, number), reference.positions(number))
        assert torch.equal(cache.layers[number].keys, reference.layers[number].keys)


def test_a_bundle_is_a_press_by_its_folder(ours, model, network, tmp_path):
    scorer = network("key", "value")
    scorer.save_pretrained(tmp_path / "bundle")
    presses = (ours.from_pretrained(tmp_path / "bundle", 0.3), ours(0.3, scorer=scorer))
    caches = [read(model, press, DynamicCache()) for press in presses]
    assert torch.equal(*(ours.positions(cache, 1) for cache in caches))


def test_queries_are_the_last_ones_as_the_model_turned_them(kvpress, ours, model, witness):
    """Those of earlier decoding steps too, which a DecodingPress keeps as hidden states."""
    given, made = [], []

    class Asking:
        needs, pointwise, age_term, heads = frozenset({"queries"}), False, None, None

        def score(self, layer, keys, values, positions, **needs):
            if layer == 0:
                given.append(needs["queries"])
            return positions.float()

    hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda module, args, output: made.append(output)
    )
    press = kvpress.PrefillDecodingPress(
        ours(0.5, scorer=Asking(), queries=10),
        kvpress.DecodingPress(ours(scorer=Asking()), compression_interval=6, target_size=16),
    )
    run(model, witness(), press, N, 12, "position_ids")
    hook.remove()
    # Asked for queries, the press runs the projection once more.
    passes = [x for x in made if x.shape[1] in (1, N)]
    plain = torch.cat(passes, 1).view(1, -1, 4, 8).transpose(1, 2)
    cos, sin = model.model.rotary_emb(plain, torch.arange(plain.shape[2])[None])
    turned = plain * cos[:, None] + torch.cat([-plain[..., 4:], plain[..., :4]], -1) * sin[:, None]
    for got, end in zip(given, (N, N + 6, N + 12), strict=True):
        torch.testing.assert_close(got, turned[:, :, end - got.shape[2] : end])
    assert [got.shape[2] for got in given] == [10, 6, 6]


@pytest.mark.slow
def test_the_shipped_agent_cuts_the_real_model_as_an_eviction_cache_does(ours):
    from kvenv import models

    model, tokenizer = models.load("smollm2-135m")
    text = "".join(f"The code of room {i} is {i * 37 % 101}. " for i in range(60))
    ids = tokenizer(text, return_tensors="pt").input_ids
    budget = int(ids.shape[1] * 0.5)
    cache = DynamicCache()
    reference = EvictionCache(model, load_scorer("kvp-smollm2-135m"), budget=budget)
    press = ours.from_pretrained("kvp-smollm2-135m", 0.5, sinks=4, recent=16)
    read(model, press, cache, ids)
    with torch.no_grad():
        model(ids, past_key_values=reference)
    same = [
        (ours.positions(cache, layer) == reference.positions(layer)).float().mean()
        for layer in range(30)
    ]
    print(f"{ids.shape[1]} tokens: {float(torch.stack(same).mean()):.4f} of the slots are the same")
    assert min(same) == 1


def test_it_refuses_what_it_cannot_use(ours, model, network, tiny_traces, tmp_path):
    for options, message in (
        ({"compression_ratio": 1.0, "scorer": "knorm"}, "compression_ratio is 1.0"),
        ({}, "no scorer given"),
        ({"scorer": "nonsense"}, "unknown agent 'nonsense'"),
        ({"scorer": 3}, "3 is not a scorer"),
        ({"scorer": "knorm", "sinks": -1}, "sinks is -1"),
        ({"scorer": "oracle"}, "needs utility"),
    ):
        with pytest.raises(KvenvError, match=message):
            ours(**options)
    other = network("key")
    model.model.embed_tokens.weight.data.zero_()
    with pytest.raises(KvenvError, match="was trained on"), ours(0.5, scorer=other)(model):
        pass
    with pytest.raises(KvenvError, match="attn_implementation='eager'"):
        read(model, ours(0.5, scorer="observed"), DynamicCache())
    mask = torch.ones(2, N, dtype=torch.long)
    mask[1, :3] = 0
    with pytest.raises(KvenvError, match="padded"), ours(0.5, scorer="knorm")(model):
        model(IDS[:, :N].repeat(2, 1), attention_mask=mask, past_key_values=DynamicCache())
    with pytest.raises(KvenvError, match="only a KvenvPress keeps them"):
        ours.positions(DynamicCache(config=model.config), 0)


def test_heads_without_scores_are_the_fallback_s(ours, model, network, witness):
    scorer = network("key", "value", heads=[(0, 1), (1, 0), (1, 1)])
    with pytest.raises(KvenvError, match=r"layer 0, KV heads \[0\]"):
        read(model, ours(0.5, scorer=scorer), witness())
    presses = (ours(0.5, scorer=scorer, fallback="knorm"), ours(0.5, scorer="knorm"))
    mixed, plain = (ours.positions(read(model, one, witness()), 0) for one in presses)
    assert torch.equal(mixed[:, 0], plain[:, 0])
    assert not torch.equal(mixed[:, 1], plain[:, 1])
