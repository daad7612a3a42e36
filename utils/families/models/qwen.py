"""Qwen's attention with positions per row (the library's counts padding and keeps state in the layer).

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

from utils.families.models.decoder import Cache, run_layers
from utils.kernels.attention import dense_attention, packed_attention
from utils.kernels.norm import rms_norm
from utils.kernels.rotary import apply_rotary_pos_emb


@dataclass(frozen=True)
class Positions:
    """What positions do to queries and keys; the library hands it from layer to layer as `position_ids`.

    Attributes:
        cos, sin: [batch, length, 1, rotary_dim] float32, both halves equal.
        scale: logn factors of the queries [batch, length, 1, 1] float32, or None.
        segment_ends: [batch, 1, length, 1] int32 of packed rows without a cache, or None.
    """

    cos: Tensor
    sin: Tensor
    scale: Tensor | None = None
    segment_ends: Tensor | None = None


def positions_of(
    config: Any,
    position_ids: Tensor,
    *,
    factors: Tensor | None = None,
    logn: bool = False,
    segment_ends: Tensor | None = None,
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
    return Positions(angles.cos(), angles.sin(), scale, segment_ends)


def _rotated(x: Tensor, other: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
    """Queries and keys turned in float32, in their own type again; the last dimensions may stay."""
    dim = positions.cos.shape[-1]
    if x.shape[-1] == dim:
        turned = apply_rotary_pos_emb(x.astype("float32"), other.astype("float32"), positions.cos, positions.sin, None)
        return turned[0].astype(x.dtype), turned[1].astype(x.dtype)
    (x, x_rest), (other, other_rest) = (paddle.split(t, [dim, -1], axis=-1) for t in (x, other))
    x, other = _rotated(x, other, positions)
    return paddle.concat([x, x_rest], axis=-1), paddle.concat([other, other_rest], axis=-1)


def norm_of(layer: Any) -> Callable[[Tensor], Tensor]:
    """A `forward` for one of the library's norm layers."""
    return lambda x: rms_norm(x, layer.weight, layer.eps)


def forward_of(layer: Any) -> Callable[..., tuple[Any, ...]]:
    """A `forward` for one of the library's attention layers, with `Positions` as its `position_ids`."""

    def forward(
        hidden_states: Tensor,
        layer_past: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Positions | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
    ) -> tuple[Any, ...]:
        positions = position_ids
        if positions is None:
            raise TypeError("Qwen's attention needs Positions; see utils.families.models.qwen")
        heads = [0, 0, layer.num_heads, layer.head_dim]
        mixed = paddle.split(layer.c_attn(hidden_states), 3, axis=-1)
        query, key, value = (part.reshape(heads) for part in mixed)
        query, key = _rotated(query, key, positions)
        if layer_past is not None:
            key = paddle.concat([layer_past[0], key], axis=1)
            value = paddle.concat([layer_past[1], value], axis=1)
        present = (key, value) if use_cache else None
        if positions.scale is not None:
            query = query * positions.scale.astype(query.dtype)
        weights = None
        if positions.segment_ends is not None:
            output = packed_attention(query, key, value, positions.segment_ends)
        elif layer.config.use_flash_attention or output_attentions:
            output, weights = layer._attn(query, key, value, attention_mask)
        else:
            dropout = layer.attn_dropout.p if layer.training else 0.0
            output = dense_attention(query, key, value, attention_mask, dropout)
        outputs = (layer.c_proj(output), present)
        return (*outputs, weights) if output_attentions else outputs

    return forward


def decode(model: Any, ids: Tensor, positions: Positions, visible: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
    """The library's layers one after another; see `utils.families.base.FamilySpec.decode`.

    The library's own stack makes a mask of sizes that a static program leaves open.
    """
    hidden = model.wte(ids)
    mask = paddle.where(visible, 0.0, paddle.finfo(hidden.dtype).min).astype(hidden.dtype)

    def forward(layer: Any, hidden: Tensor, *past: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        hidden, present = layer(
            hidden,
            layer_past=None if past[0] is None else past,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
        )
        return hidden, *present

    hidden, kept = run_layers(model.h, hidden, cache, forward, recomputed=False)
    return model.ln_f(hidden), kept
