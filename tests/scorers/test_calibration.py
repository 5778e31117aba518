"""From scores to the attention that they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvenv.errors import KvenvError
from kvenv.scorers import Calibration, NetworkScorer
from kvenv.scorers.calibration import fit_calibration

HEADS = ((1, 0), (1, 1))


def fitted(seed: int = 0, n: int = 500) -> Calibration:
    noise = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, n, generator=noise)
    utility = 10 * torch.rand(2, n, generator=noise) * scores.exp()
    return fit_calibration(HEADS, [(scores, utility, 10)])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 50), st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=9))
def test_masses_rise_with_scores_within_their_range(seed, scores):
    own = fitted(seed)
    x = torch.tensor(scores).sort().values.expand(1, 2, -1)
    masses = own.masses_of(1, x)
    assert (masses.diff() >= -1e-6).all()
    assert masses.min() >= own.masses.min() - 1e-6
    assert masses.max() <= own.masses.max() + 1e-6


def test_between_knots_masses_are_interpolated():
    own = Calibration(((1, 0),), torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 5.0]]))
    x = torch.tensor([[[-torch.inf, 0.5, 1.0, torch.inf]]])
    assert own.masses_of(1, x).tolist() == [[[1, 2, 3, 5]]]


def test_a_known_relation_is_recovered_without_the_sinks():
    x = torch.linspace(-2, 2, 4000).expand(2, -1).clone()
    utility = 7 * x.exp()
    utility[:, :4] = 1e6
    asked = torch.linspace(-1.5, 1.5, 9).expand(1, 2, -1)
    masses = fit_calibration(HEADS, [(x, utility, 7)]).masses_of(1, asked)
    torch.testing.assert_close(masses, asked.exp(), rtol=0.02, atol=0)


def test_it_is_saved_and_loaded(tmp_path, make):
    own = fitted()
    own.save(tmp_path / "c.safetensors")
    assert torch.equal(Calibration.load(tmp_path / "c.safetensors").masses, own.masses)
    scorer = make()
    scorer.calibration = own
    scorer.save_pretrained(tmp_path / "bundle")
    there = NetworkScorer.from_pretrained(tmp_path / "bundle").calibration
    assert there is not None
    assert there.heads == own.heads
    assert torch.equal(there.scores, own.scores)


def test_heads_without_a_table_are_named():
    with pytest.raises(KvenvError, match=r"\(1, 2\)"):
        fitted().rows(1, 3)
