"""Weights of an adapter's file into the parameters that wait for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from utils.adapters.check import misfits
from utils.checkpoints.tensors import LazyTensor
from utils.errors import raise_if
from utils.partition.tensor import ShardPlan


def fill_parameters(
    wanted: Mapping[str, Any], found: Mapping[str, LazyTensor], path: Path, shard_plan: ShardPlan | None = None
) -> None:
    """Sets every parameter of `wanted` from the tensors of an adapter, all or nothing.

    Args:
        found: the tensors by the names of the parameters.
        path: where they come from, for messages.
        shard_plan: what this rank holds of the parameters, if not all.

    Raises:
        UserError: names that are missing, unknown or of another shape.
    """
    if shard_plan is not None:
        found = {name: shard_plan.part(name, tensor) for name, tensor in found.items() if shard_plan.here(name)}
    shapes = {name: parameter.shape for name, parameter in wanted.items()}
    raise_if(misfits(path, shapes, {name: tensor.shape for name, tensor in found.items()}))
    for name, parameter in wanted.items():
        parameter.set_value(paddle.to_tensor(np.ascontiguousarray(found[name].read())).astype(parameter.dtype))
