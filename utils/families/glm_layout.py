"""Where the tokens of a GLM text stand and what they see (Du et al. 2022, arXiv:2103.10360, section 2.1).

A text is a context, in which spans are replaced by [MASK], [sMASK] or [gMASK], and behind it the spans,
each begun by <|startofpiece|>. The context is read in both directions; the spans see it and what
stands before them. Every token has two positions: one in the context (of a span: that of its mask), and one
in its span (in the context: 0). No Paddle here: the arrays are small, and the rules are easier to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.errors import UserError
from utils.families.text import Ints, Text


@dataclass(frozen=True)
class Layout:
    """The places of tokens; every array is int64 [batch, length].

    Attributes:
        position: position in the context.
        block: position in the span, from 1; 0 in the context.
        text: number of the text that a token belongs to (packed rows hold several); -1 for padding.
        context_end: the place in the row where the context of the token's text ends.
    """

    position: Ints
    block: Ints
    text: Ints
    context_end: Ints

    def visible(self) -> NDArray[np.bool_]:
        """Which token sees which, [batch, 1, length, length]."""
        key = np.arange(self.text.shape[1])[None, None, :]
        text, query = self.text[:, :, None], key.transpose(0, 2, 1)
        context = key < self.context_end[:, :, None]
        seen = (text == self.text[:, None, :]) & (text >= 0) & ((key <= query) | context)
        return seen[:, None]


def layout(ids: Ints, starts: int, masks: Sequence[int], texts: Sequence[Sequence[tuple[int, int]]]) -> Layout:
    """The places of a batch of tokens.

    Args:
        ids: [batch, length].
        starts: the id of <|startofpiece|>.
        masks: the ids of [MASK], [sMASK] and [gMASK].
        texts: for each row (first, end) of its texts; what no text covers is padding.
    """
    position, block = np.zeros_like(ids), np.zeros_like(ids)
    text, context_end = np.full_like(ids, -1), np.zeros_like(ids)
    for row, parts in enumerate(texts):
        for number, (first, end) in enumerate(parts):
            places = slice(first, end)
            position[row, places], block[row, places], context = _text(ids[row, places], starts, masks)
            text[row, places], context_end[row, places] = number, first + context
    return Layout(position, block, text, context_end)


def texts_read(
    start: int, masks: Sequence[int], limit: int, ids: Ints, ends: Ints | None
) -> tuple[Ints, NDArray[np.bool_]]:
    """Positions in the context and in the span, and who sees whom; see `utils.model.architecture.PrefixReading`.

    Args:
        start, masks: see `layout`.
        limit: the last position that the model has.

    Raises:
        UserError: a text that needs more positions.
    """
    rows, length = ids.shape
    texts = [[(0, length)]] * rows if ends is None else [_borders(row) for row in ends]
    placed = layout(ids, start, masks, texts)
    furthest = int(max(placed.position.max(), placed.block.max()))
    if furthest > limit:
        raise UserError(
            f"a text reaches position {furthest}, but max_sequence_length in config.json is {limit}; lower max_length "
            "or src_length"
        )
    return np.stack([placed.position, placed.block]), placed.visible()


def _borders(ends: Ints) -> list[tuple[int, int]]:
    """(first, end) of the texts of a row; for each of its places `ends` says where its text ends."""
    found, first = [], 0
    while first < len(ends):
        found.append((first, int(ends[first])))
        first = found[-1][1]
    return found


def _text(ids: Ints, start: int, masks: Sequence[int]) -> tuple[Ints, Ints, int]:
    """Positions in the context and in the span of one text, and the length of its context.

    The k-th span fills the k-th mask (the last one, if there are more spans); without a mask it continues
    the context. A text without <|startofpiece|> is read from left to right as it stands.
    """
    position, block = np.arange(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=np.int64)
    begun = np.flatnonzero(ids == start)
    if not len(begun):
        return position, block, 0
    context = int(begun[0])
    masked = np.flatnonzero(np.isin(ids[:context], masks))
    if not len(masked):
        masked = np.array([context])
    span = np.cumsum(ids[context:] == start) - 1
    position[context:] = masked[np.minimum(span, len(masked) - 1)]
    block[context:] = np.arange(context, len(ids)) - begun[span] + 1
    return position, block, context


class SpansText(Text):
    """A GLM text while it is read and written: positions in the context and in the span."""

    def __init__(self, prompt: Sequence[int], start: int, masks: Sequence[int]) -> None:
        super().__init__(prompt)
        self._start, self._masks = start, masks
        self.context = _text(np.asarray(self.ids, dtype=np.int64), start, masks)[2]

    def positions(self, first: int = 0) -> Ints:
        position, block, _ = _text(np.asarray(self.ids, dtype=np.int64), self._start, self._masks)
        return np.stack([position, block])[:, first:]
