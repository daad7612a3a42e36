"""Activations that tensor-parallel ranks share: fleet's operators, with their gradients."""

from __future__ import annotations

from typing import Any

from paddle import Tensor
from paddle.distributed.fleet.layers.mpu import mp_ops


def for_parts(x: Tensor, group: Any) -> Tensor:
    """`x`, which every rank has and of which each uses another part: its gradient is the sum of theirs.

    Args:
        group: of the ranks; None leaves `x` as it is.
    """
    return x if group is None else mp_ops._c_identity(x, group=group)


def summed(x: Tensor, group: Any) -> Tensor:
    """The sum of what each rank has, whose gradient each of them has whole. `x` is lost."""
    return mp_ops._mp_allreduce(x, group=group)


def rows(table: Tensor, ids: Tensor, vocabulary: int, group: Any) -> Tensor:
    """Rows [..., width] of a table of which every rank has its equal part [vocabulary / ranks, width]."""
    first = group.rank * table.shape[0]
    return summed(mp_ops._c_lookup_table(table, ids, start_index=first, vocab_size=vocabulary), group)


def gathered(x: Tensor, group: Any) -> Tensor:
    """[..., n] of each rank -> [..., n * ranks], such as logits of a shared vocabulary."""
    return mp_ops._c_concat(x, group=group)


def cross_entropy(logits: Tensor, targets: Tensor, group: Any) -> Tensor:
    """[n] float32 losses, in nats, of logits whose vocabulary is shared.

    Args:
        logits: [n, vocabulary / ranks] float32.
        targets: [n] int64.
    """
    losses = mp_ops._c_softmax_with_cross_entropy(logits, targets.unsqueeze(-1), group=group)
    return losses.reshape([-1])
