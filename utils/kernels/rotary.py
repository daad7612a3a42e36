"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864): the halves convention of LLaMA, and the
neighbours of ChatGLM2 and GPT-J."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
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
    """Turns queries and keys by their positions.

    Args:
        query, key: [batch, length, heads, head_dim]; each may have another number of heads.
        cos, sin: [batch or 1, length, 1, head_dim], both halves equal.
    """
    learning = paddle.in_dynamic_mode() and paddle.is_grad_enabled()
    if learning and not (query.stop_gradient and key.stop_gradient):
        return _Rotary.apply(query, cos, sin), _Rotary.apply(key, cos, sin)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


class RotaryTable:
    """cos and sin of every position so far asked for: one table for all layers of a model.

    Stands in for the library's rotary layers, which fill one table per layer with all positions that
    the model could ever have (126 MB for 30 layers of 8,192 positions). Grows by doubling.
    """

    def __init__(self, inverse: NDArray[np.float32], magnitude: float = 1.0) -> None:
        """
        Args:
            inverse: [head_dim / 2], radians per position.
            magnitude: factor of cos and sin.
        """
        self._inverse, self._magnitude = inverse, np.float32(magnitude)
        self._length = 0
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}  # by type; each [length, head_dim]

    def at(self, positions: Tensor, count: int, dtype: Any) -> tuple[Tensor, Tensor]:
        """(cos, sin) of positions [batch, length] int64, each [batch, length, 1, head_dim] in a type.

        Args:
            count: the positions are below it, or below 256. A static program, which leaves sizes open, has no
                table and works them out.
        """
        if not paddle.in_dynamic_mode():
            both = paddle.to_tensor(np.concatenate([self._inverse, self._inverse]))
            angles = (positions.astype("float32").unsqueeze(-1) * both).unsqueeze(2)
            return tuple((wave * self._magnitude).astype(dtype) for wave in (angles.cos(), angles.sin()))
        if count > self._length:
            self._length = max(256, 1 << (count - 1).bit_length())
            self._tables.clear()
        if dtype not in self._tables:
            angles = np.arange(self._length, dtype=np.float32)[:, None] * self._inverse
            both = np.concatenate([angles, angles], axis=-1)
            cos, sin = (paddle.to_tensor(f(both) * self._magnitude).astype(dtype) for f in (np.cos, np.sin))
            self._tables[dtype] = cos, sin
        return tuple(F.embedding(positions, table).unsqueeze(2) for table in self._tables[dtype])


def _neighbour_angles(positions: Tensor, turned: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [batch, length, 1, head_dim] float32: pairs of neighbours in the first `turned` dimensions of a
    head turn, the others do not.

    Args:
        positions: [batch, length], of any numeric type.
    """
    exponents = paddle.arange(0, turned, 2, dtype="float32") / turned
    inverse = (1.0 / 10000.0**exponents).repeat_interleave(2)
    inverse = paddle.concat([inverse, paddle.zeros([head_dim - turned])])
    angles = (positions.astype("float32").unsqueeze(-1) * inverse).unsqueeze(2)
    return paddle.cos(angles), paddle.sin(angles)


def _quarter_turn(head_dim: int, dtype: Any) -> Tensor:
    """The matrix [head_dim, head_dim] that turns neighbours: (a, b) @ it = (-b, a).

    A product with it has a cheap gradient; slices of every other value would fill tensors of zeros.
    """
    pair = paddle.to_tensor([[0.0, 1.0], [-1.0, 0.0]])
    return paddle.kron(paddle.eye(head_dim // 2), pair).astype(dtype)


def neighbours_turned(positions: Tensor, turned: int, head_dim: int) -> Callable[[Tensor], Tensor]:
    """A function that turns queries or keys [batch, length, heads, head_dim] by their positions, see above.

    What is the same for all layers is worked out once, when heads and type are known.

    Args:
        positions: [batch or 1, length], of any numeric type.
    """

    @cache
    def waves(heads: int, dtype: Any) -> tuple[Tensor, Tensor]:
        # tiled: a product broadcast over the heads is slow on CPUs
        cos, sin = (
            wave.astype(dtype).tile([1, 1, heads, 1]) for wave in _neighbour_angles(positions, turned, head_dim)
        )
        return cos, sin

    matrix = cache(partial(_quarter_turn, head_dim))

    def turn(x: Tensor) -> Tensor:
        cos, sin = waves(x.shape[2], x.dtype)
        return x * cos + paddle.matmul(x, matrix(x.dtype)) * sin

    return turn
