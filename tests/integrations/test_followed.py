"""Positions beside slots that nobody else keeps: followed over cuts, lost when they must be."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvenv import KvenvError
from kvenv.integrations.followed import Slots, Unknown, follow, part_of, remember
from kvenv.scorers import load_scorer

ROWS, HEADS, D = 2, 3, 4


def keys_of(positions: torch.Tensor) -> torch.Tensor:
    """Keys (B, H, n, d) whose first channel tells the token's position."""
    states = torch.randn(*positions.shape, D, generator=torch.Generator().manual_seed(0))
    states[..., 0] = positions.float() + 0.5
    return states


def text(n: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + n).expand(ROWS, HEADS, n)


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), max_size=6),
    st.integers(0, 2**31),
)
def test_positions_stay_true_over_any_cuts(first, steps, seed):
    """Each step adds tokens and then keeps others per head; the keys themselves tell the truth."""
    noise = torch.Generator().manual_seed(seed)
    layer, keys, seen = SimpleNamespace(), keys_of(text(first)), first
    slots = follow(layer, keys, fresh=True, told=None)
    for added, kept in steps:
        keys = torch.cat([keys, keys_of(text(added, seen))], dim=2)
        seen += added
        slots = follow(layer, keys, fresh=False, told=None)
        assert slots.positions is not None
        assert torch.equal(slots.positions.float() + 0.5, keys[..., 0])
        assert slots.seen == seen
        n = keys.shape[2]
        chosen = torch.rand(ROWS, HEADS, n, generator=noise).argsort(-1)[..., : min(kept, n)]
        chosen = chosen.sort(-1).values
        keys = keys.take_along_dim(chosen.unsqueeze(-1), 2)
        remember(layer, Slots.of(keys, slots.positions.gather(-1, chosen), seen))


@pytest.mark.parametrize("change", ["another order", "fewer", "another row order", "more rows"])
def test_positions_are_lost_when_someone_else_moves_slots(change):
    layer, keys = SimpleNamespace(), keys_of(text(6))
    keys[1] += 1  # rows differ
    follow(layer, keys, fresh=True, told=None)
    moved = {
        "another order": keys.flip(2),
        "fewer": keys[:, :, :4],
        "another row order": keys[[1, 0]],
        "more rows": torch.cat([keys, keys]),
    }[change]
    assert follow(layer, moved, fresh=False, told=6).positions is None
    assert follow(layer, moved, fresh=False, told=6).positions is None, "they do not come back"
    assert follow(layer, moved, fresh=True, told=None).positions is not None, "but in a new text"


def test_slots_that_somebody_masked_may_have_other_keys():
    layer, keys = SimpleNamespace(), keys_of(text(6))
    follow(layer, keys, fresh=True, told=None)
    masked = torch.zeros(ROWS, HEADS, 6, dtype=torch.bool)
    masked[0, 1, 2] = True
    keys[0, 1, 2] = 99.0
    assert follow(layer, keys, fresh=False, told=None, masked=masked).positions is not None
    keys[0, 1, 3] = 99.0
    assert follow(layer, keys, fresh=False, told=None, masked=masked).positions is None


def test_a_cache_not_followed_so_far_is_whole_if_it_holds_all_that_was_seen():
    whole = follow(SimpleNamespace(), keys_of(text(5)), fresh=False, told=5)
    assert whole.positions is not None
    assert torch.equal(whole.positions, text(5))
    for told in (None, 4, 6):
        cut = follow(SimpleNamespace(), keys_of(text(5)), fresh=False, told=told)
        assert cut.positions is None


def test_copies_go_their_own_ways():
    layer, keys = SimpleNamespace(), keys_of(text(5))
    follow(layer, keys, fresh=True, told=None)
    other = copy.deepcopy(layer)
    follow(layer, keys.flip(2), fresh=False, told=None)
    assert follow(other, keys, fresh=False, told=None).positions is not None


def test_a_view_tells_which_slots_it_shows():
    keys = keys_of(text(10))
    assert part_of(keys, keys) == 0
    assert part_of(keys, keys[:, :, 3:7]) == 3
    assert part_of(keys, keys[:, :, -1:]) == 9
    assert part_of(keys[:, :, 2:], keys[:, :, 5:7]) == 3
    for other in (keys.clone(), keys[:, :, ::2], keys[:, 1:], keys[..., 1:], keys.mT):
        assert part_of(keys, other) is None
    assert part_of(None, keys) is None
    assert part_of(torch.empty(0), keys) is None


def test_unknown_positions_stop_only_who_looks_at_them():
    keys = torch.randn(1, 2, 9, 4)
    unknown, now = Unknown.like(keys), torch.tensor([8])
    assert unknown.shape == (1, 2, 9)
    for name in ("knorm", "keydiff"):
        scorer = load_scorer(name)
        known = scorer.score(0, keys, keys, torch.arange(9).expand(1, 2, 9), now)
        assert torch.equal(scorer.score(0, keys, keys, unknown, now), known)
    for name in ("streaming", "random", "lagkv"):
        with pytest.raises(KvenvError, match="true positions are needed"):
            load_scorer(name).score(0, keys, keys, unknown, now)
