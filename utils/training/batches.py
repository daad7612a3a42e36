"""How many rows each micro-batch has; plain arithmetic, so that a dry run needs no Paddle."""

from __future__ import annotations


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
