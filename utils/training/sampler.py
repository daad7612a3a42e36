"""The order of training examples: a function of (seed, epoch) alone, so that a resume finds its place."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import numpy as np

from utils.data.encode import IGNORED
from utils.training.batches import batch_sizes

BLANK = "blank"  # key of an item that only keeps a rank busy


class WithBlanks:
    """A dataset in which number -1 - k is example k with nothing of it supervised.

    Such an example stands for an empty micro-batch: every rank takes part in every step.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number >= 0:
            return self.dataset[number]
        item = dict(self.dataset[-1 - number])
        return {**item, "labels": np.full_like(item["labels"], IGNORED), BLANK: True}


class EpochSampler:
    """Shuffled batches of example numbers whose order depends on the seed and the epoch only.

    Each time it is gone through is the next epoch.
    """

    def __init__(
        self, dataset: Sized, batch_size: int, accumulation: int, *, seed: int, ranks: int = 1, rank: int = 0
    ) -> None:
        self.examples, self.seed, self.ranks, self.rank = len(dataset), seed, ranks, rank
        self.sizes = batch_sizes(self.examples, batch_size, accumulation * ranks)
        self.epoch, self.skipped = 0, 0

    def __len__(self) -> int:
        return len(self.sizes) // self.ranks

    def resume_at(self, epoch: int, batches: int) -> None:
        """Begins with `epoch`, without its first `batches` batches: they were trained on before."""
        self.epoch, self.skipped = epoch, batches

    def batches(self, epoch: int) -> list[list[int]]:
        """The example numbers of every batch of this rank, see `WithBlanks`."""
        order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.examples)
        parts = np.split(order, np.cumsum(self.sizes)[:-1])[self.rank :: self.ranks]
        return [part.tolist() or [-1] for part in parts]

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first = self.epoch, self.skipped
        self.epoch, self.skipped = epoch + 1, 0
        yield from self.batches(epoch)[first:]


class OrderedSampler:
    """Batches of a dataset that is in its order already and as long as the run: numbers, one after another.

    A batch of all ranks is consecutive. Nothing is kept in memory.
    """

    def __init__(self, dataset: Sized, batch_size: int, *, ranks: int = 1, rank: int = 0) -> None:
        self.examples, self.batch_size, self.ranks, self.rank = len(dataset), batch_size, ranks, rank
        self.skipped = 0

    def __len__(self) -> int:
        return self.examples // (self.batch_size * self.ranks)

    def resume_at(self, epoch: int, batches: int) -> None:
        """Leaves out the first batches, see `EpochSampler.resume_at`; the run is one epoch."""
        self.skipped = epoch * len(self) + batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.skipped, len(self)):
            first = (batch * self.ranks + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


class EvaluationSampler:
    """Batches in order, of which each rank takes one in turn; every example once.

    Attributes:
        own: number of this rank's batches that count.

    Args:
        together: every rank has as many batches as the first; those behind its own repeat the data's first one.
    """

    def __init__(
        self, dataset: Sized, batch_size: int, *, ranks: int = 1, rank: int = 0, together: bool = False
    ) -> None:
        starts = range(0, len(dataset), batch_size)
        self.examples, self.batch_size, self.starts = len(dataset), batch_size, list(starts[rank::ranks])
        self.own = len(self.starts)
        if together:
            self.starts += [0] * (len(starts[::ranks]) - self.own)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        for first in self.starts:
            yield list(range(first, min(first + self.batch_size, self.examples)))
