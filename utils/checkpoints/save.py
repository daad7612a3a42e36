"""A model into a folder that this project, PaddleNLP or Hugging Face transformers loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from utils.checkpoints.files import write_json
from utils.checkpoints.tensors import LazyTensor, cast, write_shards
from utils.families import FamilySpec, Weight

MAX_SHARD_BYTES = 5 * 10**9
_METADATA = {"paddle": {"format": "np"}, "hf": {"format": "pt"}}


def save_model(
    folder: Path,
    model: Any,
    family: FamilySpec,
    config: Mapping[str, Any],
    *,
    export_format: str = "paddle",
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Writes weights (safetensors), config.json and generation_config.json into an existing folder.

    Tensors are converted and written one by one. Each file appears whole or not at all; for the folder
    as a whole, wrap the call in `atomic_directory`.

    Args:
        model: the Paddle model, without adapter layers.
        config: the config.json that it was built from.
        export_format: "paddle" (parameter names, Linear [in, out]) or "hf" (published names, [out, in]).
        dtype: the type to store; None keeps that of the model.

    Returns:
        The files of tensors.
    """
    parameters = dict(model.named_parameters())

    def lazy(weight: Weight) -> LazyTensor:
        parameter = parameters[weight.parameter]
        kept = dtype or str(parameter.dtype).removeprefix("paddle.")
        return stored_as(weight, export_format, kept, tuple(parameter.shape), lambda: cast(parameter.numpy(), kept))

    tensors = [lazy(weight) for weight in family.weights(config)]
    return write_model(folder, tensors, family, config, export_format, max_shard_bytes)


def stored_as(weight: Weight, export_format: str, dtype: str, shape: tuple[int, ...], read: Any) -> LazyTensor:
    """A parameter (its shape and values in the Paddle layout) as a tensor of the layout to write."""
    if export_format == "paddle":
        return LazyTensor(weight.parameter, dtype, shape, read)
    if not weight.transpose:
        return LazyTensor(weight.published, dtype, shape, read)
    return LazyTensor(weight.published, dtype, shape[::-1], lambda: np.ascontiguousarray(read().T))


def write_model(
    folder: Path,
    tensors: list[LazyTensor],
    family: FamilySpec,
    config: Mapping[str, Any],
    export_format: str,
    max_shard_bytes: int,
) -> list[Path]:
    """Writes tensors that are already in the layout to write, and the configuration beside them.

    A generation_config.json that is already in the folder is kept.
    """
    files = write_shards(folder, tensors, _METADATA[export_format], max_shard_bytes)
    dtype = max(tensors, key=lambda tensor: tensor.nbytes).dtype
    if export_format == "hf":
        described = {**family.published_config(config), "torch_dtype": dtype}
    else:
        described = {**family.paddle_config(config), "dtype": dtype}
    described.setdefault("model_type", family.model_types[0])
    write_json(folder / "config.json", described)
    if not (folder / "generation_config.json").exists():
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        write_json(folder / "generation_config.json", {n: config[n] for n in names if n in config})
    return files
