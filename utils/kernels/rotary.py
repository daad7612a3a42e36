"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves convention of LLaMA."""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F
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


def apply_rotary_pos_emb(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Turns queries and keys by their positions; same signature as the library's function.

    Args:
        query, key: [batch, length, heads, head_dim].
        cos, sin: [1, positions, 1, head_dim], both halves equal.
        position_ids: [batch, length] int64; None is 0, 1, 2, ...
    """
    if position_ids is None:
        cos, sin = cos[:, : query.shape[1]], sin[:, : query.shape[1]]
    else:
        cos, sin = (F.embedding(position_ids, t.squeeze([0, 2])).unsqueeze(2) for t in (cos, sin))
    if paddle.is_grad_enabled() and not (query.stop_gradient and key.stop_gradient):
        return _Rotary.apply(query, cos, sin), _Rotary.apply(key, cos, sin)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)
