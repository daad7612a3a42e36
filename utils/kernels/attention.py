"""Causal attention over packed sequences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor


def segment_lengths(ends: np.ndarray) -> list[int]:
    """Lengths of the consecutive segments of one row.

    Args:
        ends: [length] int, for each position the end (exclusive) of its segment.
    """
    lengths, start = [], 0
    while start < len(ends):
        end = int(ends[start])
        lengths.append(end - start)
        start = end
    return lengths


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_ends: Tensor,
    slopes: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention in which a position sees only its own segment.

    Each segment is computed alone, so the work is the sum of the squared segment lengths; with a
    dense mask it would be the square of the packed length.

    Args:
        query, key, value: [batch, length, heads, head_dim] of one floating-point type.
        segment_ends: [batch, 1, length, 1] int32; for each key position the end of its segment.
        slopes: [heads] float32 of linear biases (ALiBi, arXiv:2108.12409), or None.
        dropout: share of the attention weights that are dropped (0 outside training).

    Returns:
        [batch, length, heads * head_dim].
    """
    batch, length, heads, head_dim = query.shape
    rows = segment_ends.reshape([batch, length]).numpy()
    longest = max(int((row - np.arange(length)).max()) for row in rows)
    added = paddle.triu(paddle.full([1, longest, longest], -1e30, dtype="float32"), diagonal=1)
    if slopes is not None:  # by the key's position: the query's adds the same to a whole row, which softmax removes
        added = added + slopes.reshape([heads, 1, 1]) * paddle.arange(longest, dtype="float32")
    scale = 1.0 / math.sqrt(head_dim)
    # [batch] of [heads, length, head_dim]; unbind and split, not slices: the gradient of a slice fills
    # a tensor of the whole size with zeros
    by_row = [paddle.unbind(x.transpose([0, 2, 1, 3])) for x in (query * scale, key, value)]
    outputs = []
    for row, tensors in enumerate(zip(*by_row, strict=True)):
        lengths = segment_lengths(rows[row])
        parts = []
        for qs, ks, vs in zip(*(paddle.split(x, lengths, axis=1) for x in tensors), strict=True):
            n = qs.shape[1]
            scores = paddle.matmul(qs, ks, transpose_y=True).astype("float32") + added[:, :n, :n]
            weights = F.softmax(scores, axis=-1).astype(vs.dtype)
            parts.append(paddle.matmul(F.dropout(weights, dropout) if dropout else weights, vs))
        outputs.append(paddle.concat(parts, axis=1).transpose([1, 0, 2]).reshape([length, heads * head_dim]))
    return paddle.stack(outputs)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Attention with an additive mask, or a causal one.

    Args:
        query: [batch, length, heads, head_dim].
        key, value: [batch, cached + length, heads, head_dim].
        mask: [batch or 1, heads or 1, length, cached + length], added to the scores; None is causal.
        dropout: share of the attention weights that are dropped (0 outside training).

    Returns:
        [batch, length, heads * head_dim].
    """
    batch, length, heads, head_dim = query.shape
    seen = key.shape[1]
    q, k, v = (x.transpose([0, 2, 1, 3]) for x in (query * (1.0 / math.sqrt(head_dim)), key, value))
    scores = paddle.matmul(q, k, transpose_y=True).astype("float32")
    if mask is None:
        mask = paddle.triu(paddle.full([1, 1, length, seen], -1e30, dtype="float32"), diagonal=1 + seen - length)
    if length != 1:  # tiled: adding a mask broadcast over the heads takes ten times as long on CPUs
        # sizes that a static program leaves open are -1, those of the mask too
        mask = paddle.tile(mask, [batch // mask.shape[0], heads // mask.shape[1], 1, 1])
    weights = F.softmax(scores + mask.astype("float32"), axis=-1).astype(v.dtype)
    weights = F.dropout(weights, dropout) if dropout else weights
    return paddle.matmul(weights, v).transpose([0, 2, 1, 3]).reshape([0, 0, heads * head_dim])


def every_head(x: Tensor, group: int) -> Tensor:
    """Keys or values [batch, length, kv_heads, head_dim] once for each of the `group` queries that share them.

    Returns:
        [batch, length, kv_heads * group, head_dim].
    """
    if group == 1:
        return x
    kv_heads, head_dim = x.shape[2:]
    return x.unsqueeze(3).tile([1, 1, 1, group, 1]).reshape([0, 0, kv_heads * group, head_dim])


def llama_attention(
    query: Tensor,
    config: Any,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    output_attentions: bool,
    alibi: Tensor | None = None,
    attn_mask_startend_row_indices: Tensor | None = None,
    **options: Any,
) -> Any:
    """An attention function with the signature of PaddleNLP's LLaMA, for devices without flash attention.

    There the library ignores `attn_mask_startend_row_indices` in silence (packed neighbours would see
    each other) and adds masks slowly.
    """
    plain = not (config.use_flash_attention or output_attentions or options.get("sequence_parallel"))
    if plain and attn_mask_startend_row_indices is not None:
        return packed_attention(query, key, value, attn_mask_startend_row_indices)
    # on GPUs the library's own is as fast in half precision, but its checks of shapes cannot be traced
    ours = query.dtype == paddle.float32 or not paddle.in_dynamic_mode()
    if plain and alibi is None and ours:
        return dense_attention(query, key, value, attention_mask)
    from paddlenlp.transformers.llama.modeling import scaled_dot_product_attention

    return scaled_dot_product_attention(
        query,
        config,
        key,
        value,
        attention_mask,
        output_attentions,
        alibi,
        attn_mask_startend_row_indices=attn_mask_startend_row_indices,
        **options,
    )
