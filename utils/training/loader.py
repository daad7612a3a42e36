"""The batches of a training or an evaluation, as tensors.

Nothing between the data and the loop may swallow an error: Paddle's own loader lets a run hang for ever when its
reading thread fails, and signals with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle

from utils.data.ahead import ahead
from utils.data.stream import StreamDataset
from utils.parallel.topology import Layout
from utils.training.sampler import EpochSampler, EvaluationSampler, OrderedSampler, WithBlanks

if TYPE_CHECKING:
    from utils.arguments import RunArguments

Collate = Callable[[list[Any]], dict[str, np.ndarray]]


class Loader:
    """Batches of a dataset, in the order of a sampler.

    Attributes:
        sampler: gives the numbers of each batch's examples.

    Args:
        workers: so many batches are made ahead, by a thread; 0 makes each when it is asked for.
    """

    def __init__(self, dataset: Any, sampler: Any, collate: Collate, workers: int = 0) -> None:
        self.dataset, self.sampler = dataset, sampler
        self._collate, self._workers = collate, workers

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[dict[str, paddle.Tensor]]:
        made: Iterable[dict[str, np.ndarray]] = (
            self._collate([self.dataset[number] for number in numbers]) for numbers in self.sampler
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


# --- the batches of a run ----------------------------------------------------------------------------


def training_loader(
    args: RunArguments, layout: Layout, dataset: Any, collate: Collate, done: int = 0
) -> Loader | StreamLoader:
    """This rank's micro-batches; each time it is gone through is the next epoch.

    Args:
        done: optimizer steps before a resume. A stream has been put to its place by the plan.
    """
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    readers, reader = layout.readers, layout.reader(layout.rank)
    if isinstance(dataset, StreamDataset):
        return StreamLoader(dataset, batch, collate, readers=readers, reader=reader)
    sampler: EpochSampler | OrderedSampler
    if getattr(dataset, "ordered", False):
        sampler = OrderedSampler(dataset, batch, ranks=readers, rank=reader)
    else:
        sampler = EpochSampler(dataset, batch, accumulation, seed=args.seed, ranks=readers, rank=reader)
        dataset = WithBlanks(dataset)
    epoch, batches = divmod(done * accumulation, len(sampler))
    sampler.resume_at(epoch, batches)
    return Loader(dataset, sampler, collate, args.dataloader_num_workers)


def evaluation_loader(args: RunArguments, layout: Layout, dataset: Any, collate: Collate) -> Loader:
    """This rank's batches of an evaluation."""
    together = layout.stage == 3  # ranks need each other's weights
    readers, reader = layout.readers, layout.reader(layout.rank)
    sampler = EvaluationSampler(dataset, args.per_device_eval_batch_size, ranks=readers, rank=reader, together=together)
    return Loader(dataset, sampler, collate, args.dataloader_num_workers)
