"""Sequence parallelism: between their shared products, tensor-parallel ranks hold a piece of every text each.

Korthikanti et al. 2022 (arXiv:2205.05198): norms, dropout and residuals of a layer are computed once instead of on
every rank, and what is kept of them for the gradient is divided. One way for all families: hooks on the products,
which take whole hidden states and give whole ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from utils.families.base import FamilySpec
from utils.model.decoder import Decoder


def _own(x: Tensor, group: Any) -> Tensor:
    """[batch, length, hidden] -> [batch, length / ranks, hidden]."""
    size = x.shape[1] // group.nranks
    return x[:, group.rank * size : (group.rank + 1) * size].contiguous()


def _all(x: Tensor, group: Any) -> Tensor:
    """[batch, length / ranks, hidden] of each rank -> [batch, length, hidden]."""
    found: list[Tensor] = []
    dist.all_gather(found, x.contiguous(), group=group)
    return paddle.concat(found, axis=1)


class _Piece(PyLayer):
    """This rank's piece of what all ranks have whole, with the same gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _own(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _all(grad, ctx.group)


class _Whole(PyLayer):
    """The whole from the pieces of all ranks, which then have the same gradient of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _all(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _own(grad, ctx.group)


class Sequence:
    """Divides hidden states in training. In evaluation, where texts grow token by token, all ranks have them whole.

    Args:
        model: with its adapter layers.
        group: the tensor-parallel ranks.
    """

    def __init__(self, family: FamilySpec, config: Mapping[str, Any], model: Decoder, group: Any) -> None:
        self.group = group
        linears = {
            weight.parameter.removesuffix(".weight"): weight.split
            for weight in family.weights(config)
            if weight.is_linear and model.architecture.layers in weight.parameter
        }
        inside = set()
        for name, layer in model.named_sublayers():
            if name not in linears:
                continue
            inside |= {id(parameter) for parameter in layer.parameters()}
            if linears[name] == "row":
                layer.register_forward_post_hook(lambda layer, _, output: self.piece(output, layer))
            else:
                layer.register_forward_pre_hook(lambda layer, inputs: (self.whole(inputs[0], layer), *inputs[1:]))
        for parameter in (parameter for layer in model.layers for parameter in layer.parameters()):
            over = getattr(parameter, "summed_over", ())
            if id(parameter) not in inside and "tensor" not in over:
                parameter.summed_over = (*over, "tensor")  # norms: a rank's part of their gradient is from its piece

    def piece(self, x: Tensor, model: nn.Layer) -> Tensor:
        """[batch, length, hidden] -> [batch, length / ranks, hidden] in training."""
        return _Piece.apply(x, self.group) if model.training else x

    def whole(self, x: Tensor, model: nn.Layer) -> Tensor:
        """Back from `piece`."""
        return _Whole.apply(x, self.group) if model.training else x
