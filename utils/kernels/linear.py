"""The matrices of a model: how their weights are stored, how ranks share them, and what an adapter adds.

`linear` makes every one of them. A format of weights is one class here; shards and adapters ask it for products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, Protocol

import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from utils.kernels import in_place, precision, split, traced_collectives
from utils.kernels.arrays import fixed


class Format(Protocol):
    """How the weights W [in, out] of a matrix are stored."""

    def create(self, ins: int, outs: int, dtype: Any) -> dict[str, Tensor]:
        """The parameters of a new matrix, by their names in the layer; `dtype` is None for Paddle's default."""
        ...

    def store(self, weight: Tensor) -> dict[str, Tensor]:
        """As `create`, with the values of a dense matrix, which are not trained."""
        ...

    def product(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """x @ W + bias: [..., in] -> [..., out]."""
        ...

    def added(self, layer: Any, x: Tensor, base: Tensor) -> Tensor:
        """base + x @ W of many tokens, without a gradient: [n, in], [n, out] -> [n, out]. `base` is lost."""
        ...

    def values(self, layer: Any) -> Tensor:
        """W in a floating-point type."""
        ...


class Dense:
    """Numbers in a floating-point type: `weight` [in, out]."""

    def create(self, ins: int, outs: int, dtype: Any) -> dict[str, Tensor]:
        return {"weight": nn.Layer().create_parameter([ins, outs], dtype=dtype)}

    def store(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": fixed(weight)}

    def product(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = layer.weight
        half = precision.rounded_to(x, weight)
        if half is not None:
            y = precision.matmul(x, weight)
            return y if bias is None else y + precision.cast(bias, half)
        if paddle.in_dynamic_mode():
            return _product(x, weight, bias)
        y = paddle.matmul(x, weight)
        return y if bias is None else in_place.add(y, bias)

    def added(self, layer: Any, x: Tensor, base: Tensor) -> Tensor:
        if not precision.on_cpu() or precision.rounded_to(x, layer.weight) is not None:
            return in_place.add(base, self.product(layer, x, None))
        return in_place.add_product(base, x, layer.weight)

    def values(self, layer: Any) -> Tensor:
        return layer.weight


# of operators that run at once; the public function asks for a flag each time, which costs as much as a small product
_product: Any = F.linear if paddle.is_compiled_with_cuda() else paddle._C_ops.linear

FORMATS: Mapping[str, Format] = {"dense": Dense()}


@dataclass(frozen=True)
class Shard:
    """How tensor-parallel ranks share a matrix.

    Attributes:
        kind: "column", each has some outputs, of the whole input; or "row", each has some inputs, and the sum of what
            they give is the output.
        group: of the ranks.
    """

    kind: Literal["column", "row"]
    group: Any

    @property
    def axis(self) -> int:
        """Of W, along which the ranks share it."""
        return 1 if self.kind == "column" else 0


class Linear(nn.Layer):
    """x @ W + bias [out], if there is one: [..., in] -> [..., out], this rank's part where the matrix is shared.

    Attributes:
        format: of W.
        shard: how ranks share it; None where each has all of it.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], format: Format = FORMATS["dense"], shard: Shard | None = None
    ) -> None:
        """
        Args:
            parameters: those of the format, and perhaps `bias`.
        """
        super().__init__()
        self.format, self.shard = format, shard
        if "bias" not in parameters:
            self.bias = None
        for name, parameter in parameters.items():
            self.add_parameter(name, parameter)

    def __call__(self, x: Tensor) -> Tensor:
        if self._forward_pre_hooks or self._forward_post_hooks:
            return super().__call__(x)
        return self.forward(x)  # the library's way costs as much as a small operator

    def forward(self, x: Tensor) -> Tensor:
        if self.shard is None:
            return self.product(x, self.bias)
        if self.shard.kind == "column":
            return self.product(split.for_parts(x, self.shard.group), self.bias)
        y = (split if paddle.in_dynamic_mode() else traced_collectives).summed(self.product(x, None), self.shard.group)
        return y if self.bias is None else y + self.bias

    def added(self, x: Tensor, base: Tensor) -> Tensor:
        """base + what `forward` gives, of many tokens without a gradient: [n, in], [n, out] -> [n, out]. `base` is
        lost."""
        if self.shard is not None:  # what ranks give is summed first
            return in_place.add(base, self(x))
        y = self.format.added(self, x, base)
        return y if self.bias is None else in_place.add(y, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x @ W + bias, of this rank alone."""
        return self.format.product(self, x, bias)


def linear(
    ins: int, outs: int, *, bias: bool = True, format: str = "dense", shard: Shard | None = None, dtype: Any = None
) -> Linear:
    """A new matrix of a model.

    Args:
        ins, outs: of the whole matrix.
        format: a name of `FORMATS`.
        dtype: of its numbers; Paddle's default one without.
    """
    sizes = [ins, outs]
    if shard is not None:
        sizes[shard.axis] //= shard.group.nranks
    kind = FORMATS[format]
    parameters = kind.create(sizes[0], sizes[1], dtype)
    if shard is not None:
        for parameter in parameters.values():
            mark_part(parameter, shard.axis)
    if bias:
        parameters["bias"] = nn.Layer().create_parameter([sizes[1]], dtype=dtype, is_bias=True)
        if shard is not None and shard.kind == "column":
            mark_part(parameters["bias"], 0)
    return Linear(parameters, kind, shard)


def fixed_linear(
    weight: Tensor, bias: Tensor | None = None, *, format: str = "dense", shard: Shard | None = None
) -> Linear:
    """A matrix of given values that is not trained.

    Args:
        weight, bias: [in, out] and [out] of this rank.
    """
    parameters = FORMATS[format].store(weight)
    return Linear(parameters if bias is None else {**parameters, "bias": fixed(bias)}, FORMATS[format], shard)


def mark_part(parameter: Any, axis: int) -> None:
    """Marks a parameter of which each tensor-parallel rank has another part, along an axis; the marks are fleet's."""
    parameter.is_distributed, parameter.split_axis = True, axis


def replace_layer(model: nn.Layer, path: str, new: nn.Layer) -> None:
    """Puts a layer in the place of another one of a model."""
    owner, _, last = path.rpartition(".")
    setattr(attrgetter(owner)(model) if owner else model, last, new)


class LoraLinear(Linear):
    """A frozen matrix with a trained change: x @ (W + scale * A B) + bias (Hu et al. 2021, arXiv:2106.09685).

    A [in, rank] and B [rank, out] may have another type than W, in whose type the product is computed in any case.
    With a "column" shard every rank has all of A, with a "row" shard all of B.
    """

    def __init__(
        self,
        base: Linear,
        rank: int,
        scale: float,
        *,
        dropout: float = 0.0,
        dtype: str | None = None,
        rate_of_b: float = 1.0,
    ) -> None:
        """
        Args:
            base: whose parameters become those of this layer.
            dropout: share of the inputs of A that training drops.
            dtype: of A and B, by default that of W.
            rate_of_b: learning rate of B, in that of A.
        """
        known = {name: parameter for name, parameter in base._parameters.items() if parameter is not None}
        super().__init__(known, base.format, base.shard)
        for parameter in known.values():
            parameter.stop_gradient = True
        self.training = base.training
        weights = self.format.values(self)
        self.scale, self.dropout, self.computed = scale, dropout, weights.dtype
        kind = dtype or weights.dtype
        # drawn by Paddle's generator, though other values take their place: what follows draws the same as ever
        self.lora_A = self.create_parameter([weights.shape[0], rank], dtype=kind)
        zeros = paddle.ParamAttr(initializer=nn.initializer.Constant(0.0), learning_rate=rate_of_b)
        self.lora_B = self.create_parameter([rank, weights.shape[1]], attr=zeros, dtype=kind)
        if self.shard is not None:
            mark_part(*((self.lora_A, 0) if self.shard.kind == "row" else (self.lora_B, 1)))

    @property
    def fused(self) -> bool:
        """Whether A B is added to W before the product, which takes less time and memory than another product."""
        return bool(self.training and not self.dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return super().forward(x)
        kind = precision.product_dtype(self.computed)
        a, b = (precision.cast(weights, kind) for weights in (self.lora_A, self.lora_B))
        inputs = F.dropout(x, self.dropout) if self.dropout and self.training else x
        lower = precision.matmul(precision.cast(inputs, kind), a)
        if self.shard is not None:
            lower = (split.summed if self.shard.kind == "row" else split.for_parts)(lower, self.shard.group)
        return super().forward(x) + precision.matmul(lower, b) * self.scale

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not self.fused:
            return super().product(x, bias)
        kind = precision.product_dtype(self.computed)
        x, a, b = (precision.cast(operand, kind) for operand in (x, self.lora_A, self.lora_B))
        return precision.cast(_Changed.apply(x, a, b, self, bias is not None, kind), kind)


class _Changed(PyLayer):
    """x @ (W + scale * A B) + bias with gradients of x, A and B: those of A and B go through [rows, rank], and what is
    as large as W lives in the forward pass only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: LoraLinear, has_bias: bool, kind: Any) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.layer, ctx.kind, ctx.x_is_trained = layer, kind, not x.stop_gradient
        with precision.in_own_type():
            changed = paddle.addmm(_weights(layer, kind), a, b, alpha=layer.scale)
            return F.linear(x, changed, precision.cast(layer.bias, kind) if has_bias else None)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, a, b = ctx.saved_tensor()
        layer, of_x = ctx.layer, None
        rows, gradient = x.reshape([-1, x.shape[-1]]), gradient.reshape([-1, gradient.shape[-1]])
        upper, lower = paddle.matmul(gradient, b, transpose_y=True), paddle.matmul(rows, a)  # [rows, rank]
        if ctx.x_is_trained:
            of_x = paddle.matmul(gradient, _weights(layer, ctx.kind), transpose_y=True)
            of_x = paddle.addmm(of_x, upper, a.T, alpha=layer.scale).reshape(x.shape)
        if layer.shard is not None:  # of the whole matrix: A has its gradient from all columns, B from all rows
            dist.all_reduce(upper if layer.shard.kind == "column" else lower, group=layer.shard.group)
        of_a = paddle.matmul(rows, upper, transpose_x=True) * layer.scale
        return of_x, of_a, paddle.matmul(lower, gradient, transpose_x=True) * layer.scale


def _weights(layer: LoraLinear, kind: Any) -> Tensor:
    return precision.cast(layer.format.values(layer), kind)


class Embedding(nn.Layer):
    """Rows of a table `weight` [vocabulary, width]; tensor-parallel ranks may have equally many of them each.

    Attributes:
        group: of these ranks; None where this one has the whole table.
    """

    def __init__(self, vocabulary: int, width: int, group: Any = None) -> None:
        """
        Args:
            vocabulary: of the whole table.
        """
        super().__init__()
        self.vocabulary, self.group = vocabulary, group
        ranks = 1 if group is None else group.nranks
        self.weight = self.create_parameter([vocabulary // ranks, width])
        if group is not None:
            mark_part(self.weight, 0)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., width]."""
        if self.group is None:
            found = F.embedding(ids, self.weight)
        else:
            found = split.rows(self.weight, ids, self.vocabulary, self.group)
        return precision.cast(found, self.weight.dtype)
