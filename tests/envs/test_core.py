from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvenv import utility as u
from kvenv.envs import core
from kvenv.errors import KvenvError

FLOATS = st.floats(0, 1, width=32)


def head(seed: int, n: int = 12, future: int = 4, group: int = 2, d: int = 8) -> tuple:
    rng = np.random.default_rng(seed)
    shapes = (group, future, d), (n + future, d), (n + future, d)
    queries, keys, values = (rng.normal(size=s).astype(np.float16) for s in shapes)
    return queries, keys, values, rng.normal(size=n)


def slow_output_error(queries, keys, values, scores, budget) -> float:
    """The definition, one query at a time in float64."""
    queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
    n = len(scores)
    kept = sorted(range(n), key=lambda i: -scores[i])[:budget]
    errors = []
    for group in queries:
        for t, query in enumerate(group):
            future = list(range(n, n + t + 1))

            def attend(tokens, query=query):
                weights = np.exp(keys[tokens] @ query / np.sqrt(len(query)))
                return (weights[:, None] * values[tokens]).sum(0) / weights.sum()

            full = attend(list(range(n)) + future)
            errors.append(np.linalg.norm(attend(kept + future) - full) / np.linalg.norm(full))
    return float(np.mean(errors))


def test_feature_columns_are_key_value_place_and_validity() -> None:
    keys = np.arange(6, dtype=np.float16).reshape(3, 2)
    rows = core.features(keys, -keys, np.array([0, 1, 7]), 8, 5)
    assert rows.dtype == np.float32
    assert rows.shape == (5, core.feature_count(2))
    expected = [4, 5, -4, -5, 7 / 8, 3 / 16, 1]
    np.testing.assert_array_equal(rows[2], np.float32(expected))
    np.testing.assert_array_equal(rows[0], np.float32([0, 1, 0, -1, 0, 0, 1]))
    assert not rows[3:].any()


def test_features_of_a_batch_are_those_of_its_rows_in_numpy_and_torch() -> None:
    keys, values = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float16)
    places = np.tile(np.arange(5), (3, 1))
    batch = core.features(keys, values, places, 5, 6)
    tensors = (torch.from_numpy(x) for x in (keys, values, places))
    np.testing.assert_array_equal(batch, core.features(*tensors, 5, 6).numpy())
    for i in range(3):
        np.testing.assert_array_equal(batch[i], core.features(keys[i], values[i], places[i], 5, 6))


def test_features_refuse_more_tokens_than_rows() -> None:
    keys = np.zeros((3, 2), np.float16)
    with pytest.raises(KvenvError, match="3 tokens do not fit into max_tokens=2"):
        core.features(keys, keys, np.arange(3), 3, 2)


def test_budgets_are_tokens_or_fractions() -> None:
    assert core.resolve_budgets(None, 40) is None
    assert core.resolve_budgets([1, 0.25, 1.0, np.int64(7)], 40) == [1, 10, 40, 7]


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([41], "budget 41 is outside 1..40"),
        ([0], "budget 0 is outside 1..40"),
        ([1.5], "fraction 1.5 is not in"),
        ([float("nan")], "fraction nan is not in"),
        ([True], "budget True is not a number"),
        (["8"], "budget '8' is not a number"),
        ([], "no budgets given"),
        ("0.25", "budgets '0.25' is not a list"),
        (0.25, "budgets 0.25 is not a list"),
    ],
)
def test_budgets_that_cannot_be_are_named(budgets, message: str) -> None:
    with pytest.raises(KvenvError, match=message):
        core.resolve_budgets(budgets, 40)


@given(hnp.arrays(np.float32, (3, 17), elements=FLOATS), st.integers(0, 5), st.booleans())
def test_outcomes_of_a_batch_are_those_of_its_rows(utility, sinks: int, sink_free: bool) -> None:
    scores = np.random.default_rng(0).normal(size=utility.shape)
    batch = core.rank_outcome(utility, scores, [2, 9], sinks, 2, sink_free)
    for i in range(3):
        row = core.rank_outcome(utility[i], scores[i], [2, 9], sinks, 2, sink_free)
        assert batch.reward[i] == row.reward
        assert batch.closure[i] == row.closure
        assert batch.oracle[i] == row.oracle
        np.testing.assert_array_equal(batch.retention[i], row.retention)


@given(hnp.arrays(np.float32, 17, elements=FLOATS), hnp.arrays(np.float32, 17, elements=FLOATS))
def test_oracle_bounds_every_ranking(utility, scores) -> None:
    outcome = core.rank_outcome(utility, scores)
    assert 0 <= outcome.reward <= outcome.oracle + 1e-12
    assert core.rank_outcome(utility, utility).closure == 1


def test_protected_tokens_rank_first_and_sinks_can_be_left_out() -> None:
    utility = np.array([8, 0, 0, 0, 4, 2, 1, 1], np.float32)
    scores = np.arange(8.0)
    assert core.rank_outcome(utility, scores, [1]).reward == 1 / 16
    assert core.rank_outcome(utility, scores, [1], sinks=1).reward == 8 / 16
    assert core.rank_outcome(utility, -scores, [2], sinks=1, recent=1).reward == 9 / 16
    assert core.rank_outcome(utility, scores, [1], sink_free=True).reward == 1 / 8
    with pytest.raises(KvenvError, match="prompt of 4 tokens has none left"):
        core.rank_outcome(utility[:4], scores[:4], sink_free=True)


@pytest.mark.parametrize("seed", range(3))
def test_output_error_is_its_definition(seed: int) -> None:
    arrays = head(seed)
    found = core.output_error(*arrays, [1, 5, 12])
    expected = [slow_output_error(*arrays, budget) for budget in (1, 5, 12)]
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-15)
    assert found[2] == 0
    assert found[0] > 0.01


def test_output_error_of_a_batch_is_that_of_its_rows_in_numpy_and_torch() -> None:
    heads = [head(seed) for seed in range(4)]
    batch = [np.stack(x).reshape(2, 2, *x[0].shape) for x in zip(*heads, strict=True)]
    found = core.output_error(*batch, [3, 6])
    assert found.shape == (2, 2, 2)
    rows = [core.output_error(*arrays, [3, 6]) for arrays in heads]
    np.testing.assert_array_equal(found.reshape(4, 2), rows)
    tensors = core.output_error(*(torch.from_numpy(x) for x in batch), [3, 6])
    np.testing.assert_array_equal(tensors.numpy(), found)


def test_output_error_refuses_prompt_queries() -> None:
    queries, keys, values, scores = head(0)
    with pytest.raises(KvenvError, match=r"11 scores and 4 future queries .* 16 keys"):
        core.output_error(queries, keys, values, scores[:-1], [1])


def test_keeping_what_is_attended_to_moves_the_output_least() -> None:
    queries, keys, values, _ = head(1, n=64)
    logits = torch.from_numpy(np.float32(queries) @ np.float32(keys).T / 8**0.5)
    later = torch.ones(4, 68, dtype=torch.bool).triu(65)
    mass = logits.masked_fill(later, -torch.inf).softmax(-1).sum((0, 1))[:64].numpy()
    best, worst = (core.output_error(queries, keys, values, s, [32])[0] for s in (mass, -mass))
    assert best < 0.75 * worst
    assert u.reward(mass, mass) > u.reward(mass, -mass)
