"""Best-fit packing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.packing import best_fit, efficiency


def plain_best_fit(lengths: list[int], capacity: int) -> int:
    """How many packs the textbook algorithm needs, written as in the textbook."""
    rooms: list[int] = []
    for size in sorted(lengths, reverse=True):
        fitting = [number for number, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=lambda number: rooms[number])] -= size
        else:
            rooms.append(capacity - size)
    return len(rooms)


@settings(deadline=None)
@given(data=st.data(), capacity=st.integers(1, 300))
def test_every_example_once_and_no_pack_over_the_limit(data: st.DataObject, capacity: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=120))
    packs = best_fit(lengths, capacity)
    assert sorted(number for pack in packs for number in pack) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in pack) <= capacity for pack in packs)
    assert len(packs) == plain_best_fit(lengths, capacity)
    assert best_fit(lengths, capacity) == packs


def test_natural_mix_of_lengths_fills_97_percent() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.0, 0.9, 3000), 8, 2048).astype(int)
    assert efficiency(lengths, best_fit(lengths, 2048), 2048) >= 0.97


@pytest.mark.parametrize("lengths", [[0], [5, 11]])
def test_impossible_lengths_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="lengths must be 1 to 10"):
        best_fit(lengths, 10)


def test_nothing_to_pack() -> None:
    assert best_fit([], 10) == []
    assert efficiency([], [], 10) == 1.0
