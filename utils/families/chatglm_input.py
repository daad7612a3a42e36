"""Positions and attention of ChatGLM-6B: where the prompt ends, who sees whom, in numpy.

A row is a prompt, [gMASK] (or [MASK]), <sop> and the answer. Up to <sop> every position sees the whole
prompt; from <sop> on, all that came before. The first of the two positions counts the prompt and stays at the
mask token in the answer; the second is 0 in the prompt and counts the answer from 1
(Du et al. 2022, arXiv:2103.10360, section 2.1 and 2.2; the published tokenizer's padding).
A row without <sop> is read as plain causal text.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.families.chatglm import NO_ANSWER

Ids = NDArray[np.int64]


def prompt_end(ids: Ids, config: Any) -> tuple[int, int]:
    """Places of the first <sop> and of the mask token in one text (int64 [length]).

    Without <sop> they are (NO_ANSWER, 0); without a mask token its place is the one before <sop>.
    """
    begins = np.flatnonzero(ids == config.bos_token_id)
    if not len(begins):
        return NO_ANSWER, 0
    for token in (config.gmask_token_id, config.mask_token_id):
        places = np.flatnonzero(ids == token)
        if len(places):
            return int(begins[0]), int(places[0])
    return int(begins[0]), max(int(begins[0]) - 1, 0)


def prompt_ends(input_ids: Any, position_ids: Any, real: Any, config: Any) -> tuple[Ids, Ids]:
    """As `prompt_end` for left-padded rows: positions of <sop> and of the mask token, each int64 [batch, 1].

    Args:
        input_ids, position_ids, real: tensors [batch, length]; `real` is 0 in padding.
    """
    found = []
    for ids, positions, kept in zip(input_ids.numpy(), position_ids.numpy(), real.numpy().astype(bool), strict=True):
        begin, mask = prompt_end(ids[kept], config)
        first = int(positions[kept][0])
        found.append((begin + first if begin < NO_ANSWER else begin, mask + first))
    array = np.array(found, dtype=np.int64)
    return array[:, :1], array[:, 1:]


def answer_positions(positions: Any, prompt: Any, mask: Any, config: Any) -> Any:
    """The positions that the model takes, int64 [batch, 2, length] ([batch, 1, length] without the second).

    Args:
        positions: [batch, length], counted through prompt and answer.
        prompt, mask: [batch, 1], of `prompt_ends`.
    """
    import paddle

    if not config.position_encoding_2d:
        return positions.unsqueeze(1)
    answering = positions >= prompt
    block = (positions - prompt + 1) * answering.astype("int64")
    return paddle.stack([paddle.where(answering, mask.expand_as(positions), positions), block], axis=1)


def prefix_lm(ids: Ids, config: Any, ends: NDArray[np.int32] | None = None) -> tuple[Ids, NDArray[np.bool_]]:
    """Positions and attention of training rows, each one text, or several with `ends`.

    Args:
        ids: [batch, length], right padded.
        ends: [batch, length], for each place the end (exclusive) of its segment.

    Returns:
        Positions as `answer_positions`, and who sees whom, bool [batch, 1, query, key].
    """
    batch, length = ids.shape
    positions = np.zeros((batch, 2, length), dtype=np.int64)
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
            answering = (count >= prompt) & config.position_encoding_2d
            positions[row, 0, start:end] = np.where(answering, mask, count)
            positions[row, 1, start:end] = np.where(answering, count - prompt + 1, 0)
            start = end
    return (positions if config.position_encoding_2d else positions[:, :1]), seen
