"""Operators that write over their first argument, which is not to be used again: only what they return is.

Paddle's public ones do so only where operators run at once. In a static program they compute into new memory, and
even another shape is a copy, because the pass that finds what may be overwritten does not look into branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paddle
from paddle import Tensor

_operators: Any = paddle._C_ops  # its description of types lacks some


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y; y has the shape of x, or one that broadcasts to it."""
    return _operators.add_(x, y)


def add_product(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x + y @ z, all of two axes."""
    return _operators.addmm_(x, y, z, 1.0, 1.0)


def multiply(x: Tensor, y: Tensor) -> Tensor:
    """x * y; likewise."""
    return _operators.multiply_(x, y)


def softmax(x: Tensor) -> Tensor:
    """Over the last axis."""
    return _operators.softmax_(x, -1)


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x))."""
    return _operators.silu_(x)


def relu(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return _operators.relu_(x)


def scatter(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """x [n, ...] with x[rows] = values: rows int64 [m], values [m, ...]."""
    return _operators.scatter_(x, rows, values, True)


def merge(x: Tensor, axes: int) -> Tensor:
    """The same values, the first axes made one."""
    return x.reshape([-1, *x.shape[axes:]]) if paddle.in_dynamic_mode() else _operators.flatten_(x, 0, axes - 1)


def reshape(x: Tensor, shape: Sequence[int] | Tensor) -> Tensor:
    """The same values in another shape; in a list 0 keeps a size, -1 is what is left."""
    # operators that run at once share the memory anyhow, and x may be a view with gaps
    return x.reshape(shape) if paddle.in_dynamic_mode() else _operators.reshape_(x, shape)
