"""Attention of training, and of models that run operator by operator: over packed rows, under masks, fused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from utils.kernels import precision

# query [batch, length, heads, head_dim], key and value [batch, length, heads or kv_heads, head_dim], heads of this
# process -> [batch, length, heads * head_dim]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def flash_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, ends: Tensor | None) -> Tensor:
    """As `dense_attention`, by the fused operators of GPUs, which take half precision only and drop nothing.

    Args:
        key, value: of as many heads as queries, or of fewer that they share equally.
        mask: in the type of the queries; None is causal, within segments where there are ends.
        ends: [batch, 1, length, 1] int32, for each key position the end (exclusive) of its segment, or None.
    """
    if ends is not None and mask is None:
        attended = F.flashmask_attention(query, key, value, startend_row_indices=ends, causal=True)
    else:
        is_causal = mask is None and query.shape[1] != 1
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)
    return attended.reshape([0, 0, query.shape[2] * query.shape[3]])


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention for all layers of one batch: who sees whom, and which way computes it.

    Attributes:
        visible: [batch or 1, 1, length, cached + length] bool; None is causal, within segments where there are ends.
        segment_ends: [batch, 1, length, 1] int32 of packed rows without a cache, or None.
        slopes: [heads] float32 of linear biases (ALiBi, arXiv:2108.12409), or None.
        key_positions: [batch or 1, cached + length] int64, what slopes count. Biases depend on the key's position
            alone: the query's adds the same to a whole row, which softmax removes.
        dropout: share of the attention weights that are dropped (0 outside training).
        flash: whether the fused operators of GPUs compute what is in half precision and drops nothing; without
            slopes and wide scores only.
        wide: scores are computed in float32.
        group, rank: see `every_head`.
    """

    visible: Tensor | None = None
    segment_ends: Tensor | None = None
    slopes: Tensor | None = None
    key_positions: Tensor | None = None
    dropout: float = 0.0
    flash: bool = False
    wide: bool = False
    group: int = 1
    rank: int = 0

    @cached_property
    def segments(self) -> list[list[int]] | None:
        """See `segments_of`; the same for all layers."""
        return None if self.segment_ends is None or self.visible is not None else segments_of(self.segment_ends)

    @cached_property
    def mask(self) -> Tensor | None:
        """What is added to the scores, float32 [batch or 1, heads or 1, length, cached + length]."""
        if self.visible is None:
            return None
        mask = (1.0 - self.visible.astype("float32")) * -1e30
        if self.slopes is not None and self.key_positions is not None:
            places = self.key_positions.astype("float32").unsqueeze([1, 2])
            mask = mask + self.slopes.reshape([1, -1, 1, 1]) * places
        return mask

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """
        Args:
            query: [batch, length, heads, head_dim].
            key, value: [batch, cached + length, kv_heads, head_dim].

        Returns:
            [batch, length, heads * head_dim].
        """
        heads = query.shape[2]
        flash = self.flash and not self.dropout and query.dtype in (paddle.float16, paddle.bfloat16)
        if not flash or key.shape[2] * self.group != heads:  # flash attention shares keys among queries itself
            key, value = (every_head(x, heads, self.group, self.rank) for x in (key, value))
        if flash:
            return flash_attention(query, key, value, self._half_mask(query), self.segment_ends)
        if self.wide:
            query, key = query.astype("float32"), key.astype("float32")
        with precision.in_own_type(self.wide):
            if self.segments is not None:
                return packed_attention(query, key, value, self.segments, self.slopes, self.dropout)
            return dense_attention(query, key, value, self.mask, self.dropout)

    def _half_mask(self, query: Tensor) -> Tensor | None:
        """The mask for the fused operators: as many rows as queries, in their type, without infinite values."""
        if self.mask is None:
            return None
        lowest = paddle.finfo(query.dtype).min
        return self.mask.clip(min=lowest).astype(query.dtype).expand([query.shape[0], -1, -1, -1])
