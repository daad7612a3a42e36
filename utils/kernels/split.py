"""Activations that tensor-parallel ranks share: fleet's operators, with their gradients."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import paddle.nn.functional as F
from paddle import Tensor
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.layers.mpu.random import get_rng_state_tracker

LOCAL = "local_seed"  # fleet's name of the generator that differs between tensor-parallel ranks


def for_parts(x: Tensor, group: Any) -> Tensor:
    """`x`, which every rank has and of which each uses another part: its gradient is the sum of theirs.

    Args:
        group: of the ranks; None leaves `x` as it is.
    """
    return x if group is None else mp_ops._c_identity(x, group=group)


def gathered(x: Tensor, group: Any) -> Tensor:
    """[..., n] of each rank -> [..., n * ranks], such as logits of a shared vocabulary."""
    return mp_ops._c_concat(x, group=group)


def cross_entropy(logits: Tensor, targets: Tensor, group: Any) -> Tensor:
    """[n] float32 losses, in nats, of logits whose vocabulary is shared.

    Args:
        logits: [n, vocabulary / ranks].
        targets: [n] int64.
    """
    losses = mp_ops._c_softmax_with_cross_entropy(logits.astype("float32"), targets.unsqueeze(-1), group=group)
    return losses.reshape([-1])


def own_dropout(x: Tensor, share: float) -> Tensor:
    """Dropout of what each rank has for its own heads: another mask on every rank, see `groups.seed_everything`."""
    tracker = get_rng_state_tracker()
    with tracker.rng_state(LOCAL) if LOCAL in tracker.states_ else nullcontext():
        return F.dropout(x, share)
