"""The micro-batches of an optimizer step: their losses and gradients, in one process or through a pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from utils.data.encode import IGNORED
from utils.parallel.process_group import ProcessGroup
from utils.training.amp import LossScaler
from utils.training.inputs import SIZES
from utils.training.model import TrainingModel

Batch = dict[str, Tensor]
Autocast = Callable[[], AbstractContextManager[Any]]  # opens the mixed precision of forward passes


class Accumulation:
    """Adds up the gradients of micro-batches, each as it comes.

    Attributes:
        micro_batches: of a step.
        scale: losses are divided by it for their gradients; 0 is not known yet.
        counts: int64 [3], targets, tokens and positions of the step on this rank.
        losses: (summed loss, micro-batch) of the step.
    """

    def __init__(
        self, model: TrainingModel, processes: ProcessGroup, autocast: Autocast, scaler: LossScaler, micro_batches: int
    ) -> None:
        self.model, self.processes, self.autocast, self.scaler = model, processes, autocast, scaler
        self.micro_batches = micro_batches
        self.scale = 0.0
        self.begin()

    def begin(self) -> None:
        """Begins a step."""
        self.counts = np.zeros(3, dtype=np.int64)
        self.losses: list[tuple[Tensor, Batch]] = []

    def add(self, batch: Batch) -> None:
        """Takes a micro-batch, with the sizes of its rows."""
        self.model.train()
        inputs = dict(batch)
        tokens = int(inputs.pop(SIZES).sum())
        targets = int((inputs["labels"] != IGNORED).sum())
        self.counts += (targets, tokens, inputs["input_ids"].size if tokens else 0)
        if not self.scale:
            # Keeps the scaled loss near a mean, for float16; a power of two leaves no trace in the figures.
            mean = self.processes.sums([targets])[0] / self.processes.layout.world
            self.scale = 2.0 ** round(math.log2(max(mean, 1.0)))
        self._compute(inputs, batch)

    def _compute(self, inputs: Batch, batch: Batch) -> None:
        with self.autocast():
            loss = self.model(**inputs)
        (loss / (self.scale / self.scaler.scale)).backward()
        self.losses.append((loss.detach(), batch))

    @property
    def loss(self) -> float:
        """The sum of the losses of the step."""
        return float(paddle.add_n([loss for loss, _ in self.losses]))


class PipelineAccumulation(Accumulation):
    """Takes all micro-batches of a step through the stages together, once the last has come."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        from utils.partition.pipeline import Schedule

        self._schedule = Schedule(self.model, self.model.layers, self.micro_batches, self.processes)

    def begin(self) -> None:
        super().begin()
        self._waiting: list[tuple[Batch, Batch]] = []

    def _compute(self, inputs: Batch, batch: Batch) -> None:
        self._waiting.append((inputs, batch))
        if len(self._waiting) < self.micro_batches:
            return
        with self.autocast():
            losses = self._schedule.run([inputs for inputs, _ in self._waiting], self.scale / self.scaler.scale)
        self.losses = [(loss, batch) for loss, (_, batch) in zip(losses, self._waiting, strict=True)]
