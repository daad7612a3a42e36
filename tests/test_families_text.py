"""Where the tokens of a text stand and what they see, by definition."""

from __future__ import annotations

import numpy as np
import pytest

from utils.families.text import NOWHERE, Text, attention_inputs, visibility

PREFIX = [-2, -1]


def seen(order: list[int], keys: list[int], context: int = 0, window: int | None = None) -> list[str]:
    """For each token of one text which keys it sees."""
    found = visibility(np.array([order]), np.array([keys]), np.array([context]), window)
    assert found.shape == (1, 1, len(order), len(keys)) and found.dtype == bool
    return ["".join(map(str, row.astype(int))) for row in found[0, 0]]


def test_a_token_sees_what_came_before_and_itself() -> None:
    assert seen([0, 1, 2], [0, 1, 2]) == ["100", "110", "111"]
    assert seen([3, 4], [0, 1, 2, 3, 4]) == ["11110", "11111"]
    assert seen([3], [2, 0, 3, 1]) == ["1111"]  # wherever in the cache it is
    assert seen([1], [2, 0, 3, 1]) == ["0101"]


def test_all_see_the_prefix_and_nobody_sees_a_place_without_a_token() -> None:
    dead = NOWHERE
    assert seen([0, 1], [*PREFIX, 0, 1]) == ["1110", "1111"]
    assert seen([1, 2], [*PREFIX, 0, dead, 1, dead, 2]) == ["1110100", "1110101"]
    assert seen([1, 2], [0, dead, 1, 2], context=4) == ["1011", "1011"]
    assert seen([1, 2], [0, dead, 1, 2], window=2) == ["1010", "0011"]


def test_a_context_is_seen_by_all_also_by_what_stands_before_it() -> None:
    assert seen([0, 1, 2, 3], [0, 1, 2, 3], context=2) == ["1100", "1100", "1110", "1111"]
    assert seen([0, 1], [*PREFIX, 0, 1], context=2) == ["1111", "1111"]


def test_a_window_ends_sight_but_not_of_the_prefix() -> None:
    assert seen([0, 1, 2, 3], [0, 1, 2, 3], window=2) == ["1000", "1100", "0110", "0011"]
    assert seen([0, 1, 2, 3], [0, 1, 2, 3], window=4) == seen([0, 1, 2, 3], [0, 1, 2, 3])
    assert seen([9], [*PREFIX, 7, 8, 9], window=2) == ["11011"]


def test_rows_have_contexts_of_their_own() -> None:
    """One row is causal; padding of the other stands at 0."""
    order, keys = np.array([[0, 1, 2], [0, 1, 0]]), np.array([[0, 1, 2], [0, 1, NOWHERE]])
    found = visibility(order, keys, np.array([0, 2]), None).astype(int)
    assert found[0, 0].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert found[1, 0].tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 0]]
    assert found.any(axis=-1).all()


@pytest.mark.parametrize("window", [None, 3])
def test_sight_by_definition_of_any_cache(window: int | None) -> None:
    random = np.random.default_rng(0)
    order = random.integers(0, 9, (4, 5))
    keys = np.where(random.random((4, 12)) < 0.2, NOWHERE, random.integers(-3, 9, (4, 12)))
    context = random.integers(0, 5, 4)
    found = visibility(order, keys, context, window)
    for row, query, key in np.ndindex(4, 5, 12):
        this, other = order[row, query], keys[row, key]
        early = other <= this or other < context[row]
        near = window is None or other < 0 or this - other < window
        assert found[row, 0, query, key] == (other != NOWHERE and early and near)


def test_tensors_of_a_batch() -> None:
    positions, keys = np.array([[[3, 4]], [[0, 1]]]), np.array([[-1, NOWHERE, 3, 4]])
    found = attention_inputs(positions, np.array([[3, 4]]), keys, np.array([0]), np.array([3.0], np.float32), None)
    assert found.positions.numpy().tolist() == positions.tolist()
    assert found.keys.numpy().tolist() == [[-1, 0, 3, 4]]  # 0 where no token is
    assert found.visible.numpy()[0, 0].astype(int).tolist() == [[1, 0, 1, 0], [1, 0, 1, 1]]
    assert found.stretch.numpy().tolist() == [3.0]


def test_a_text_grows_is_cut_back_and_copied() -> None:
    text = Text([*np.array([5, 6, 7])])
    assert text.ids == [5, 6, 7] and all(type(token) is int for token in text.ids)
    assert text.positions().tolist() == [[0, 1, 2]] and text.positions(2).tolist() == [[2]]
    text.stretch = 3.0
    other = text.copy()
    assert text.append([8, 9]).tolist() == [[3, 4]]
    assert other.ids == [5, 6, 7] and other.stretch == 3.0
    text.truncate(4)
    assert text.ids == [5, 6, 7, 8]
    assert text.append([1]).tolist() == [[4]]
    assert (Text([1]).context, Text([1]).stretch) == (0, 1.0)
