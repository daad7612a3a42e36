"""How many rows each micro-batch has and how many steps a run takes; plain arithmetic, no Paddle."""

from __future__ import annotations

import math
from typing import Any


def batch_sizes(examples: int, batch_size: int, accumulation: int) -> list[int]:
    """Sizes of an epoch's micro-batches: every example once, in a whole number of optimizer steps.

    What does not fill a step at the end of the epoch makes a smaller one; if it has too few examples
    for that (one per micro-batch), the step before takes them. Losses are weighted by tokens, so
    micro-batches of different sizes are exact.
    """
    steps, rest = divmod(examples, batch_size * accumulation)
    sizes = [batch_size] * (steps * accumulation)
    if rest >= accumulation or not steps:
        parts = min(accumulation, rest)
        sizes += [rest // parts + (place < rest % parts) for place in range(parts)]
    else:
        for place in range(rest):
            sizes[place - accumulation] += 1
    return sizes


def epoch_steps(examples: int, batch_size: int, accumulation: int) -> int:
    """Optimizer steps of one epoch; an epoch with fewer examples than micro-batches is one step."""
    return max(1, len(batch_sizes(examples, batch_size, accumulation)) // accumulation)


def run_steps(args: Any, examples: int | None) -> int:
    """Optimizer steps of a whole run.

    Args:
        args: max_steps, num_train_epochs, per_device_train_batch_size, gradient_accumulation_steps.
        examples: of an epoch; None for a stream, which has as many steps as max_steps says.
    """
    limit: int = args.max_steps
    if limit > 0 or examples is None:
        return limit
    per_epoch = epoch_steps(examples, args.per_device_train_batch_size, args.gradient_accumulation_steps)
    # a rounding error must not cost a step: 0.7 * 10 is 6.999...
    return max(1, math.floor(per_epoch * args.num_train_epochs + 1e-6))
