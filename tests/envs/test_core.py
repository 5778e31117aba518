from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvenv import rules as u
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


def test_feature_columns_are_key_value_age_and_validity() -> None:
    keys = np.arange(6, dtype=np.float16).reshape(3, 2)
    rows = core.features(keys, -keys, np.array([0, -1, 7]))
    assert rows.dtype == np.float32
    assert rows.shape == (3, core.feature_count(2))
    np.testing.assert_array_equal(rows[2], np.float32([4, 5, -4, -5, 3 / 16, 1]))
    np.testing.assert_array_equal(rows[0], np.float32([0, 1, 0, -1, 0, 1]))
    assert not rows[1].any()  # no token there


def test_budgets_are_tokens_or_fractions() -> None:
    assert core.resolve_budgets(None, 40) is None
    assert core.resolve_budgets([1, 0.25, 1.0, np.int64(7)], 40) == [1, 10, 40, 7]


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([41], "budget 41 is outside 1..40"),
        ([0], "budget 0 holds no token"),
        ([1.5], "budget 1.5 is not in"),
        ([float("nan")], "budget nan is not in"),
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


@given(hnp.arrays(np.float32, (3, 17), elements=FLOATS), st.lists(st.integers(1, 17), min_size=3))
def test_curves_of_different_lengths_are_the_learners_to_the_last_bit(utility, lengths) -> None:
    n = np.array(lengths[:3])
    beyond = np.arange(17) >= n[:, None]
    scores = np.where(beyond, -np.inf, np.random.default_rng(0).normal(size=utility.shape))
    curves = core.rank_curve(np.where(beyond, 0, utility), scores, n)
    for row, m in enumerate(n):
        expected = u.retention(utility[row, :m], scores[row, :m])
        np.testing.assert_array_equal(curves[row, :m], expected)


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 0.5, -0.5, 3e38, -3e38])
        | st.floats(width=32, allow_nan=False),
    )
)
def test_ranking_is_the_learners_ties_zeros_and_infinities_included(scores: np.ndarray) -> None:
    expected = u.ranking(scores)
    for given_as in (scores, scores.astype(np.float64), np.asfortranarray(scores), scores[:, ::-1]):
        order = core.ranking(given_as)
        assert order.dtype == expected.dtype
        np.testing.assert_array_equal(order, u.ranking(given_as))
    np.testing.assert_array_equal(core.ranking(scores), expected)


@given(
    hnp.arrays(np.float64, (3, 9), elements=st.floats(0, 1)),
    st.sampled_from([None, [1], [5, 2, 2], [0.25, 3], [1.0]]),
)
def test_means_over_budgets_are_the_learners_to_the_last_bit(curves, budgets) -> None:
    n = np.array([9, 5, 7])
    columns, count = core.budget_columns(budgets, n, 9)
    means = core.mean_at(curves, columns, count)
    for row, m in enumerate(n.tolist()):
        chosen = core.resolve_budgets(budgets, m)
        assert means[row] == u.mean_over_budgets(curves[row, :m], chosen)


@given(hnp.arrays(np.float32, 17, elements=FLOATS), hnp.arrays(np.float32, 17, elements=FLOATS))
def test_closure_is_the_learners(utility, scores) -> None:
    found = core.normalized_score(
        u.reward(utility, scores), u.oracle_reward(utility), u.random_reward(17)
    )
    assert found == u.normalized_score(utility, scores)


def test_attention_is_its_definition_and_drops_the_first_tokens() -> None:
    queries, keys, _, _ = head(0)
    rng = np.random.default_rng(1)
    queries = rng.normal(size=(2, 16, 8)).astype(np.float16)
    rows = core.attention(queries, keys)
    logits = queries.astype(np.float64) @ keys.astype(np.float64).T / np.sqrt(8)
    weights = np.tril(np.exp(logits))
    np.testing.assert_allclose(rows, weights / weights.sum(-1, keepdims=True), atol=1e-6)
    dropped = core.attention(queries, keys, drop=3)
    assert not dropped[:, 3:, :3].any()
    np.testing.assert_allclose(dropped[:, 3:].sum(-1), 1, atol=1e-6)
    assert not dropped[:, :3].any()
    np.testing.assert_allclose(
        dropped[0, 9] / dropped[0, 9, 9],
        np.r_[0, 0, 0, weights[0, 9, 3:]] / weights[0, 9, 9],
        atol=1e-5,
    )


@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_packed_triangle_gives_its_rows_back(length: int) -> None:
    rows = np.tril(np.random.default_rng(0).random((2, length, length)))
    packed = core.triangle(rows)
    assert packed.shape == (2, core.row_start(length) - 1)
    for t in range(length):
        start = core.row_start(t)
        np.testing.assert_array_equal(packed[:, start : start + t + 1], rows[:, t, : t + 1])
        assert not packed[:, start - 1].any()  # where an empty slot looks


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
