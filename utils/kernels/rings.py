"""Exchanges among tensor-parallel ranks that predict, which may be traced.

A program holds an exchange under the number of the group, its ring, and runs wherever `open_ring` has connected the
ranks under that number.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor

from utils.kernels import split

_rings: set[int] = set()


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


def open_ring(group: Any, number: int) -> None:
    """Connects the ranks of a group for the exchanges inside of programs; all must come.

    Args:
        number: of the group when the programs were traced.
    """
    from paddle.base import core

    if number in _rings:
        return
    _rings.add(number)
    store, contexts, key = core.create_or_get_global_tcp_store(), core.CommContextManager, str(number)
    if not paddle.is_compiled_with_cuda():
        contexts.create_gloo_comm_context(store, key, group.rank, group.nranks)
        return
    create: Any = getattr(contexts, "create_nccl_comm_context")  # noqa: B009 - builds for CPUs have none
    contexts.set_device_id(paddle.distributed.ParallelEnv().device_id)
    create(store, key, group.rank, group.nranks, f"ring {number}")
