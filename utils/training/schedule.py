"""The course of the learning rate."""

from __future__ import annotations

from collections.abc import Callable


def ending_at(factor: Callable[[int], float], floor: float, warmup: int) -> Callable[[int], float]:
    """A schedule that goes down to `floor` where `factor` goes down to 0; the warm-up stays as it is.

    Args:
        factor: step -> share of the highest rate, 0 to 1.
        floor: the last share, 0 to 1.
        warmup: steps of the warm-up.
    """

    def raised(step: int) -> float:
        share = float(factor(step))
        return share if step < warmup else floor + (1.0 - floor) * share

    return raised
