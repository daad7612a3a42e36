"""How many rows each micro-batch has and how many steps a run takes; plain arithmetic, no Paddle."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from utils.parallel.topology import Layout

if TYPE_CHECKING:
    from utils.arguments import RunArguments


def batch_sizes(examples: int, batch_size: int, parts: int) -> list[int]:
    """Sizes of an epoch's micro-batches: every example once, in a whole number of optimizer steps.

    What does not fill a step at the end of the epoch makes a smaller one, spread evenly; some of its
    micro-batches may be empty. So the examples of each step depend on the size of the whole batch only,
    not on how it is divided. Losses are weighted by tokens: micro-batches of different sizes are exact.

    Args:
        parts: micro-batches of one step, those of all ranks together.
    """
    steps, rest = divmod(examples, batch_size * parts)
    sizes = [batch_size] * (steps * parts)
    if rest:
        sizes += [rest // parts + (place < rest % parts) for place in range(parts)]
    return sizes


def epoch_steps(examples: int, global_batch: int) -> int:
    """Optimizer steps of one epoch."""
    return -(-examples // global_batch)


def run_steps(args: RunArguments, layout: Layout, examples: int | None) -> int:
    """Optimizer steps of a whole run.

    Args:
        args: max_steps, num_train_epochs, per_device_train_batch_size, gradient_accumulation_steps.
        examples: of an epoch; None for a stream, which has as many steps as max_steps says.
    """
    limit: int = args.max_steps
    if limit > 0 or examples is None:
        return limit
    per_epoch = epoch_steps(examples, layout.global_batch(args))
    # a rounding error must not cost a step: 0.7 * 10 is 6.999...
    return max(1, math.floor(per_epoch * args.num_train_epochs + 1e-6))
