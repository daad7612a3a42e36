"""Which position sees which, as tensors, for attention that takes a dense mask."""

from __future__ import annotations

import paddle
from paddle import Tensor


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


def window_mask(length: int, cached: int, window: int, prefix: int) -> Tensor:
    """Which position sees which.

    Args:
        length: number of queries; they are the last positions.
        cached: number of positions before them, the prefix among them.
        window: number of positions that one sees, itself among them.
        prefix: number of prefix positions at the front, which all see.

    Returns:
        [1, 1, length, cached + length] bool.
    """
    query = paddle.arange(cached, cached + length).unsqueeze(1)
    key = paddle.arange(cached + length).unsqueeze(0)
    seen = (key <= query) & ((query - key < window) | (key < prefix))
    return seen.unsqueeze([0, 1])


def near(positions: Tensor, keys: Tensor, window: int) -> Tensor:
    """Whether keys are within a window before a token, or those of a prefix; what lies behind is not asked.

    Args:
        positions: [batch, length] int64.
        keys: [batch, keys] int64, their positions, negative for a prefix.

    Returns:
        [batch, 1, length, keys] bool.
    """
    keys = keys.unsqueeze(1)
    within = positions.unsqueeze(-1) - keys < window
    return paddle.logical_or(within, keys < 0).unsqueeze(1)
