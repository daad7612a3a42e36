"""Qwen's layers with positions per row (the library's counts padding and keeps state in the layer).

The library takes the length for dynamic NTK from the padded batch, scales queries (logn) by the place in
the padded batch, and keeps the last NTK factor in the layer, where training would meet it again after an
evaluation. Here all three belong to a row's own positions, worked out once per forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paddle
from paddle import Tensor

from utils.families.models.decoder import by_head, extended
from utils.kernels.attention import dense_attention, fused_attention, packed_attention, segments_of
from utils.kernels.masks import Attend, additive
from utils.kernels.norm import rms_norm
from utils.kernels.rotary import apply_rotary_pos_emb


@dataclass(frozen=True)
class Positions:
    """What positions do to queries and keys.

    Attributes:
        cos, sin: [batch, length, 1, rotary_dim] float32, both halves equal.
        scale: logn factors of the queries [batch, length, 1, 1] float32, or None.
    """

    cos: Tensor
    sin: Tensor
    scale: Tensor | None = None


def positions_of(
    config: Any,
    position_ids: Tensor,
    *,
    factors: Tensor | None = None,
    logn: bool = False,
) -> Positions:
    """Rotary angles and query factors of every token.

    Args:
        config: of the model.
        position_ids: [batch, length] int64.
        factors: [batch] float32 of the rotary base (dynamic NTK); None is 1.
        logn: scale the queries behind the training length by log(position + 1) / log(trained).
    """
    head_dim = config.hidden_size // config.num_attention_heads
    dim = head_dim if config.rotary_pct == 1.0 else int(head_dim * config.rotary_pct)
    exponents = paddle.arange(0, dim, 2, dtype="float32") / dim
    base = paddle.full([1, 1, 1], config.rotary_emb_base, dtype="float32")
    if factors is not None:
        base = base * (factors ** (dim / (dim - 2))).reshape([-1, 1, 1])
    places = position_ids.astype("float32").unsqueeze(-1)
    angles = places * (1.0 / base**exponents)
    angles = paddle.concat([angles, angles], axis=-1).unsqueeze(2)
    scale = None
    if logn:
        trained = paddle.full([1], config.seq_length, dtype="float32")
        scale = paddle.clip(paddle.log(places + 1.0) / paddle.log(trained), min=1.0).unsqueeze(2)
    return Positions(angles.cos(), angles.sin(), scale)


def _rotated(x: Tensor, other: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
    """Queries and keys turned in float32, in their own type again; the last dimensions may stay."""
    dim = positions.cos.shape[-1]
    if x.shape[-1] == dim:
        turned = apply_rotary_pos_emb(x.astype("float32"), other.astype("float32"), positions.cos, positions.sin)
        return turned[0].astype(x.dtype), turned[1].astype(x.dtype)
    (x, x_rest), (other, other_rest) = (paddle.split(t, [dim, -1], axis=-1) for t in (x, other))
    x, other = _rotated(x, other, positions)
    return paddle.concat([x, x_rest], axis=-1), paddle.concat([other, other_rest], axis=-1)


def norm_of(layer: Any) -> Callable[[Tensor], Tensor]:
    """A `forward` for one of the library's norm layers."""
    return lambda x: rms_norm(x, layer.weight, layer.eps)


def attention_of(model: Any, visible: Tensor | None, segment_ends: Tensor | None) -> Attend:
    """The attention of all layers.

    Args:
        visible: [batch, 1, length, cached + length] bool; None is causal, within segments where there are ends.
        segment_ends: [batch, 1, length, 1] int32 of packed rows without a cache, or None.
    """
    mask = None if visible is None else additive(visible)
    segments = None if segment_ends is None else segments_of(segment_ends)
    dropout = model.config.attn_dropout_prob if model.training else 0.0

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if segments is not None:
            return packed_attention(query, key, value, segments, dropout=dropout)
        added = None if mask is None else mask(query.dtype)
        attention = fused_attention if model.config.use_flash_attention else dense_attention
        return attention(query, key, value, added, dropout)

    return attend


def layer_forward(
    layer: Any,
    hidden: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    *,
    attend: Attend,
    positions: Positions,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `LayerForward`."""
    attention = layer.attn
    fused = attention.c_attn(layer.ln_1(hidden))
    query, key, value = (by_head(part, head_dim) for part in paddle.split(fused, 3, axis=-1))
    query, key = _rotated(query, key, positions)
    key, value = extended(past_key, key), extended(past_value, value)
    if positions.scale is not None:
        query = query * positions.scale.astype(query.dtype)
    hidden = attention.c_proj(attend(query, key, value)) + hidden
    return hidden + layer.mlp(layer.ln_2(hidden)), key, value
