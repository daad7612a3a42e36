"""Exchanges among tensor-parallel ranks that predict, which may be traced.

A program holds an exchange under the number of the group, its ring, and runs wherever
`utils.parallel.groups.open_ring` has connected the ranks under that number.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor

from utils.kernels import split


def summed(x: Tensor, group: Any) -> Tensor:
    """The sum of what each rank has, without a gradient. `x` is lost."""
    if paddle.in_dynamic_mode():
        paddle.distributed.all_reduce(x, group=group)
        return x
    # not `all_reduce` of `paddle.distributed`, which a program drops, since nothing reads what it returns
    return paddle._C_ops.all_reduce(_as_sent(x), group.id, int(paddle.distributed.ReduceOp.SUM)).astype(x.dtype)


def gathered(x: Tensor, group: Any) -> Tensor:
    """[rows, n] of each rank -> [rows, n * ranks], without a gradient."""
    if paddle.in_dynamic_mode():
        return split.gathered(x, group)
    ranks, width = group.nranks, x.shape[-1]
    parts = paddle._C_ops.all_gather(_as_sent(x), group.id, ranks).reshape([ranks, -1, width])
    return parts.transpose([1, 0, 2]).reshape([-1, ranks * width]).astype(x.dtype)


def _as_sent(x: Tensor) -> Tensor:
    """In a type that a program can exchange: gloo has no half precision."""
    return x if paddle.is_compiled_with_cuda() else x.astype("float32")
