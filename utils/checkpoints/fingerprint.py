"""The identity of a base model: the same for every layout, sharding and float type of the same weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from utils.checkpoints.locate import Checkpoint
from utils.checkpoints.match import match
from utils.checkpoints.tensors import LazyTensor, cast

SAMPLED_TENSORS = 16
SAMPLED_VALUES = 4  # of each
TOLERANCE = 0.005  # bfloat16 keeps 8 bits: rounding moves a value by up to 0.4 %
SAMPLED_BLOCKS = 64
BLOCK = 1 << 16  # bytes of each


def file_sample(path: Path) -> str:
    """What tells a file from others of its size: sha256 (hexadecimal) of the whole of a small one, of a large one of
    blocks from its first to its last byte. Costs the same for a file of any length."""
    digest, size = hashlib.sha256(), path.stat().st_size
    last = max(size - BLOCK, 0)
    places = {last * number // (SAMPLED_BLOCKS - 1) for number in range(SAMPLED_BLOCKS)}
    with path.open("rb") as file:
        for place in sorted(places) if size > SAMPLED_BLOCKS * BLOCK else range(0, size, BLOCK):
            file.seek(place)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def tensors_digest(tensors: Mapping[str, LazyTensor]) -> str:
    """sha256 (hexadecimal) of names, sizes and all values of tensors, in whatever file and order; for small ones."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\0".encode())
        digest.update(np.ascontiguousarray(tensors[name].read()).tobytes())
    return digest.hexdigest()


def fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells a base from others: family, sizes and a few values of tensors all over the model.

    Values lie on the diagonal, where a transposed tensor has the same ones. Costs well under a second,
    as only the pages with these values are read. Compare with `same_base`.

    Raises:
        UserError: see `match`.
    """
    sources = match(checkpoint)
    names = sorted(sources)
    sample: list[float] = []
    for place in sorted({round(i) for i in np.linspace(0, len(names) - 1, SAMPLED_TENSORS)}):
        values = sources[names[place]][0].read()
        diagonal = np.linspace(0, min(values.shape, default=1) - 1, SAMPLED_VALUES).astype(np.int64)
        chosen = np.asarray(values[(diagonal,) * values.ndim])
        sample += [float(f"{value:.6g}") for value in cast(chosen, "float32").reshape(-1)]
    return {**sizes(checkpoint), "sample": sample}


def sizes(checkpoint: Checkpoint) -> dict[str, Any]:
    """As `fingerprint`, of a model whose weights are about to be made: family and sizes, no values."""
    return {
        "family": checkpoint.family.name,
        **asdict(checkpoint.family.shape(checkpoint.config)),
        "rope_theta": checkpoint.config.get("rope_theta"),
        "sample": [],
    }


def same_base(stored: object, actual: dict[str, Any]) -> bool:
    """Whether a fingerprint read from a file is that of a model, up to rounding of its float type.

    What is no fingerprint at all (a file that was edited) belongs to no model.
    """
    if not isinstance(stored, dict) or {**stored, "sample": None} != {**actual, "sample": None}:
        return False
    sample = stored.get("sample")
    if not isinstance(sample, list) or len(sample) != len(actual["sample"]):
        return False
    return all(
        isinstance(one, (int, float)) and math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1e-6)
        for one, other in zip(sample, actual["sample"], strict=True)
    )
