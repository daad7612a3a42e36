"""Sums since the last log line, and what the log says about them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any


class Window:
    """What was trained since the last log line.

    Attributes:
        loss: sum over targets, in nats.
        targets, tokens, positions: supervised tokens, real tokens, and places in the batches.
        steps: optimizer steps.
    """

    def __init__(self) -> None:
        self.loss, self.targets, self.tokens, self.positions, self.steps = 0.0, 0, 0, 0, 0
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

    def to_json(self) -> dict[str, Any]:
        sums = {name: value for name, value in vars(self).items() if name != "started"}
        return {**sums, "seconds": time.monotonic() - self.started}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Window:
        window = cls()
        for name in ("loss", "targets", "tokens", "positions", "steps"):
            setattr(window, name, saved[name])
        window.started -= saved["seconds"]
        return window

    def values(self) -> dict[str, float]:
        """loss (nats per target), tokens per second, and the share of places that hold real tokens."""
        return {
            "loss": self.loss / max(self.targets, 1),
            "tokens_per_second": self.tokens / max(time.monotonic() - self.started, 1e-9),
            "effective_tokens": self.tokens / max(self.positions, 1),
        }
