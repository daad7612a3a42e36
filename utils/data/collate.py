"""Examples become a batch of numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.data.encode import IGNORED


class Collator:
    """Pads the items of a dataset on the right to the longest of them.

    Called with plain items it gives `input_ids` and `labels`; with packed ones (they have `lengths`)
    also `position_ids` and `segment_ends`. With a causal mask over right padding no attention mask is
    needed: no real token ever sees a padded place.

    Args:
        pad_id: fills `input_ids`; `labels` are filled with -100.
        pad_to_multiple: the length of a batch is rounded up to a multiple of this.
    """

    def __init__(self, pad_id: int, pad_to_multiple: int = 1) -> None:
        self.pad_id = pad_id
        self.pad_to_multiple = pad_to_multiple

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """A batch.

        Args:
            items: each with `input_ids` and `labels`, int [n]; if packed also `lengths`, the tokens of
                its segments, which add up to n.

        Returns:
            input_ids, labels: int64 [batch, length].
            position_ids: int64 [batch, length], from 0 in every segment; 0 in padding.
            segment_ends: int32 [batch, 1, length, 1], for each place the end (exclusive) of its
                segment: queries from there on may not see it. Padding is a segment of its own.
        """
        longest = max(len(item["input_ids"]) for item in items)
        length = -(-longest // self.pad_to_multiple) * self.pad_to_multiple
        shape = (len(items), length)
        input_ids = np.full(shape, self.pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        for row, item in enumerate(items):
            count = len(item["input_ids"])
            input_ids[row, :count] = item["input_ids"]
            labels[row, :count] = item["labels"]
        batch: dict[str, np.ndarray] = {"input_ids": input_ids, "labels": labels}
        if "lengths" in items[0]:
            positions = np.zeros(shape, dtype=np.int64)
            ends = np.full(shape, length, dtype=np.int32)
            for row, item in enumerate(items):
                start = 0
                for size in item["lengths"]:
                    end = start + int(size)
                    positions[row, start:end] = np.arange(size)
                    ends[row, start:end] = end
                    start = end
            batch |= {"position_ids": positions, "segment_ends": ends[:, None, :, None]}
        return batch
