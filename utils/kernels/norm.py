"""Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.autograd import PyLayer
from paddle.incubate.nn.functional import fused_rms_norm

from utils.kernels import precision

# On CPUs: Paddle's `pow` costs 50 times a product, a mean over the last axis 7 times the matrix
# product with a column of 1/n, and a product with a broadcast vector twice that with a tiled one.


def _mean(x: Tensor) -> Tensor:
    """Mean over the last axis, which is kept."""
    width = x.shape[-1]
    with precision.in_own_type():  # squares above 65,504 are no float16
        return paddle.matmul(x, paddle.full([width, 1], 1.0 / width, dtype=x.dtype))


def _normalised(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) in float32, and 1 / rms(x) [..., 1]."""
    x = x.astype("float32")
    scale = paddle.rsqrt(_mean(x * x) + epsilon)
    return x * scale, scale


class _RMSNorm(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, weight_is_trained: bool) -> Tensor:
        normal, scale = _normalised(x, epsilon)
        ctx.save_for_backward(normal, scale, weight)
        ctx.dtype, ctx.weight_is_trained = x.dtype, weight_is_trained
        return normal.astype(weight.dtype) * weight.expand_as(normal)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        normal, scale, weight = ctx.saved_tensor()
        gradient = gradient.astype("float32")
        inner = gradient * weight.astype("float32").expand_as(gradient)
        of_x = (inner - normal * _mean(inner * normal)) * scale
        of_weight = None
        if ctx.weight_is_trained:
            of_weight = (gradient * normal).reshape([-1, normal.shape[-1]]).sum(0).astype(weight.dtype)
        return of_x.astype(ctx.dtype), of_weight


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x²) + epsilon) * weight over the last axis.

    Args:
        x: [..., width]; the mean is taken in float32.
        weight: [width].

    Returns:
        [..., width] in the type of `weight`.
    """
    learning = paddle.in_dynamic_mode() and paddle.is_grad_enabled()
    if learning and not (x.stop_gradient and weight.stop_gradient):
        # told here: neither the tensors in `forward` nor the saved ones are sure to remember it
        return _RMSNorm.apply(x, weight, epsilon, not weight.stop_gradient)
    if x.dtype == weight.dtype == paddle.float32:
        return fused_rms_norm(x, weight, None, epsilon, -1)[0]
    normal, _ = _normalised(x, epsilon)
    return normal.astype(weight.dtype) * weight.expand_as(normal)


class RMSNorm(nn.Layer):
    """See `rms_norm`; over the last axis, with a trained weight."""

    def __init__(self, width: int, epsilon: float, offset: float = 0.0) -> None:
        """
        Args:
            offset: what is added to the weight.
        """
        super().__init__(dtype=paddle.get_default_dtype())
        self.weight = self.create_parameter([width], default_initializer=nn.initializer.Constant(1.0 - offset))
        self.epsilon, self.offset = epsilon, offset

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        weight = precision.cast(self.weight, self.weight.dtype)
        return rms_norm(x, weight + self.offset if self.offset else weight, self.epsilon)


class LayerNorm(nn.LayerNorm):
    """Over the last axis (Ba et al. 2016, arXiv:1607.06450), with a trained weight and bias."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__(width, epsilon=epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        weight, bias = (precision.cast(own, own.dtype) for own in (self.weight, self.bias))
        return F.layer_norm(x, self._normalized_shape, weight, bias, self._epsilon)
