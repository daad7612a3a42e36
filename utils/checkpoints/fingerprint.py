"""The identity of a base model: the same for every layout, sharding and file format of the same weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import numpy as np

from utils.checkpoints.locate import Checkpoint
from utils.checkpoints.match import match
from utils.checkpoints.tensors import cast

SAMPLES = 4  # values taken from each tensor


def fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 (hexadecimal) over the sizes of a model and a few values of each of its tensors.

    Values lie on the diagonal, where a transposed tensor has the same ones, and are compared as
    float32. Costs well under a second, as only the pages with these values are read.

    Raises:
        UserError: see `match`.
    """
    facts = {
        "family": checkpoint.family.name,
        **asdict(checkpoint.family.shape(checkpoint.config)),
        "rope_theta": checkpoint.config.get("rope_theta"),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    sources = match(checkpoint)
    for parameter in sorted(sources):
        tensor, transpose = sources[parameter]
        values = tensor.read()
        places = np.linspace(0, min(values.shape, default=1) - 1, SAMPLES).astype(np.int64)
        sample = values[(places,) * values.ndim]
        digest.update(f"{parameter}{list(tensor.shape[::-1] if transpose else tensor.shape)}".encode())
        digest.update(cast(np.asarray(sample), "float32").tobytes())
    return digest.hexdigest()
