"""Activations that tensor-parallel ranks share: fleet's operators, with their gradients, and what predicts with them.

`summed` and `gathered` can be traced: a program holds the exchange under the number of the group, and runs wherever
`open_ring` has connected the ranks under that number.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor
from paddle.distributed.fleet.layers.mpu import mp_ops

_rings: set[int] = set()


def for_parts(x: Tensor, group: Any) -> Tensor:
    """`x`, which every rank has and of which each uses another part: its gradient is the sum of theirs.

    Args:
        group: of the ranks; None leaves `x` as it is.
    """
    return x if group is None else mp_ops._c_identity(x, group=group)


def gathered(x: Tensor, group: Any) -> Tensor:
    """[..., n] of each rank -> [..., n * ranks], such as logits of a shared vocabulary.

    A program takes [rows, n] only.
    """
    if paddle.in_dynamic_mode():
        return mp_ops._c_concat(x, group=group)
    sent = _as_sent(x)
    parts = paddle._C_ops.all_gather(sent, group.id, group.nranks).reshape([group.nranks, -1, x.shape[-1]])
    return parts.transpose([1, 0, 2]).reshape([-1, group.nranks * x.shape[-1]]).astype(x.dtype)


def summed(x: Tensor, group: Any) -> Tensor:
    """The sum of what each rank has, without a gradient. `x` is lost."""
    if not paddle.in_dynamic_mode():
        return paddle._C_ops.all_reduce(_as_sent(x), group.id, int(paddle.distributed.ReduceOp.SUM)).astype(x.dtype)
    paddle.distributed.all_reduce(x, group=group)
    return x


def _as_sent(x: Tensor) -> Tensor:
    """In a type that a program can exchange: gloo has no half precision."""
    return x if paddle.is_compiled_with_cuda() else x.astype("float32")


def cross_entropy(logits: Tensor, targets: Tensor, group: Any) -> Tensor:
    """[n] float32 losses, in nats, of logits whose vocabulary is shared.

    Args:
        logits: [n, vocabulary / ranks].
        targets: [n] int64.
    """
    losses = mp_ops._c_softmax_with_cross_entropy(logits.astype("float32"), targets.unsqueeze(-1), group=group)
    return losses.reshape([-1])


def open_ring(group: Any, number: int) -> None:
    """Connects the ranks of a group for the exchanges inside of programs; all must come.

    Args:
        number: of the group when the programs were traced.
    """
    from paddle.base import core

    if number in _rings:
        return
    _rings.add(number)
    store, contexts = core.create_or_get_global_tcp_store(), core.CommContextManager
    if not paddle.is_compiled_with_cuda():
        contexts.create_gloo_comm_context(store, str(number), group.rank, group.nranks)
        return
    contexts.set_device_id(int(paddle.get_device().partition(":")[2] or 0))
    contexts.create_nccl_comm_context(store, str(number), group.rank, group.nranks, f"ring {number}")
