from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvenv import rules as ut
from kvenv.errors import KvenvError


@st.composite
def problems(draw: st.DrawFn, most: int = 24, ties: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Utilities, sparse at times, and scores of H heads, (H, n) each."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, most)))
    mass = st.one_of(st.just(0.0), st.floats(0, 1e6, width=32))
    utility = draw(arrays(np.float32, shape, elements=mass))
    if ties:
        elements = st.one_of(st.integers(-2, 2).map(float), st.floats(-1e6, 1e6, width=32))
        return utility, draw(arrays(np.float32, shape, elements=elements))
    order = draw(st.permutations(range(shape[1])))
    return utility, np.float32([order] * shape[0])


@given(problems())
def test_retention_rises_from_the_first_token_to_one(problem: tuple[np.ndarray, np.ndarray]):
    utility, scores = problem
    curve = ut.retention(utility, scores)
    assert curve.dtype == np.float64
    assert curve.shape == utility.shape
    assert (np.diff(curve, axis=-1) >= 0).all()
    assert (curve >= 0).all()
    np.testing.assert_allclose(curve[:, -1], 1, rtol=1e-12)


@given(problems())
def test_retention_is_the_share_that_the_best_tokens_hold(problem: tuple[np.ndarray, np.ndarray]):
    utility, scores = problem
    n = utility.shape[-1]
    curve = ut.retention(utility, scores)
    for row in range(len(utility)):
        order = sorted(range(n), key=lambda i: -scores[row, i])  # stable: ties keep the earlier
        assert ut.ranking(scores)[row].tolist() == order
        held = [sum(float(utility[row, i]) for i in order[:b]) for b in range(1, n + 1)]
        share = [h / held[-1] if held[-1] else b / n for b, h in enumerate(held, 1)]
        np.testing.assert_allclose(curve[row], share, rtol=1e-9)


@given(problems())
def test_no_ranking_beats_the_oracle(problem: tuple[np.ndarray, np.ndarray]):
    utility, scores = problem
    best = ut.oracle_reward(utility)
    assert (ut.reward(utility, scores) <= best + 1e-12).all()
    np.testing.assert_array_equal(ut.reward(utility, utility), best)
    assert (ut.normalized_score(utility, scores) <= 1 + 1e-9).all()
    np.testing.assert_allclose(ut.normalized_score(utility, utility), 1, rtol=1e-9)


@given(problems())
def test_a_ranking_and_its_reverse_are_chance_on_average(problem: tuple[np.ndarray, np.ndarray]):
    # Each token's two ranks add up to n + 1, so the two rewards add up to twice the random one.
    utility, scores = problem
    order = ut.ranking(scores)
    there, back = (
        ut.mean_over_budgets(ut.retention_of(utility, o)) for o in (order, order[:, ::-1])
    )
    np.testing.assert_allclose((there + back) / 2, ut.random_reward(utility.shape[-1]), rtol=1e-9)


@given(problems(), st.integers(0, 2))
def test_only_the_order_of_scores_counts(problem: tuple[np.ndarray, np.ndarray], which: int):
    utility, scores = problem
    ranks = np.unique(scores, return_inverse=True)[1].reshape(scores.shape)  # ties stay ties
    mapped = (ranks, np.exp(ranks / 4.0) - 9, (ranks + 1.0) ** 3)[which]
    np.testing.assert_array_equal(ut.retention(utility, scores), ut.retention(utility, mapped))


@given(problems(), st.floats(1e-3, 1e3))
def test_the_scale_of_utility_does_not_count(problem: tuple[np.ndarray, np.ndarray], scale: float):
    utility, scores = problem[0].astype(np.float64), problem[1]
    curve, scaled = (ut.retention(a, scores) for a in (utility, utility * scale))
    np.testing.assert_allclose(scaled, curve, rtol=1e-9)


@given(problems(ties=False), st.randoms(use_true_random=False))
def test_the_order_of_tokens_does_not_count(problem: tuple[np.ndarray, np.ndarray], random):
    utility, scores = problem
    shuffled = random.sample(range(utility.shape[-1]), utility.shape[-1])
    moved = ut.reward(utility[:, shuffled], scores[:, shuffled])
    np.testing.assert_allclose(moved, ut.reward(utility, scores), rtol=1e-9)


@given(problems(), st.data())
def test_numpy_and_torch_give_the_same_bits(
    problem: tuple[np.ndarray, np.ndarray], data: st.DataObject
):
    n = problem[0].shape[-1]
    budgets = data.draw(st.none() | st.lists(st.integers(1, n), min_size=1))
    for function in (ut.retention, ut.reward, ut.normalized_score):
        extra = () if function is ut.retention else (budgets,)
        array = function(*problem, *extra)
        tensor = function(*(torch.from_numpy(part) for part in problem), *extra)
        assert isinstance(array, np.ndarray)
        assert isinstance(tensor, torch.Tensor)
        assert array.tobytes() == tensor.numpy().tobytes()


@given(problems(), st.data())
def test_a_batch_and_its_rows_give_the_same_bits(
    problem: tuple[np.ndarray, np.ndarray], data: st.DataObject
):
    utility, scores = problem
    budgets = data.draw(st.none() | st.lists(st.integers(1, utility.shape[-1]), min_size=1))
    for function in (ut.reward, ut.normalized_score):
        batch = function(utility, scores, budgets)
        rows = [function(a, s, budgets) for a, s in zip(utility, scores, strict=True)]
        assert batch.tobytes() == np.stack(rows).tobytes()
    # Another memory layout, and one utility against several scores, change no bit either.
    turned = ut.reward(np.asfortranarray(utility), np.asfortranarray(scores), budgets)
    assert turned.tobytes() == ut.reward(utility, scores, budgets).tobytes()
    spread = ut.normalized_score(utility[0], scores, budgets)
    alone = [ut.normalized_score(utility[0], s, budgets) for s in scores]
    assert spread.tobytes() == np.stack(alone).tobytes()


@pytest.mark.parametrize("kind", ["read-only", "reversed", "strided"])
def test_any_numpy_array_will_do(kind: str):
    utility, scores = np.random.default_rng(0).random((2, 3, 8)).astype(np.float32)
    expected = ut.reward(utility, scores)
    if kind == "read-only":
        given_ = utility.copy()
        given_.flags.writeable = False
    elif kind == "reversed":
        given_ = utility[:, ::-1].copy()[:, ::-1]
    else:
        given_ = np.repeat(utility, 2, axis=1)[:, ::2]
    np.testing.assert_array_equal(ut.reward(given_, scores), expected)


@given(problems())
def test_inputs_are_left_alone(problem: tuple[np.ndarray, np.ndarray]):
    before = [part.copy() for part in problem]
    ut.normalized_score(*problem)
    ut.protect(problem[1], 1, 1)
    for part, copy in zip(problem, before, strict=True):
        np.testing.assert_array_equal(part, copy)


@given(problems(), st.data())
def test_reward_is_the_mean_of_retention_at_the_budgets(
    problem: tuple[np.ndarray, np.ndarray], data: st.DataObject
):
    utility, scores = problem
    budgets = data.draw(st.lists(st.integers(1, utility.shape[-1]), min_size=1))
    at = [ut.retention(utility, scores)[:, b - 1] for b in budgets]
    np.testing.assert_allclose(ut.reward(utility, scores, budgets), np.mean(at, 0), rtol=1e-12)


@given(problems(), st.data())
def test_closure_of_known_rewards_is_closure_to_the_bit(
    problem: tuple[np.ndarray, np.ndarray], data: st.DataObject
):
    n = problem[0].shape[-1]
    budgets = data.draw(st.none() | st.lists(st.integers(1, n), min_size=1))
    known = ut.reward(*problem, budgets), ut.oracle_reward(problem[0], budgets)
    found = ut.normalized_score_of(*known, n, budgets)
    assert isinstance(found, np.ndarray)
    assert found.tobytes() == ut.normalized_score(*problem, budgets).tobytes()


def test_figures_by_hand():
    utility, scores = np.array([1.0, 0.0, 3.0]), np.array([0.5, 0.9, 0.1])  # ranks 1, 0, 2
    np.testing.assert_array_equal(ut.ranking(scores), [1, 0, 2])
    np.testing.assert_array_equal(ut.retention(utility, scores), [0, 0.25, 1])
    assert ut.reward(utility, scores) == pytest.approx(1.25 / 3)
    assert ut.reward(utility, scores, [2]) == 0.25
    assert ut.random_reward(3) == pytest.approx(4 / 6)
    assert ut.random_reward(3, [1]) == pytest.approx(1 / 3)
    assert ut.oracle_reward(utility) == pytest.approx(2.75 / 3)
    assert ut.normalized_score(utility, scores) == pytest.approx((1.25 - 2) / (2.75 - 2))
    assert ut.normalized_score_of(np.array([0.8, 0.5]), np.array([0.9, 0.5]), 4, [2]).tolist() == [
        pytest.approx(0.3 / 0.4),
        1,  # nothing can be won
    ]
    assert ut.normalized_score(utility, scores, [3]) == 1  # at b = n every ranking keeps everything


def test_the_random_reward_is_what_random_rankings_get():
    rng = np.random.default_rng(0)
    utility, scores = rng.exponential(size=7), rng.random((20_000, 7))
    for budgets in (None, [2, 3]):
        mean = ut.reward(utility, scores, budgets).mean()
        assert mean == pytest.approx(ut.random_reward(7, budgets), abs=0.005)


@pytest.mark.parametrize("utility", [np.zeros(5), np.full(5, 2.0), np.ones(1)])
def test_where_every_ranking_is_as_good_closure_is_one(utility: np.ndarray):
    scores = np.random.default_rng(0).random(utility.shape)
    assert ut.normalized_score(utility, scores) == 1
    assert ut.reward(utility, scores) == pytest.approx(ut.random_reward(len(utility)))


@given(problems(), st.integers(0, 30), st.integers(0, 30))
def test_protected_tokens_lead_every_ranking(
    problem: tuple[np.ndarray, np.ndarray], sinks: int, recent: int
):
    scores = problem[1]
    n = scores.shape[-1]
    kept = sorted({*range(min(sinks, n)), *range(max(n - recent, 0), n)})
    guarded = ut.protect(scores, sinks, recent)
    order = ut.ranking(guarded)
    for row in range(len(scores)):
        assert order[row, : len(kept)].tolist() == kept
    others = [i for i in range(n) if i not in kept]
    np.testing.assert_array_equal(guarded[:, others], scores[:, others])
    assert ut.protect(torch.from_numpy(scores), sinks, recent).numpy().tobytes() == (
        guarded.tobytes()
    )


def test_without_sinks_drops_the_first_four_tokens():
    array = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(ut.without_sinks(array), [[4, 5], [10, 11]])
    assert ut.without_sinks(torch.arange(6)).tolist() == [4, 5]
    assert ut.without_sinks(array, 1).shape == (2, 5)


@given(problems(), st.floats(0, 1), st.integers(0, 5))
def test_an_emphasised_utility_blends_plain_and_sink_free_retention(
    problem: tuple[np.ndarray, np.ndarray], share: float, sinks: int
):
    utility, scores = problem
    order = ut.ranking(scores)
    blend = ut.emphasise(utility, share, sinks)
    assert (
        blend.tobytes() == ut.emphasise(torch.from_numpy(utility), share, sinks).numpy().tobytes()
    )
    for row in range(len(utility)):
        whole = utility[row].astype(np.float64)
        rest = np.where(np.arange(len(whole)) < sinks, 0, whole)
        held = [a[order[row]].cumsum() / (a.sum() or 1) for a in (whole, rest)]
        expected = (1 - share) * held[0] + share * held[1]
        np.testing.assert_allclose(blend[row, order[row]].cumsum(), expected, atol=1e-12)


def test_an_emphasised_utility_by_hand():
    utility = np.array([6.0, 0.0, 0.0, 0.0, 3.0, 1.0])
    np.testing.assert_allclose(ut.emphasise(utility, 0.0), utility / 10)
    np.testing.assert_allclose(ut.emphasise(utility, 1.0), [0, 0, 0, 0, 0.75, 0.25])
    np.testing.assert_allclose(ut.emphasise(utility, 0.5), [0.3, 0, 0, 0, 0.525, 0.175])
    assert utility[0] == 6
    assert not ut.emphasise(np.zeros(6), 0.5).any()


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 10_000))
def test_a_fraction_of_the_prompt_is_the_nearest_number_of_tokens(fraction: float, n: int):
    tokens = ut.budget_tokens(fraction, n)
    assert 1 <= tokens <= n
    assert abs(tokens - fraction * n) <= 0.5 or tokens == 1


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, float("nan")])
def test_a_fraction_outside_the_prompt_is_an_error(fraction: float):
    with pytest.raises(KvenvError, match=rf"budget {fraction:g} is not in \(0, 1\]"):
        ut.budget_tokens(fraction, 10)


@pytest.mark.parametrize(
    ("budgets", "message"),
    [([], "no budgets"), ([3, 0], r"budget 0 is outside 1\.\.6"), ([7], "budget 7 is outside")],
)
def test_budgets_outside_the_prompt_are_an_error(budgets: list[int], message: str):
    utility = np.ones(6)
    for function in (ut.reward, ut.normalized_score):
        with pytest.raises(KvenvError, match=message):
            function(utility, utility, budgets)
    with pytest.raises(KvenvError, match=message):
        ut.random_reward(6, budgets)


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 12), st.integers(0, 40), st.integers(0, 6)
)
def test_heads_that_compete_share_one_total(rows: int, heads: int, n: int, total: int, floor: int):
    random = torch.Generator().manual_seed(97 * total + n)
    masses = torch.rand(rows, heads, n, generator=random)
    masses[torch.rand(masses.shape, generator=random) < 0.2] = -torch.inf
    kept = ut.compete(masses, total, floor)
    has = (masses > -torch.inf).sum(-1)
    assert (kept <= has).all()
    least = torch.minimum(has, torch.tensor(floor))
    assert (kept >= least).all()
    most = torch.maximum(least.sum(-1), torch.tensor(total))
    torch.testing.assert_close(kept.sum(-1), torch.minimum(has.sum(-1), most))
    # Nothing that went beyond the floors was worth more than anything that stayed beyond them.
    for row in range(rows):
        ordered = masses[row].sort(-1, descending=True).values
        stayed = [ordered[h, int(least[row, h]) : int(kept[row, h])] for h in range(heads)]
        went = [ordered[h, int(kept[row, h]) : int(has[row, h])] for h in range(heads)]
        if sum(map(len, stayed)) and sum(map(len, went)):
            assert torch.cat(stayed).min() >= torch.cat(went).max()


def test_tokens_that_always_stay_count_in_the_total():
    masses = torch.tensor([[[torch.inf, torch.inf, 0.1, 0.2], [0.9, 0.8, 0.7, 0.6]]])
    assert ut.compete(masses, 4, 1).tolist() == [[2, 2]]
    assert ut.compete(masses, 2, 1).tolist() == [[2, 1]]  # floors and guarded tokens come first


@pytest.mark.parametrize(
    ("budget", "least", "interval"),
    [(2048, 20, 128), (384, 20, 24), (128, 20, 8), (24, 20, 2), (21, 20, 1), (10**6, 0, 128)],
)
def test_the_usual_interval(budget: int, least: int, interval: int):
    assert ut.refresh_interval(budget, None, least) == interval


def test_tokens_that_stay_are_above_all_and_those_that_are_absent_below():
    scores = torch.tensor([float("nan"), torch.inf, -torch.inf, 1.0, 2.0])
    there = torch.tensor([True, True, True, True, False])
    guarded = ut.protected(torch.tensor([0, 1, 2, 3, -1]), torch.tensor(3), 0, 1)
    assert guarded.tolist() == [False, False, False, True, False]
    order = ut.ranking(ut.worth(scores, guarded, there)).tolist()
    assert order[:2] == [3, 1]
    assert order[-1] == 4
    assert set(order[2:4]) == {0, 2}
