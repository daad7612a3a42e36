"""InTokens: several examples share one row of the batch, so that hardly any place is padding.

Best-fit-decreasing bin packing (Johnson 1974, "Fast algorithms for bin packing"): the longest example
first, each into the fullest pack that still has room for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Packs examples; the result depends on `lengths` alone.

    Args:
        lengths: tokens of each example, 1 to `capacity`.
        capacity: tokens of a pack.

    Returns:
        The numbers of the examples in each pack, ascending; packs in order of their first example.

    Raises:
        ValueError: a length outside 1..capacity.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and (sizes.min() < 1 or sizes.max() > capacity):
        raise ValueError(f"lengths must be 1 to {capacity}, found {sizes.min()} to {sizes.max()}")
    packs: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs by the room that they have left
    available = 0  # bit r is set where with_room[r] is not empty: the search is one shift, not a loop
    for number in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[number])
        fitting = available >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            pack = with_room[room].pop()
            if not with_room[room]:
                available ^= 1 << room
            packs[pack].append(number)
        else:
            room, pack = capacity, len(packs)
            packs.append([number])
        left = room - size
        if left:
            with_room[left].append(pack)
            available |= 1 << left
    return sorted((sorted(pack) for pack in packs), key=lambda pack: pack[0])


def efficiency(lengths: Sequence[int] | np.ndarray, packs: Sequence[Sequence[int]], capacity: int) -> float:
    """The share of places that hold tokens, 0 to 1 (1 for no packs)."""
    total = int(np.asarray(lengths, dtype=np.int64).sum())
    return total / (len(packs) * capacity) if packs else 1.0
