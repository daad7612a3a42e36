"""One layer of the trainable decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from utils.kernels import mlp
from utils.kernels.attention import Attend
from utils.kernels.linear import linear
from utils.kernels.norm import LayerNorm, RMSNorm
from utils.kernels.split import for_parts
from utils.model.architecture import Architecture, Role
from utils.model.inputs import Context


def put(root: nn.Layer, path: str, layer: nn.Layer) -> None:
    """Makes `layer` the part of `root` with a dotted name; what is missing on the way is made too."""
    *parents, last = path.split(".")
    for name in parents:
        if name not in root._sub_layers:
            root.add_sublayer(name, nn.Layer())
        root = root._sub_layers[name]
    root.add_sublayer(last, layer)


def norm(architecture: Architecture) -> nn.Layer:
    """A norm of hidden states."""
    hidden, epsilon = architecture.shape.hidden, architecture.epsilon
    if architecture.norm == "rms":
        return RMSNorm(hidden, epsilon, architecture.norm_offset)
    return LayerNorm(hidden, epsilon)


def by_head(x: Tensor, head_dim: int) -> Tensor:
    """[batch, length, heads * head_dim] -> [batch, length, heads, head_dim]; batch and length may be left open.

    The width decides how many heads there are: a process may hold some of the model's only.
    """
    return x.reshape([0, 0, x.shape[-1] // head_dim, head_dim])


class DecoderLayer(nn.Layer):
    """Attention and MLP. Its parts have their published names; they are looked up when it runs, because LoRA and
    tensor parallelism put others in their places.

    Attributes:
        is_local: whether it is one of `Architecture.local`.
        between: see `utils.kernels.mlp.between`.
        score_factor: what the scores are multiplied with besides 1 / sqrt(head_dim).
    """

    def __init__(self, architecture: Architecture, number: int, sizes: Mapping[str, tuple[int, int]]) -> None:
        """
        Args:
            number: of the layer, from 0.
            sizes: see `Architecture.matrices`.
        """
        super().__init__()
        self.architecture, self.names = architecture, architecture.parts
        self.is_local = architecture.is_local(number)
        scale = architecture.layer(number).score_scale
        self.score_factor = 1.0 if scale is None else scale * math.sqrt(architecture.shape.head_dim)
        self.between = mlp.between(architecture.activation, gated=architecture.gated)
        place = f"{architecture.layers}.{number}."
        own = {name[len(place) : -len(".weight")]: size for name, size in sizes.items() if name.startswith(place)}
        for name, part in _parts(architecture, own).items():
            put(self, name, part)

    def part(self, name: str) -> Any:
        """The part with this name within the layer."""
        return attrgetter(name)(self)

    def forward(self, hidden: Tensor, context: Context, attend: Attend) -> Tensor:
        """
        Args:
            hidden: [batch, length, hidden].
            context: of the batch.
            attend: attention of the new queries, keys and values, which may know older keys; it multiplies the scores
                with 1 / sqrt(head_dim).

        Returns:
            [batch, length, hidden].
        """
        facts, names = self.architecture, self.names
        normed = self.part(names.attention_norm)(hidden) if facts.norm_first else hidden
        attended = self._attended(normed, context, attend)
        if facts.parallel:
            beside = normed if names.mlp_norm == names.attention_norm else self.part(names.mlp_norm)(hidden)
            return hidden + attended + self._mlp(beside, context)
        hidden = self._residual(hidden, normed) + attended
        hidden = hidden if facts.norm_first else self.part(names.attention_norm)(hidden)
        normed = self.part(names.mlp_norm)(hidden) if facts.norm_first else hidden
        hidden = self._residual(hidden, normed) + self._mlp(normed, context)
        return hidden if facts.norm_first else self.part(names.mlp_norm)(hidden)

    def _residual(self, hidden: Tensor, normed: Tensor) -> Tensor:
        """What the output of attention or MLP is added to."""
        facts = self.architecture
        if facts.residual == "hidden":
            return hidden
        return normed if facts.residual_factor == 1.0 else normed * facts.residual_factor

    def _attended(self, normed: Tensor, context: Context, attend: Attend) -> Tensor:
        names = self.names
        query, key, value = self._query_key_value(normed, context)
        if names.query_norm is not None and names.key_norm is not None:
            query, key = self.part(names.query_norm)(query), self.part(names.key_norm)(key)
        if context.rotations:
            query, key = context.rotations[self.is_local](query, key)
        if self.score_factor != 1.0:
            query = query * self.score_factor
        return self._output(names.attention_out, names.attention_out_norm, attend(query, key, value), context)

    def _query_key_value(self, normed: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Each [batch, length, heads, head_dim], of the heads of this process."""
        shape, names, group = self.architecture.shape, self.names, context.key_value_group
        if len(names.query_key_value) == 3:
            query, key, value = (self.part(name)(normed) for name in names.query_key_value)
            parts = query, for_parts(key, group), for_parts(value, group)
            query, key, value = (by_head(x, shape.head_dim) for x in parts)
            return query, key, value
        fused = for_parts(self.part(names.query_key_value[0])(normed), group)
        if names.by_head:  # each head's query, key and value stand together
            query, key, value = paddle.split(by_head(fused, 3 * shape.head_dim), 3, axis=-1)
            return query, key, value
        times = shape.heads // shape.kv_heads
        narrow = fused.shape[-1] // (times + 2)
        query, key, value = paddle.split(fused, [times * narrow, narrow, narrow], axis=-1)
        query, key, value = (by_head(x, shape.head_dim) for x in (query, key, value))
        if group is not None:  # every process has all heads of a fused product
            rank, ranks = context.tensor_part
            per_rank = query.shape[2] // ranks
            query = query[:, :, rank * per_rank : (rank + 1) * per_rank]
        return query, key, value

    def _mlp(self, x: Tensor, context: Context) -> Tensor:
        names = self.names
        inner = self.between(*(self.part(name)(x) for name in names.mlp_in))
        return self._output(names.mlp_out, names.mlp_out_norm, inner, context)

    def _output(self, linear: str, norm: str | None, x: Tensor, context: Context) -> Tensor:
        """What is added to the hidden states."""
        y = self.part(linear)(x)
        y = y if norm is None else self.part(norm)(y)
        return F.dropout(y, context.dropout) if context.dropout else y


def _parts(architecture: Architecture, sizes: Mapping[str, tuple[int, int]]) -> dict[str, nn.Layer]:
    """The parts of a layer by their names within it, in the order of the parameters.

    Args:
        sizes: of its Linears.
    """
    names, shape, offset = architecture.parts, architecture.shape, architecture.norm_offset

    def linears(role: Role, *parts: str) -> dict[str, nn.Layer]:
        return {name: linear(*sizes[name], bias=role in architecture.biased) for name in parts}

    def norms(*parts: str | None) -> dict[str, nn.Layer]:
        return {name: norm(architecture) for name in parts if name is not None}

    attention = {
        **linears("query_key_value", *names.query_key_value),
        **linears("attention_out", names.attention_out),
        **{name: RMSNorm(shape.head_dim, architecture.epsilon, offset) for name in names.head_norms},
        **norms(names.attention_out_norm),
    }
    mlp_parts = {
        **linears("mlp_in", *sorted(names.mlp_in)),
        **linears("mlp_out", names.mlp_out),
        **norms(names.mlp_out_norm),
    }
    first = norms(names.attention_norm)
    second = norms(None if names.mlp_norm == names.attention_norm else names.mlp_norm)
    if names.norms == "between":
        return first | attention | second | mlp_parts
    return first | second | attention | mlp_parts if names.norms == "first" else attention | mlp_parts | first | second
