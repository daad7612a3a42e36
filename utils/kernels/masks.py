"""Which position sees which, as tensors, for attention that takes a dense mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import paddle
from paddle import Tensor

from utils.kernels.attention import dense_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key, value -> attended; shapes as dense_attention


def causal(length: int, cached: int) -> Tensor:
    """Every position sees the cache, itself and what came before.

    Returns:
        [1, 1, length, cached + length] bool.
    """
    query, key = paddle.arange(length), paddle.arange(cached + length)
    return (key.unsqueeze(0) <= query.unsqueeze(1) + cached).unsqueeze([0, 1])


def packed(segment_ends: Tensor, cached: int) -> Tensor:
    """As `causal`, but among the new positions only those of the same segment see each other.

    Args:
        segment_ends: [batch, 1, length, 1] int32; for each key position the end of its segment.

    Returns:
        [batch, 1, length, cached + length] bool.
    """
    batch, _, length, _ = segment_ends.shape
    query = paddle.arange(length, dtype="int32").reshape([1, 1, length, 1])
    together = query < segment_ends.transpose([0, 1, 3, 2])
    everywhere = paddle.ones([batch, 1, length, cached], dtype="bool")
    return causal(length, cached) & paddle.concat([everywhere, together], axis=-1)


def causal_or_packed(ids: Tensor, segment_ends: Tensor | None, cached: int) -> Tensor:
    """Which of the tokens [batch, length] see which, [batch or 1, 1, length, cached + length] bool."""
    return causal(ids.shape[1], cached) if segment_ends is None else packed(segment_ends, cached)


def additive(visible: Tensor) -> Callable[[Any], Tensor]:
    """The mask in a floating-point type: 0 for what is visible, the least number elsewhere; made once for each."""

    @cache
    def mask(dtype: Any) -> Tensor:
        return paddle.where(visible, 0.0, paddle.finfo(dtype).min).astype(dtype)

    return mask


def attention(visible: Tensor, key_positions: Tensor, slopes: Tensor | None, dropout: float) -> Attend:
    """The attention of a mask, the same for every layer.

    Args:
        visible: [batch or 1, 1, length, cached + length] bool.
        key_positions: [batch or 1, cached + length] int64.
        slopes: [heads] float32 of linear biases (ALiBi, arXiv:2108.12409), or None. Biases depend on the
            key's position alone: the query's adds the same to a whole row, which softmax removes.
    """
    mask = (1.0 - visible.astype("float32")) * -1e30
    if slopes is not None:
        mask = mask + slopes.reshape([1, -1, 1, 1]) * key_positions.astype("float32").unsqueeze([1, 2])
    return partial(dense_attention, mask=mask, dropout=dropout)
