"""One text while a model reads it: its tokens, where they stand, and what they see. NumPy only.

Engines ask it where the next tokens stand; families whose rules differ (two positions per token, prompts
that are read in both directions) subclass it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
NOWHERE = 1 << 30  # the order of a place that holds no token


class Text:
    """The tokens of one text so far.

    Attributes:
        ids: the tokens.
        context: number of leading tokens that every token sees, also those before it; 0 is causal.
        stretch: factor of the rotary base (dynamic NTK), fixed by the prompt.
    """

    context = 0
    stretch = 1.0

    def __init__(self, prompt: Sequence[int]) -> None:
        """
        Args:
            prompt: the first tokens; what they decide (`context`, `stretch`) stays.
        """
        self.ids = [int(token) for token in prompt]

    def append(self, tokens: Sequence[int]) -> Ints:
        """Adds tokens; returns their positions, as `positions`."""
        first = len(self.ids)
        self.ids.extend(int(token) for token in tokens)
        return self.positions(first)

    def truncate(self, length: int) -> None:
        """Forgets the tokens behind the first `length`."""
        del self.ids[length:]

    def positions(self, first: int = 0) -> Ints:
        """Positions of the tokens from `first` on, int64 [parts, tokens]; most models have one part."""
        return np.arange(first, len(self.ids), dtype=np.int64)[None]

    def copy(self) -> Text:
        """Another text that begins with what this one holds."""
        other = copy.copy(self)
        other.ids = list(self.ids)
        return other


@dataclass(frozen=True)
class AttentionInputs:
    """Where a batch of tokens stands and what it sees, as tensors for the model.

    Attributes:
        positions: int64 [parts, batch, length].
        keys: int64 [batch, cached + length], the place of every key in its text, negative for the prefix
            of prefix tuning, 0 where no token is. Linear biases (ALiBi) count these.
        visible: bool [batch, 1, length, cached + length], whether a token sees a key.
        stretch: float32 [batch], see `Text`.
    """

    positions: Any
    keys: Any
    visible: Any
    stretch: Any


def attention_inputs(
    positions: Ints, order: Ints, keys: Ints, context: Ints, stretch: NDArray[np.float32], window: int | None
) -> AttentionInputs:
    """The tensors of a batch, from arrays.

    Args:
        positions: [parts, batch, length].
        order: [batch, length], the place of each new token in its own text.
        keys: [batch, cached + length], the same of every key, NOWHERE where no token is.
        context: [batch], see `Text`.
        stretch: [batch].
        window: see `FamilySpec.window`.
    """
    from utils.kernels.arrays import copied

    arrays = (positions, np.where(keys == NOWHERE, 0, keys), visibility(order, keys, context, window), stretch)
    return AttentionInputs(*(copied(array) for array in arrays))


def visibility(order: Ints, keys: Ints, context: Ints, window: int | None) -> NDArray[np.bool_]:
    """Whether a token sees a key: what came before it, its text's context, the prefix; within the window.

    Args:
        order: [batch, length]; what stands there for padding decides nothing but its own row.
        keys: [batch, keys].
        context: [batch], see `Text`.
        window: number of tokens that one sees, itself among them; None has no limit.

    Returns:
        [batch, 1, length, keys].
    """
    query, key = order[:, :, None], keys[:, None, :]
    seen = (key <= query) & (key < NOWHERE)
    if context.any():
        seen |= key < context[:, None, None]
    if window is not None:
        seen &= (query - key < window) | (key < 0)
    return seen[:, None]
