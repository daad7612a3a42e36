"""The values that a new model begins with."""

from __future__ import annotations

from collections.abc import Sequence

import paddle
from paddle import Tensor

from utils.model.architecture import Architecture


def initial_value(architecture: Architecture, name: str, shape: Sequence[int]) -> Tensor:
    """What a parameter of a new model begins with, float32; see `architecture.Initial`.

    Paddle's generator decides: seed it before.

    Args:
        name: the parameter's whole name.
    """
    if len(shape) == 1:
        return paddle.full(shape, 0.0 if name.endswith(".bias") else 1.0 - architecture.norm_offset)
    spread = _spread(architecture, name)
    if spread is not None:
        return paddle.normal(0.0, spread, shape)
    bound = (6.0 / sum(shape)) ** 0.5
    return paddle.uniform(shape, dtype="float32", min=-bound, max=bound)


def _spread(architecture: Architecture, name: str) -> float | None:
    initial, place = architecture.initial, name.removeprefix(f"{architecture.layers}.")
    if name == architecture.head:
        return initial.head
    if place == name:
        return initial.tables
    layer = architecture.layer(int(place.partition(".")[0]))
    is_output = name.removesuffix(".weight") in (layer.attention_out, layer.mlp_out)
    return initial.outputs if is_output else initial.linears
