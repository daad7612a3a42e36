"""What the trainer knows of a batch beside the model's inputs: how many real tokens its rows have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from utils.training.sampler import BLANK

SIZES = "sizes"  # int64 [batch]: real tokens of each row of a batch


class SizingCollator:
    """A collator that also says how many real tokens each row has."""

    def __init__(self, collator: Callable[[list[Any]], dict[str, np.ndarray]]) -> None:
        self.collator = collator

    def __call__(self, items: list[Any]) -> dict[str, np.ndarray]:
        sizes = np.array([0 if BLANK in item else len(item["input_ids"]) for item in items], dtype=np.int64)
        return {**self.collator(items), SIZES: sizes}


def rows_of(batch: dict[str, Any]) -> list[list[int]]:
    """The token ids of every row of a batch, or of every segment of its packed rows."""
    found = []
    ends = batch["segment_ends"].numpy() if "segment_ends" in batch else None
    for row, (ids, size) in enumerate(zip(batch["input_ids"].numpy(), batch[SIZES].numpy(), strict=True)):
        start = 0
        while start < size:
            end = int(size) if ends is None else int(ends[row, 0, start, 0])
            found.append([int(i) for i in ids[start:end]])
            start = end
    return found
