"""The loss of a language model."""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor

from utils.kernels import split
from utils.kernels.precision import in_own_type


def summed_loss(logits: Tensor, targets: Tensor, group: Any = None) -> Tensor:
    """Sum of the cross-entropies (float32 scalar, in nats) of logits [n, vocabulary] at targets [n] int64.

    Paddle's operator for CPUs answers NaN and infinite logits with a finite loss, in silence: the loss
    of a broken model would look like that of a guessing one. Here it is NaN.

    Args:
        group: the ranks of which each has its part of the vocabulary, or None.
    """
    with in_own_type():  # a vocabulary of 50,000 logits of -30 has no sum in float16
        logits = logits.astype("float32")
        if group is not None:
            return split.cross_entropy(logits, targets, group).sum()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        with paddle.no_grad():
            broken = paddle.matmul(logits, paddle.ones([logits.shape[-1], 1])).sum() * 0.0
        return loss + broken
