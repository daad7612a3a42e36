"""Whether two checkpoints are the same base model, whatever their layout, sharding or float type."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from utils.checkpoints.locate import Checkpoint
from utils.checkpoints.tensors import cast

_SAMPLED_TENSORS = 8
_SAMPLED_VALUES = 8
_TOLERANCE = 0.005  # bfloat16 keeps 8 bits: rounding moves a value by up to 0.4 %


def fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What identifies a base: its family, its sizes, and some of its values. Reads a few kilobytes.

    Values come from tensors that no layout transposes (embedding and norms), spread over the layers.
    """
    stored = checkpoint.tensors()
    published = checkpoint.layout == "hf"
    weights = [w for w in checkpoint.family.weights(checkpoint.config) if not w.transpose]
    places = sorted({round(i) for i in np.linspace(0, len(weights) - 1, _SAMPLED_TENSORS)})
    sample: list[float] = []
    for weight in (weights[place] for place in places):
        name = weight.published if published else weight.parameter
        tensor = stored.get(name) or stored.get(name.split(".", 1)[1])
        if tensor is not None:
            values = tensor.read().reshape(-1)
            chosen = np.array(values[:: max(1, len(values) // _SAMPLED_VALUES)][:_SAMPLED_VALUES])
            sample += [float(f"{value:.5g}") for value in cast(chosen, "float32")]
    return {
        "family": checkpoint.family.name,
        "shape": asdict(checkpoint.family.shape(checkpoint.config)),
        "sample": sample,
    }


def same_base(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two fingerprints are those of one model, up to rounding of its float type."""
    if any(first.get(key) != second.get(key) for key in ("family", "shape")):
        return False
    pairs = zip(first["sample"], second["sample"], strict=False)
    return len(first["sample"]) == len(second["sample"]) and all(
        math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=1e-6) for a, b in pairs
    )
