"""The numbers that a `NetworkScorer` gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvenv.scorers import Scorer
from kvenv.testing import check_scorer

WIDE = [
    {"features": ("key", "key_norm", "value_norm"), "age": True},
    {"features": ("key", "value", "mean_key")},
    {"features": ("key", "mean_key"), "age": True},
]


def test_scores_are_those_of_each_heads_network(make, tokens):
    scorer, given = make(), tokens()
    assert isinstance(scorer, Scorer)
    for layer, rows in ((1, (0, 1)), (3, (2, 3))):
        scores = scorer.score(layer, *given)
        assert scores.shape == (2, 2, 9)
        assert scores.dtype == torch.float32
        assert scores.is_contiguous()
        for head, row in enumerate(rows):
            for one in range(2):
                # The other rows get zeros: what they give is not looked at.
                x = torch.zeros(4, 9, 16)
                x[row] = torch.cat([given[0][one, head], given[1][one, head]], -1)
                torch.testing.assert_close(scores[one, head], scorer.network(x)[row])


def test_heads_it_was_not_trained_for_are_nan(make, tokens):
    wide = replace(make.info, kv_heads=4)
    whole, part = make(((1, 0), (1, 1), (1, 3)), model=wide), make(((1, 0), (1, 3)), model=wide)
    part.network.load_state_dict({k: x[[0, 2]] for k, x in whole.network.state_dict().items()})
    assert part.heads == {(1, 0), (1, 3)}
    given = tokens(heads=4)
    scores = part.score(1, *given)
    assert scores.isnan().all(-1).tolist() == [[False, True, True, False]] * 2
    torch.testing.assert_close(scores[:, [0, 3]], whole.score(1, *given)[:, [0, 3]])


def test_heads_may_come_in_any_order(make, tokens):
    straight, mixed = make(), make(((3, 1), (1, 1), (3, 0), (1, 0)))
    order = [straight.network.heads.index(head) for head in mixed.network.heads]
    state = straight.network.state_dict()
    mixed.network.load_state_dict({name: tensor[order] for name, tensor in state.items()})
    for layer in (1, 3):
        assert torch.equal(straight.score(layer, *tokens()), mixed.score(layer, *tokens()))


def test_a_layer_it_was_not_trained_for_is_nan(make, tokens):
    scores = make().score(2, *tokens())
    assert scores.shape == (2, 2, 9)
    assert scores.dtype == torch.float32
    assert scores.isnan().all()


def test_position_features_reach_the_network(make, tokens):
    scorer, (keys, values, positions) = make(features=("key", "position")), tokens()
    near, far = (scorer.score(1, keys, values, positions + shift) for shift in (0, 500))
    assert not torch.equal(near, far)
    assert torch.equal(near, scorer.score(1, keys, values + 1, positions))


def test_how_full_the_cache_is_reaches_the_network(make, tokens):
    scorer, given = make(features=("fill",), budget=4, activation="relu"), tokens()
    scores = scorer.score(1, *given)
    assert (scores[..., 4:] == scores[..., 4:5]).all()  # the cache is full from token 4 on
    assert len(scores[0, 0].unique()) == 5
    twin = make(features=("fill",), budget=4, activation="tanh")
    assert not torch.equal(scores, twin.score(1, *given))


def test_only_the_mean_key_makes_a_score_depend_on_other_tokens(make, tokens):
    some = torch.tensor([5, 0, 3])
    for name in ("key", "value", "position", "key_norm", "value_norm", "mean_key"):
        scorer, given = make(features=(name,)), tokens()
        few = scorer.score(1, *(part[:, :, some] for part in given))
        same = torch.allclose(few, scorer.score(1, *given)[:, :, some], atol=1e-6)
        assert scorer.pointwise == same == (name != "mean_key")


def test_an_age_term_stands_beside_the_score(make, tokens):
    aged, given = make(age=True), tokens()
    x = torch.cat([given[0], given[1]], -1)[0]
    ages = torch.randint(0, 10**6, (1, 2, 9), generator=torch.Generator().manual_seed(3))
    for layer, rows in ((1, [0, 1]), (3, [2, 3])):
        whole = aged.score(layer, *given)[:1] + aged.age_term(layer, ages)
        inputs, when = torch.zeros(4, 9, 16), torch.zeros(4, 9, dtype=torch.int64)
        inputs[rows], when[rows] = x, ages[0]
        torch.testing.assert_close(whole[0], aged.network(inputs, when)[rows])
        fixed = aged.network(inputs)[rows]
        torch.testing.assert_close(aged.score(layer, *given)[0], fixed)


def test_an_age_term_is_zero_where_nothing_was_learned(make):
    scorer, ages = make(((1, 1),), age=True), torch.arange(6).view(1, 1, 6).expand(3, 2, 6)
    within = scorer.age_term(1, ages)
    assert within.shape == (3, 2, 6)
    assert within.dtype == scorer.age_term(2, ages).dtype == torch.float32
    assert within[:, 1].all()
    assert not within[:, 0].any()
    assert not scorer.age_term(2, ages).any()


@pytest.mark.parametrize("architecture", WIDE)
def test_a_wide_scorer_keeps_the_contract(make, architecture: dict):
    check_scorer(make(**architecture))
    check_scorer(make(((3, 1),), **architecture))


@pytest.mark.parametrize("architecture", WIDE)
def test_it_makes_all_its_numbers_where_the_tokens_are(make, tokens, architecture: dict):
    scorer, given = make(**architecture), [part.to("meta") for part in tokens()]
    assert scorer.score(1, *given).device.type == "meta"
    if scorer.age_term is not None:
        assert scorer.age_term(1, given[2]).device.type == "meta"
    assert not scorer.score(1, *tokens()).isnan().any()  # and goes on working elsewhere


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("architecture", WIDE)
def test_a_gpu_gives_the_same_numbers(make, tokens, architecture: dict):
    scorer, given = make(**architecture), tokens(n=300)
    there = [part.cuda() for part in given]
    torch.testing.assert_close(scorer.score(1, *there).cpu(), scorer.score(1, *given))
    if scorer.age_term is not None:
        added = scorer.age_term(1, there[2]).cpu()
        torch.testing.assert_close(added, scorer.age_term(1, given[2]))


@pytest.mark.parametrize(
    "heads", [((1, 0), (1, 0)), ((4, 0),), ((1, 2),), ((-1, 0),)], ids=lambda heads: str(heads)
)
def test_heads_that_the_model_has_not_are_an_error(make, error_of, heads: tuple):
    message = error_of(lambda: make(heads))
    assert "not distinct (layer, KV head) pairs of tiny/llama" in message
    assert "4 layers of 2 KV heads" in message


def test_networks_of_another_architecture_are_an_error(make, error_of):
    aged = make(age=True)
    assert "age=False" in error_of(lambda: replace(aged, architecture=make().architecture))
