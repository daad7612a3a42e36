"""The order of training examples: a function of (seed, epoch) alone, so that a resume finds its place."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import numpy as np
from paddle.io import DistributedBatchSampler

from utils.training.batches import batch_sizes


class EpochSampler(DistributedBatchSampler):
    """Shuffled batches of example numbers whose order depends on the seed and the epoch only.

    The class is Paddle's because the trainer's loop calls `set_epoch` on that type.
    """

    def __init__(
        self, dataset: Sized, batch_size: int, accumulation: int, *, seed: int, ranks: int = 1, rank: int = 0
    ) -> None:
        super().__init__(dataset, batch_size, num_replicas=ranks, rank=rank, shuffle=True)
        self.examples, self.seed = len(dataset), seed
        self.sizes = batch_sizes(-(-self.examples // ranks), batch_size, accumulation)
        self.start_epoch, self.skipped = 0, 0

    def __len__(self) -> int:
        return len(self.sizes)

    def resume_at(self, epoch: int, batches: int) -> None:
        """Leaves out the first `batches` batches of `epoch`: they were trained on before."""
        self.start_epoch, self.skipped = epoch, batches

    def batches(self, epoch: int) -> list[list[int]]:
        """The example numbers of every batch of this rank; ranks are padded to equal length."""
        order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.examples)
        order = np.resize(order, -(-self.examples // self.nranks) * self.nranks)[self.local_rank :: self.nranks]
        return [part.tolist() for part in np.split(order, np.cumsum(self.sizes)[:-1])]

    def __iter__(self) -> Iterator[list[int]]:
        first = self.skipped if self.epoch == self.start_epoch else 0
        yield from self.batches(self.epoch)[first:]


class OrderedSampler(DistributedBatchSampler):
    """Batches of a dataset that is in its order already and as long as the run: numbers, one after another.

    A batch of all ranks is consecutive. Nothing is kept in memory.
    """

    def __init__(self, dataset: Sized, batch_size: int, *, ranks: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, batch_size, num_replicas=ranks, rank=rank, shuffle=False)
        self.examples, self.skipped = len(dataset), 0

    def __len__(self) -> int:
        return self.examples // (self.batch_size * self.nranks)

    def resume_at(self, epoch: int, batches: int) -> None:
        """Leaves out the first batches, see `EpochSampler.resume_at`; the run is one epoch."""
        self.skipped = epoch * len(self) + batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.skipped, len(self)):
            first = (batch * self.nranks + self.local_rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
