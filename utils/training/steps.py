"""The micro-batches of an optimizer step: their gradients and losses, in one process or through a pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from utils.data.encode import IGNORED
from utils.parallel.peers import Alone
from utils.training.inputs import SIZES
from utils.training.model import TrainingModel


class Steps:
    """Adds up the gradients of micro-batches, each as it comes.

    Attributes:
        scale: losses are divided by it for their gradients; 0 is not known yet.
        counts: int64 [3], targets, tokens and positions of the step on this rank.
        losses: (summed loss, micro-batch) of the step.
    """

    def __init__(
        self, model: TrainingModel, peers: Alone, autocast: Callable[[], AbstractContextManager[Any]], scaler: Any
    ) -> None:
        """
        Args:
            autocast: the context of forward passes.
            scaler: of mixed precision, None without.
        """
        self.model, self.peers, self.autocast, self.scaler = model, peers, autocast, scaler
        self.scale = 0.0
        self.begin()

    def begin(self) -> None:
        """Begins a step."""
        self.counts = np.zeros(3, dtype=np.int64)
        self.losses: list[tuple[Tensor, dict[str, Any]]] = []

    def add(self, batch: dict[str, Any]) -> Tensor:
        """Takes a micro-batch; returns the summed losses that have become known."""
        self.model.train()
        inputs = dict(batch)
        tokens = int(inputs.pop(SIZES).sum())
        targets = int((inputs["labels"] != IGNORED).sum())
        self.counts += (targets, tokens, inputs["input_ids"].size if tokens else 0)
        if not self.scale:
            # Keeps the scaled loss near a mean, for float16; a power of two leaves no trace in the figures.
            mean = self.peers.sums([targets])[0] / self.peers.layout.world
            self.scale = 2.0 ** round(math.log2(max(mean, 1.0)))
        return self._compute(inputs, batch)

    def _compute(self, inputs: dict[str, Any], batch: dict[str, Any]) -> Tensor:
        with self.autocast():
            loss = self.model(**inputs)
        scaled = loss / self.scale
        (self.scaler.scale(scaled) if self.scaler is not None else scaled).backward()
        self.losses.append((loss.detach(), batch))
        return loss.detach()


class PipelineSteps(Steps):
    """Takes all micro-batches of a step through the stages together, once the last has come.

    Args:
        micro_batches: of a step.
    """

    def __init__(self, *arguments: Any, micro_batches: int) -> None:
        super().__init__(*arguments)
        self.micro_batches = micro_batches
        self._schedule: Any = None

    def begin(self) -> None:
        super().begin()
        self._waiting: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def _compute(self, inputs: dict[str, Any], batch: dict[str, Any]) -> Tensor:
        self._waiting.append((inputs, batch))
        if len(self._waiting) < self.micro_batches:
            return paddle.zeros([])
        if self._schedule is None:
            from utils.partition.pipeline import Schedule

            self._schedule = Schedule(self.model, self.model.layers, self.micro_batches, self.peers)
        with self.autocast():
            losses = self._schedule.run([inputs for inputs, _ in self._waiting], self.scale, self.scaler)
        self.losses = [(loss, batch) for loss, (_, batch) in zip(losses, self._waiting, strict=True)]
        return paddle.add_n(losses)


def steps_of(model: TrainingModel, peers: Alone, autocast: Any, scaler: Any, micro_batches: int) -> Steps:
    """What the layout of the run needs."""
    if peers.layout.pipeline == 1:
        return Steps(model, peers, autocast, scaler)
    return PipelineSteps(model, peers, autocast, scaler, micro_batches=micro_batches)
