"""Attention that reaches back a window only (Beltagy et al. 2020, arXiv:2004.05150)."""

from __future__ import annotations

import paddle
from paddle import Tensor


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
