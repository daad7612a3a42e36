"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864): pairs of halves as in LLaMA, and any other pairs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from numpy.typing import NDArray
from paddle import Tensor
from paddle.autograd import PyLayer


def _turn(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) over the halves of the last axis."""
    half = x.shape[-1] // 2
    return paddle.concat([-x[..., half:], x[..., :half]], axis=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # tiled: a product with a tensor broadcast in the middle is ten times slower on CPUs
    heads = [1, 1, x.shape[2], 1]
    return x * paddle.tile(cos, heads) + _turn(x) * paddle.tile(sin, heads)


class _Rotary(PyLayer):
    """Without autograd's slices, each of which would fill a tensor of zeros on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensor()
        return _rotate(gradient, cos, -sin), None, None


def apply_rotary_pos_emb(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by their positions.

    Args:
        query, key: [batch, length, heads, head_dim]; each may have another number of heads.
        cos, sin: [batch or 1, length, 1, head_dim], both halves equal.
    """
    learning = paddle.in_dynamic_mode() and paddle.is_grad_enabled()
    if learning and not (query.stop_gradient and key.stop_gradient):
        return _Rotary.apply(query, cos, sin), _Rotary.apply(key, cos, sin)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def pairing(order: NDArray[np.int64]) -> NDArray[np.float32]:
    """The matrix [head_dim, head_dim] that gives each dimension of x what its pair contributes when it rotates.

    Of a pair (a, b) of dimensions, x @ it has (-b, a). A product has a cheap gradient; slices of single dimensions
    would fill tensors of zeros.

    Args:
        order: [head_dim]; the dimensions order[i] and order[i + head_dim / 2] are a pair.
    """
    first, second = np.split(order, 2)
    matrix = np.zeros((len(order), len(order)), dtype=np.float32)
    matrix[second, first], matrix[first, second] = -1.0, 1.0
    return matrix


class Rotation:
    """Rotates queries and keys of a batch by their positions. What all layers share is worked out once."""

    def __init__(
        self,
        waves: Callable[[Any], tuple[Tensor, Tensor]],
        matrix: NDArray[np.float32] | None = None,
        query_factor: Tensor | None = None,
    ) -> None:
        """
        Args:
            waves: cos and sin [batch or 1, length, 1, head_dim] in a type.
            matrix: see `pairing`; None pairs the two halves of a head.
            query_factor: [batch, length, 1, 1] float32, what queries are multiplied with besides, or None.
        """
        self._waves = cache(waves)
        self._matrix = None if matrix is None else cache(lambda dtype: paddle.to_tensor(matrix).astype(dtype))
        self._query_factor = query_factor
        self._tiled = cache(self._tiled_waves)

    def __call__(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            query, key: [batch, length, heads, head_dim]; each may have another number of heads.
        """
        if self._matrix is None:
            query, key = apply_rotary_pos_emb(query, key, *self._waves(key.dtype))
        else:
            query, key = self._paired(query), self._paired(key)
        if self._query_factor is not None:
            query = query * self._query_factor.astype(query.dtype)
        return query, key

    def _tiled_waves(self, heads: int, dtype: Any) -> tuple[Tensor, Tensor]:
        # tiled: a product broadcast over the heads is slow on CPUs
        cos, sin = (wave.tile([1, 1, heads, 1]) for wave in self._waves(dtype))
        return cos, sin

    def _paired(self, x: Tensor) -> Tensor:
        cos, sin = self._tiled(x.shape[2], x.dtype)
        return x * cos + paddle.matmul(x, self._matrix(x.dtype)) * sin  # type: ignore[misc]


class RotaryTable:
    """cos and sin of every position so far asked for: one table for all layers of a model. Grows by doubling."""

    def __init__(self, inverse: NDArray[np.float32], magnitude: float = 1.0) -> None:
        """
        Args:
            inverse: [head_dim], radians per position.
            magnitude: factor of cos and sin.
        """
        self._inverse, self._magnitude = inverse, np.float32(magnitude)
        self._length = 0
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}  # by type; each [length, head_dim]

    def at(self, positions: Tensor, count: int, dtype: Any) -> tuple[Tensor, Tensor]:
        """(cos, sin) of positions [batch, length] int64, each [batch, length, 1, head_dim] in a type.

        Args:
            count: the positions are below it, or below 256.
        """
        if count > self._length:
            self._length = max(256, 1 << (count - 1).bit_length())
            self._tables.clear()
        if dtype not in self._tables:
            angles = np.arange(self._length, dtype=np.float32)[:, None] * self._inverse
            cos, sin = (paddle.to_tensor(f(angles) * self._magnitude).astype(dtype) for f in (np.cos, np.sin))
            self._tables[dtype] = cos, sin
        return tuple(F.embedding(positions, table).unsqueeze(2) for table in self._tables[dtype])
