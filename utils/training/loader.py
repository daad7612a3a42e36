"""The batches of a training or an evaluation, as tensors.

Nothing between the data and the loop may swallow an error: Paddle's own loader lets a run hang for ever when its
reading thread fails, and signals with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import paddle

from utils.data.ahead import ahead

Collate = Callable[[list[Any]], dict[str, np.ndarray]]


class Loader:
    """Batches of a dataset, in the order of a sampler.

    Attributes:
        batch_sampler: gives the numbers of each batch's examples.

    Args:
        workers: so many batches are made ahead, by a thread; 0 makes each when it is asked for.
    """

    def __init__(self, dataset: Any, sampler: Any, collate: Collate, workers: int = 0) -> None:
        self.dataset, self.batch_sampler = dataset, sampler
        self._collate, self._workers = collate, workers

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[dict[str, paddle.Tensor]]:
        made: Iterable[dict[str, np.ndarray]] = (
            self._collate([self.dataset[number] for number in numbers]) for numbers in self.batch_sampler
        )
        return map(_tensors, ahead(made, self._workers) if self._workers else made)


class StreamLoader:
    """Batches of a stream that all ranks read alike, of which each takes its part.

    Args:
        batch_size: rows of a batch on one rank.
        readers, reader: in how many parts each batch is taken, and which of them here.
    """

    def __init__(self, stream: Any, batch_size: int, collate: Collate, *, readers: int = 1, reader: int = 0) -> None:
        self.stream, self.readers, self.batch_size = stream, readers, batch_size
        self._own = slice(reader * batch_size, (reader + 1) * batch_size)
        self._collate = collate

    def __iter__(self) -> Iterator[dict[str, paddle.Tensor]]:
        items = iter(self.stream)
        while True:
            batch = list(islice(items, self.batch_size * self.readers))
            yield _tensors(self._collate(batch[self._own]))


def _tensors(batch: dict[str, np.ndarray]) -> dict[str, paddle.Tensor]:
    return {name: paddle.to_tensor(values) for name, values in batch.items()}
