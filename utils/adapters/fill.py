"""Weights of an adapter's file into the parameters that wait for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle

from utils.checkpoints.tensors import open_tensors
from utils.errors import raise_if
from utils.partition.tensor import Held

SHOWN_FAULTS = 5


def fill_parameters(wanted: dict[str, Any], path: Path, held: Held | None = None) -> None:
    """Sets every parameter of `wanted` from the tensors of one file, all or nothing.

    Args:
        held: what this rank holds of the parameters, if not all.

    Raises:
        UserError: names that are missing, unknown or of another shape.
    """
    found = open_tensors(path)
    if held is not None:
        found = {name: held.part(name, tensor) for name, tensor in found.items() if held.here(name)}
    faults = [f"{path}: has no {name}" for name in wanted if name not in found]
    faults += [f"{path}: {name} belongs to no layer of this model" for name in found if name not in wanted]
    faults += [
        f"{path}: {name} has shape {list(value.shape)}, this model needs {list(wanted[name].shape)}"
        for name, value in found.items()
        if name in wanted and list(value.shape) != list(wanted[name].shape)
    ]
    if len(faults) > SHOWN_FAULTS:
        faults[SHOWN_FAULTS:] = [f"{path}: and {len(faults) - SHOWN_FAULTS} more like these; is it another base's?"]
    raise_if(faults)
    for name, parameter in wanted.items():
        parameter.set_value(paddle.to_tensor(np.ascontiguousarray(found[name].read())).astype(parameter.dtype))
