"""Positions and attention of ChatGLM-6B: where the prompt ends, who sees whom, in numpy.

A row is a prompt, [gMASK] (or [MASK]), <sop> and the answer. Up to <sop> every position sees the whole
prompt; from <sop> on, all that came before. The first of the two positions counts the prompt and stays at the
mask token in the answer; the second is 0 in the prompt and counts the answer from 1
(Du et al. 2022, arXiv:2103.10360, section 2.1 and 2.2; the published tokenizer's padding).
A row without <sop> is read as plain causal text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.families.text import Text

Ids = NDArray[np.int64]
NO_ANSWER = 1 << 30  # where a text without <sop> has its <sop>


def prompt_end(ids: Ids, config: Mapping[str, Any]) -> tuple[int, int]:
    """Places of the first <sop> and of the mask token in one text (int64 [length]).

    Without <sop> they are (NO_ANSWER, 0); without a mask token its place is the one before <sop>.
    """
    begins = np.flatnonzero(ids == config["bos_token_id"])
    if not len(begins):
        return NO_ANSWER, 0
    for token in (config["gmask_token_id"], config["mask_token_id"]):
        places = np.flatnonzero(ids == token)
        if len(places):
            return int(begins[0]), int(places[0])
    return int(begins[0]), max(int(begins[0]) - 1, 0)


class PromptAndAnswer(Text):
    """A text whose prompt is read in both directions."""

    def __init__(self, prompt: Sequence[int], config: Mapping[str, Any]) -> None:
        super().__init__(prompt)
        self._begin, self._mask = prompt_end(np.asarray(self.ids, dtype=np.int64), config)
        self._two = bool(config["position_encoding_2d"])
        self.context = self._begin if self._begin < NO_ANSWER else 0

    def positions(self, first: int = 0) -> Ids:
        count = np.arange(first, len(self.ids), dtype=np.int64)
        return places_of(count, self._begin, self._mask, self._two)


def places_of(count: Ids, begin: int, mask: int, two: bool) -> Ids:
    """Positions of tokens of one text: [2, tokens], or [1, tokens] without the second position.

    Args:
        count: [tokens], the place of each in its text.
        begin, mask: of `prompt_end`.
    """
    if not two:
        return count[None]
    answering = count >= begin
    return np.stack([np.where(answering, mask, count), np.where(answering, count - begin + 1, 0)])


def prefix_lm(config: Mapping[str, Any], ids: Ids, ends: Ids | None = None) -> tuple[Ids, NDArray[np.bool_]]:
    """Positions (see `places_of`) and attention of training rows; see `utils.model.architecture.PrefixReading`.

    Args:
        ids: [batch, length], right padded.
    """
    batch, length = ids.shape
    two = bool(config["position_encoding_2d"])
    positions = np.zeros((2 if two else 1, batch, length), dtype=np.int64)
    seen = np.zeros((batch, 1, length, length), dtype=bool)
    for row in range(batch):
        start = 0
        while start < length:
            end = length if ends is None else int(ends[row, start])
            count = np.arange(end - start)
            prompt, mask = prompt_end(ids[row, start:end], config)
            sight = count[None, :] <= count[:, None]
            if prompt < NO_ANSWER:
                sight |= count[None, :] < prompt
            seen[row, 0, start:end, start:end] = sight
            positions[:, row, start:end] = places_of(count, prompt, mask, two)
            start = end
    return positions, seen
