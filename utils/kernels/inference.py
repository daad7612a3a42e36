"""The operators of the generic decoder: one face, plain Paddle behind it.

Sizes that a program must leave open (batch, length, cached positions) are never read here as numbers, so
that the same code traces into a static program. On CPUs a broadcast over a middle axis costs tens of times
the operator itself, so what every layer needs is spread once, by `spread`, and then used as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import paddle
import paddle.nn.functional as F
from paddle import Tensor

from utils.errors import UserError

HIDDEN = -1e30  # added to the score of a key that is not seen

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate=True),
    "gelu_fast": partial(F.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(F.gelu, approximate=True),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of a published name.

    Raises:
        UserError: no such activation.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"config.json: activation {name!r} is not known; known are {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


@dataclass(frozen=True)
class Linear:
    """A matrix [in, out] and perhaps a bias [out]."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        y = paddle.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class RMSNorm:
    """x / sqrt(mean(x²) + epsilon) * weight (Zhang & Sennrich 2019, arXiv:1910.07467), means in float32.

    Attributes:
        weight: [width].
        mean: [width, 1] float32, 1 / width everywhere: a product with it is the fastest mean on CPUs.
    """

    weight: Tensor
    mean: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.astype("float32")
        scale = paddle.rsqrt(paddle.matmul(wide * wide, self.mean) + self.epsilon)
        return (wide * scale).astype(x.dtype) * self.weight


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last axis; both [width]."""

    weight: Tensor
    bias: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


Norm = RMSNorm | LayerNorm


@dataclass(frozen=True)
class Mask:
    """What is added to attention scores, spread over heads: every layer's is the same.

    Attributes:
        scores: [batch, kv_heads, group * length, cached + length] float32.
    """

    scores: Tensor


def mask_of(visible: Tensor, keys: Tensor, slopes: Tensor | None, kv_heads: int, group: int) -> Mask:
    """The mask of a batch.

    Args:
        visible: [batch, 1, length, cached + length] bool.
        keys: [batch, cached + length] int64, the key's place in its text.
        slopes: [heads] float32 of linear biases (ALiBi); they count the key's place alone, since the
            query's adds the same to a whole row, which softmax removes.
    """
    scores = paddle.where(visible, paddle.zeros([1]), paddle.full([1], HIDDEN))
    scores = paddle.tile(scores, [1, kv_heads * group, 1, 1])
    if slopes is not None:
        scores = scores + slopes.reshape([1, -1, 1, 1]) * keys.astype("float32").unsqueeze([1, 2])
    if group > 1:  # [batch, heads, length, keys] -> queries of one key head behind each other
        scores = paddle.reshape(scores, [scores.shape[0], kv_heads, -1, scores.shape[3]])
    return Mask(scores)


def attend(query: Tensor, key: Tensor, value: Tensor, past: tuple[Tensor, Tensor] | None, mask: Mask) -> Tensor:
    """Attention over the cache and the new tokens in one softmax; nothing is joined, so no cache is copied.

    Args:
        query: [batch, kv_heads, group * length, head_dim], already scaled.
        key, value: [batch, kv_heads, length, head_dim] of the new tokens.
        past: keys and values of the cache, each [batch, kv_heads, cached, head_dim].

    Returns:
        As `query`.
    """
    scores = paddle.matmul(query, key, transpose_y=True)
    if past is not None:
        scores = paddle.concat([paddle.matmul(query, past[0], transpose_y=True), scores], axis=-1)
    weights = F.softmax(scores.astype("float32") + mask.scores, axis=-1).astype(value.dtype)
    if past is None:
        return paddle.matmul(weights, value)
    cached, new = paddle.split(weights, [past[0].shape[2], -1], axis=-1)
    return paddle.matmul(cached, past[1]) + paddle.matmul(new, value)


@dataclass(frozen=True)
class Turns:
    """Rotary angles of new tokens, spread over heads.

    Attributes:
        cos, sin: [batch, heads, length, head_dim].
        swap: [head_dim, head_dim], x @ swap = (-second half, first half); a product is faster than
            cutting and joining.
    """

    cos: Tensor
    sin: Tensor
    swap: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.cos + paddle.matmul(x, self.swap) * self.sin


def logits(x: Tensor, table: Tensor) -> Tensor:
    """[rows, width] times the table [vocabulary, width] -> [rows, vocabulary]."""
    return paddle.matmul(x, table, transpose_y=True)
