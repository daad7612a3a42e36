"""A model's parameters, or a tensor-parallel rank's parts of them, as the operators of the fused decoder."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import paddle
from paddle import Tensor, nn

from utils.checkpoints.tensors import cast
from utils.kernels import in_place
from utils.kernels import inference as kernels
from utils.kernels.arrays import fixed
from utils.kernels.linear import Linear, Shard, fixed_linear
from utils.kernels.shared import SharedTable
from utils.model.architecture import Architecture, LayerNames, ModelShape
from utils.model.steps import own_architecture
from utils.partition.parts import Parts

Read = Callable[[str], np.ndarray]  # float32 values of a parameter, by name
Made = TypeVar("Made")


class HeadNorms(kernels.Operator):
    """Norms of queries and keys by head; values stay. Without norms nothing is changed."""

    def __init__(self, norms: tuple[kernels.Norm, kernels.Norm] | None, shape: ModelShape) -> None:
        super().__init__()
        self.has_norms, self.counts = norms is not None, [shape.heads, shape.kv_heads, shape.kv_heads]
        self.by_head = [-1, sum(self.counts), shape.head_dim]
        if norms is not None:
            self.query, self.key = norms

    def forward(self, x: Tensor) -> Tensor:
        """Queries, keys and values side by side, [n, (heads + 2 * kv_heads) * head_dim]."""
        if not self.has_norms:
            return x
        query, key, value = paddle.split(x.reshape(self.by_head), self.counts, axis=1)
        return paddle.concat([self.query(query), self.key(key), value], axis=1).reshape(x.shape)


class _Normed(kernels.Operator):
    """A product with a norm behind it."""

    def __init__(self, product: Linear, norm: kernels.Norm) -> None:
        super().__init__()
        self.product, self.norm = product, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.product(x))

    def added(self, x: Tensor, base: Tensor) -> Tensor:
        return in_place.add(base, self(x))


def whole(values: np.ndarray) -> np.ndarray:
    return values


def first_half(values: np.ndarray) -> np.ndarray:
    return values[:, : values.shape[1] // 2]


def second_half(values: np.ndarray) -> np.ndarray:
    return values[:, values.shape[1] // 2 :]


class Weights:
    """Reads the parameters of a model, or a rank's parts of them, into the operators of the decoder."""

    def __init__(
        self,
        architecture: Architecture,
        parameters: Container[str],
        read: Read,
        dtype: str,
        parts: Parts | None,
        group: Any,
        shared: Sequence[Any],
        changed: Container[str],
    ) -> None:
        self.architecture, self._known, self._read, self._dtype = architecture, parameters, read, dtype
        self._offset = np.float32(architecture.norm_offset)
        self._parts, self._group = parts, group
        self._shared, self._changed = shared, changed
        self.made: list[Any] = []  # in the order in which every decoder of this architecture makes them

    def _once(self, names: Iterable[str], make: Callable[[], Made]) -> Made:
        """What stands at this place in the other decoder, if there is one that has the same parameters `names`."""
        number = len(self.made)
        same = number < len(self._shared) and not any(name in self._changed for name in names)
        self.made.append(self._shared[number] if same else make())
        found: Made = self.made[-1]
        return found

    def _tensor(self, values: np.ndarray) -> Tensor:
        return _tensor(values, self._dtype)

    def fixed(self, name: str) -> Tensor:
        """A parameter as one that is not trained."""
        return self._once((name,), lambda: fixed(self._tensor(self._read(name))))

    def bias(self, weight: str) -> Tensor | None:
        """The bias beside a parameter called "NAME.weight", if there is one."""
        name = f"{weight.removesuffix('.weight')}.bias"
        return self._tensor(self._read(name)) if name in self._known else None

    def _own(self, values: np.ndarray, axis: int) -> np.ndarray:
        """This rank's part along an axis, one of equal ones."""
        if self._parts is None:
            return values
        return np.split(values, self._parts.degree, axis)[self._parts.rank]

    def own_columns(self, arrange: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        return lambda values: self._own(arrange(values), 1)

    def table(self, name: str, bias: Tensor | None = None, *, transposed: bool = False) -> kernels.Table | SharedTable:
        """The table [vocabulary, width] of a parameter, or of its transpose."""
        return self._once((name,), lambda: self._table(name, bias, transposed=transposed))

    def _table(self, name: str, bias: Tensor | None, *, transposed: bool) -> kernels.Table | SharedTable:
        values = self._read(name)
        if self._parts is None or not self._parts.shares_vocabulary:
            return kernels.Table(self._tensor(values.T if transposed else values), bias)
        own = self._tensor(self._own(values.T if transposed else values, 0))
        if bias is not None:
            bias = bias.split(self._parts.degree)[self._parts.rank]
        return SharedTable(own, bias, self._group)

    def rows(self, source: str) -> Linear:
        """A Linear of whose inputs a rank has its part."""
        if self._parts is None:
            return self.linear(source)
        weight = f"{source}.weight"
        return self._once(
            (weight,),
            lambda: fixed_linear(
                self._tensor(self._own(self._read(weight), 0)), self.bias(weight), shard=Shard("row", self._group)
            ),
        )

    def output(self, source: str, norm: str | None) -> kernels.Product:
        """What is added to the hidden states: a Linear of whose inputs a rank has its part, and its norm."""
        rows = self.rows(source)
        return rows if norm is None else _Normed(rows, self.norm(norm))

    def linear(self, source: str) -> Linear:
        return self.joined((source,))

    def norm(self, source: str) -> kernels.Norm:
        return self._once((f"{source}.weight",), lambda: self._norm(source))

    def _norm(self, source: str) -> kernels.Norm:
        weight = self._tensor(self._read(f"{source}.weight") + self._offset)
        if self.architecture.norm == "rms":
            return kernels.RMSNorm(weight, self.architecture.epsilon)
        return kernels.LayerNorm(weight, self._tensor(self._read(f"{source}.bias")), self.architecture.epsilon)

    def head_norms(self, names: LayerNames) -> HeadNorms:
        """The norms of queries and keys in `Rotary.order`, the scale of scores in the query's: a norm takes it out of
        what comes before."""
        local = own_architecture(self.architecture, self._parts).shape
        if names.query_norm is None or names.key_norm is None:
            return HeadNorms(None, local)
        rotary, epsilon = self.architecture.rotary, self.architecture.epsilon
        order = slice(None) if rotary is None or rotary.order is None else rotary.order

        def norm(name: str, scale: np.float32) -> kernels.RMSNorm:
            def make() -> kernels.RMSNorm:
                weight = self._read(f"{name}.weight")[order] + self._offset
                return kernels.RMSNorm(self._tensor(weight * scale), epsilon)

            return self._once((f"{name}.weight",), make)

        return HeadNorms((norm(names.query_norm, self._scale(names)), norm(names.key_norm, np.float32(1))), local)

    def _scale(self, names: LayerNames) -> np.float32:
        """The factor of attention scores."""
        head_dim = self.architecture.shape.head_dim
        return np.float32(head_dim**-0.5 if names.score_scale is None else names.score_scale)

    def some(self, norm: str | None, linear: str | None) -> nn.LayerList:
        """A norm and a Linear, those of them that a model has."""
        found: list[kernels.Operator] = []
        if norm is not None:
            found.append(self.norm(norm))
        if linear is not None:
            found.append(self.linear(linear))
        return nn.LayerList(found)

    def joined(
        self,
        sources: tuple[str, ...],
        arrange: Callable[[np.ndarray], np.ndarray] = whole,
    ) -> Linear:
        """Several Linears side by side as one. Some may lack a bias: theirs is 0.

        Args:
            arrange: what becomes of their columns.
        """
        return self._once([f"{source}.weight" for source in sources], lambda: self._joined(sources, arrange))

    def _joined(self, sources: tuple[str, ...], arrange: Callable[[np.ndarray], np.ndarray]) -> Linear:
        weights = [self._read(f"{source}.weight") for source in sources]
        sizes = [weight.shape[1] for weight in weights]
        values = arrange(weights[0] if len(weights) == 1 else np.concatenate(weights, axis=1))
        del weights
        matrix = self._tensor(values)
        if not any(f"{source}.bias" in self._known for source in sources):
            return fixed_linear(matrix)
        biases = [
            self._read(f"{source}.bias") if f"{source}.bias" in self._known else np.zeros(size, np.float32)
            for source, size in zip(sources, sizes, strict=True)
        ]
        return fixed_linear(matrix, self._tensor(arrange(np.concatenate(biases)[None])[0]))

    def by_part(self, names: LayerNames) -> Callable[[np.ndarray], np.ndarray]:
        """Arranges the columns of query, key and value: by part, in `Rotary.order`, the scale in the query unless it
        has a norm of its own; of a rank those of its heads."""
        shape, rotary = self.architecture.shape, self.architecture.rotary
        heads, kv_heads, width = shape.heads, shape.kv_heads, shape.head_dim
        scale = self._scale(names) if names.query_norm is None else np.float32(1)
        own: list[int] | None = None
        if self._parts is not None:
            read = [heads + head for head in self._parts.read_heads]
            own = [*self._parts.query_heads, *read, *(head + kv_heads for head in read)]
        local = own_architecture(self.architecture, self._parts).shape
        queries, turning = local.heads, local.heads + local.kv_heads

        def arrange(values: np.ndarray) -> np.ndarray:
            rows = values.shape[0]
            if names.by_head:
                values = values.reshape(rows, heads, 3, width).transpose(0, 2, 1, 3)
            columns = values.reshape(rows, heads + 2 * kv_heads, width)
            columns = columns.copy() if own is None else columns[:, own]
            if rotary is not None and rotary.order is not None:
                columns[:, :turning] = columns[:, :turning][..., rotary.order]
            columns[:, :queries] *= scale
            return columns.reshape(rows, -1)

        return arrange


def _tensor(values: np.ndarray, dtype: str) -> Tensor:
    """float32 values as a tensor of another type; Paddle takes uint16 for bfloat16."""
    return paddle.to_tensor(np.ascontiguousarray(cast(values, dtype)), dtype=dtype)
