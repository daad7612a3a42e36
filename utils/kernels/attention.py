"""Causal attention over packed sequences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from utils.kernels import precision


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


def segments_of(segment_ends: Tensor) -> list[list[int]]:
    """The `segment_lengths` of every row of `segment_ends` [batch, 1, length, 1] int32. It waits for the device, so
    it is asked once for all layers."""
    batch, _, length, _ = segment_ends.shape
    return [segment_lengths(row) for row in segment_ends.numpy().reshape(batch, length)]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Sequence[int]],
    slopes: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention in which a position sees only its own segment.

    Each segment is computed alone, so the work is the sum of the squared segment lengths; with a
    dense mask it would be the square of the packed length.

    Args:
        query, key, value: [batch, length, heads, head_dim] of one floating-point type.
        segments: of each row, see `segments_of`.
        slopes: [heads] float32 of linear biases (ALiBi, arXiv:2108.12409), or None.
        dropout: share of the attention weights that are dropped (0 outside training).

    Returns:
        [batch, length, heads * head_dim].
    """
    _, length, heads, head_dim = query.shape
    longest = max(max(lengths) for lengths in segments)
    added = paddle.triu(paddle.full([1, longest, longest], -1e30, dtype="float32"), diagonal=1)
    if slopes is not None:  # by the key's position: the query's adds the same to a whole row, which softmax removes
        added = added + slopes.reshape([heads, 1, 1]) * paddle.arange(longest, dtype="float32")
    scale = 1.0 / math.sqrt(head_dim)
    # [batch] of [heads, length, head_dim]; unbind and split, not slices: the gradient of a slice fills
    # a tensor of the whole size with zeros
    by_row = [paddle.unbind(x.transpose([0, 2, 1, 3])) for x in (query * scale, key, value)]
    outputs = []
    for lengths, *tensors in zip(segments, *by_row, strict=True):
        parts = []
        for qs, ks, vs in zip(*(paddle.split(x, list(lengths), axis=1) for x in tensors), strict=True):
            n = qs.shape[1]
            scores = precision.matmul(qs, ks, transpose_y=True).astype("float32") + added[:, :n, :n]
            weights = F.softmax(scores, axis=-1).astype(vs.dtype)
            parts.append(precision.matmul(F.dropout(weights, dropout) if dropout else weights, vs))
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
    scores = precision.matmul(q, k, transpose_y=True).astype("float32")
    if mask is None:
        mask = paddle.triu(paddle.full([1, 1, length, seen], -1e30, dtype="float32"), diagonal=1 + seen - length)
    if length != 1:  # tiled: adding a mask broadcast over the heads takes ten times as long on CPUs
        # sizes that a static program leaves open are -1, those of the mask too
        mask = paddle.tile(mask, [batch // mask.shape[0], heads // mask.shape[1], 1, 1])
    weights = F.softmax(scores + mask.astype("float32"), axis=-1).astype(v.dtype)
    weights = F.dropout(weights, dropout) if dropout else weights
    return precision.matmul(weights, v).transpose([0, 2, 1, 3]).reshape([0, 0, heads * head_dim])


def every_head(x: Tensor, heads: int, group: int, rank: int = 0) -> Tensor:
    """Keys or values [batch, length, kv_heads, head_dim] once for each of the queries that share them.

    Args:
        heads: number of this process's queries.
        group: number of queries of the whole model that share a key.
        rank: of the process among those that share the queries. Where they are too many to share the keys too,
            each has all keys and takes those of its queries.

    Returns:
        [batch, length, heads, head_dim].
    """
    kv_heads, head_dim = x.shape[2:]
    if kv_heads * group != heads:
        chosen = [(rank * heads + head) // group for head in range(heads)]
        return paddle.index_select(x, paddle.to_tensor(chosen), axis=2)
    if group == 1:
        return x
    return x.unsqueeze(3).tile([1, 1, 1, group, 1]).reshape([0, 0, heads, head_dim])


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """As `dense_attention`, by the fused operator of GPUs."""
    attended = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=mask is None)
    return attended.reshape([0, 0, query.shape[2] * query.shape[3]])


def llama_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    config: Any,
    mask: Callable[[Any], Tensor] | None,
    segment_ends: Tensor | None,
    segments: Sequence[Sequence[int]] | None,
    group: int,
    rank: int,
    dropout: float,
) -> Tensor:
    """Attention of LLaMA's kind: the library's function with flash attention, and where it is as fast as ours.

    Without flash attention the library ignores the ends of segments in silence (packed neighbours would see
    each other) and adds masks slowly. With it, it drops nothing.

    Args:
        query: [batch, length, heads, head_dim].
        key, value: [batch, cached + length, kv_heads, head_dim].
        config: of the library's model.
        mask: [batch, 1, length, cached + length] to be added, in a type; None is causal, or packed with
            `segment_ends` [batch, 1, length, 1] int32 (flash attention) or `segments` (see `segments_of`).
        group, rank: see `every_head`.
        dropout: share of the attention weights that are dropped (0 outside training).

    Returns:
        [batch, length, heads * head_dim].
    """
    heads, flash = query.shape[2], segments is None and config.use_flash_attention and not dropout
    if not flash or key.shape[2] * group != heads:  # flash attention shares keys among queries itself
        key, value = every_head(key, heads, group, rank), every_head(value, heads, group, rank)
    added = None if mask is None else mask(query.dtype)
    if segments is not None:
        return packed_attention(query, key, value, segments, dropout=dropout)
    # on GPUs the library's own is as fast in half precision, but its checks of shapes cannot be traced
    if not flash and (dropout or query.dtype == paddle.float32 or not paddle.in_dynamic_mode()):
        return dense_attention(query, key, value, added, dropout)
    from paddlenlp.transformers.llama.modeling import scaled_dot_product_attention

    return scaled_dot_product_attention(
        query, config, key, value, added, False, attn_mask_startend_row_indices=segment_ends
    )
