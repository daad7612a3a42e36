"""Sums over optimizer steps, and what the log says about them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

SUMS = ("loss", "targets", "tokens", "positions")


class StepMetrics:
    """What was trained since the last log line.

    Attributes:
        loss: sum over targets, in nats.
        targets, tokens, positions: supervised tokens, real tokens, and places in the batches.
    """

    def __init__(self) -> None:
        self.loss, self.targets, self.tokens, self.positions = 0.0, 0, 0, 0
        self.started = time.monotonic()

    def add(self, loss: float, targets: int, tokens: int, positions: int) -> None:
        """Adds what one optimizer step has trained on all ranks."""
        self.loss += loss
        self.targets += targets
        self.tokens += tokens
        self.positions += positions

    def pause(self, seconds: float) -> None:
        """Leaves a time that was not training (evaluating, saving) out of the speed."""
        self.started += seconds

    @property
    def mean_loss(self) -> float:
        """Nats per target."""
        return self.loss / max(self.targets, 1)

    def to_json(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in SUMS}, "seconds": time.monotonic() - self.started}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> StepMetrics:
        metrics = cls()
        metrics.add(*(saved[name] for name in SUMS))
        metrics.started -= saved["seconds"]
        return metrics

    def values(self) -> dict[str, float]:
        """loss (nats per target), tokens per second, and the share of places that hold real tokens."""
        return {
            "loss": self.mean_loss,
            "tokens_per_second": self.tokens / max(time.monotonic() - self.started, 1e-9),
            "effective_tokens": self.tokens / max(self.positions, 1),
        }
