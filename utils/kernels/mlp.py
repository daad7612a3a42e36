"""What stands between the products of an MLP."""

from __future__ import annotations

from collections.abc import Callable

import paddle
import paddle.nn.functional as F
from paddle import Tensor

from utils.kernels.inference import activation


def between(name: str, *, gated: bool) -> Callable[..., Tensor]:
    """From the outputs of an MLP's first products to the input of its last one, [..., width].

    Of a gated MLP these are gate and up, [..., width] each or side by side in one tensor.

    Args:
        name: of the activation, as published.

    Raises:
        UserError: no such activation.
    """
    activate = activation(name)
    if not gated:
        return activate

    def multiplied(gate: Tensor, *up: Tensor) -> Tensor:
        gate, times = (gate, *up) if up else paddle.chunk(gate, 2, axis=-1)
        return F.swiglu(gate, times) if name in ("silu", "swish") else activate(gate) * times

    return multiplied
