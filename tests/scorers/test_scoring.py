"""The numbers that a `NetworkScorer` gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvenv.errors import KvenvError
from kvenv.rotation import Rotation
from kvenv.testing import check_scorer


@pytest.mark.parametrize("layer", [1, 3])
def test_scores_are_the_networks_of_framed_keys(make, tokens, layer):
    scorer, (keys, values, positions, now) = make(), tokens()
    scores = scorer.score(layer, keys, values, positions, now)
    framed = scorer.model.rotation(layer).frame(keys, now)
    for head in range(2):
        row = scorer.network.heads.index((layer, head))
        for one in range(2):
            x = torch.zeros(4, 9, 16)
            x[row] = torch.cat([framed[one, head], values[one, head]], -1)
            torch.testing.assert_close(scores[one, head], scorer.network(x)[row])


@pytest.mark.parametrize("layer", [1, 3])
def test_scores_do_not_depend_on_where_the_text_begins(make, tokens, layer):
    scorer, (keys, values, positions, now) = make(), tokens()
    moved = scorer.model.rotation(layer).turn(keys, torch.tensor(1000))
    there = scorer.score(layer, moved, values, positions + 1000, now + 1000)
    here = scorer.score(layer, keys, values, positions, now)
    torch.testing.assert_close(there, here, rtol=0, atol=1e-3)
    later = scorer.score(layer, keys, values, positions, now + 1000)
    assert not torch.allclose(later, here, atol=1e-2)


def test_without_rotation_now_changes_nothing(make, tokens):
    plain = replace(make.info, rotations=(Rotation(), Rotation()))
    scorer, (keys, values, positions, now) = make(model=plain), tokens()
    one, other = (scorer.score(1, keys, values, positions, now + s) for s in (0, 99))
    assert torch.equal(one, other)


def test_a_rotation_that_cannot_be_stated_is_refused(make):
    with pytest.raises(KvenvError, match="no formula"):
        make(model=replace(make.info, rotations=("no formula", Rotation())))


def test_it_does_what_every_scorer_must(make):
    check_scorer(make())
    check_scorer(make(((1, 1),)))
