"""A model into a folder that this project, PaddleNLP or Hugging Face transformers loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.checkpoints.files import write_json
from utils.checkpoints.tensors import LazyTensor, cast, write_shards
from utils.families import FamilySpec
from utils.model.weights import Weight

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
        return LazyTensor(weight.parameter, kept, tuple(parameter.shape), lambda: cast(parameter.numpy(), kept))

    tensors = [(weight, lazy(weight)) for weight in family.weights(config)]
    return write_model(folder, tensors, family, config, export_format, max_shard_bytes)


def in_layout(tensors: Sequence[tuple[Weight, LazyTensor]], export_format: str) -> list[LazyTensor]:
    """The tensors to write for the parameters of a model (in the Paddle layout), in the same order."""
    if export_format == "paddle":
        return [tensor for _, tensor in tensors]
    parts: dict[str, list[tuple[Weight, LazyTensor]]] = {}
    for weight, tensor in tensors:
        transposed = _transposed(tensor) if weight.transpose else tensor
        parts.setdefault(weight.published, []).append((weight, transposed))
    return [_joined(name, found) for name, found in parts.items()]


def _transposed(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor.name, tensor.dtype, tensor.shape[::-1], lambda: np.ascontiguousarray(tensor.read().T))


def _joined(name: str, parts: Sequence[tuple[Weight, LazyTensor]]) -> LazyTensor:
    """One published tensor from its parts, which come in order; of the first one's type."""
    weight, first = parts[0]
    if weight.part is None:
        return LazyTensor(name, first.dtype, first.shape, first.read)
    axis = weight.output_axis % len(first.shape)
    length = sum(tensor.shape[axis] for _, tensor in parts)
    shape = (*first.shape[:axis], length, *first.shape[axis + 1 :])

    def read() -> np.ndarray:
        return np.concatenate([cast(tensor.read(), first.dtype) for _, tensor in parts], axis=axis)

    return LazyTensor(name, first.dtype, shape, read)


def write_model(
    folder: Path,
    tensors: Sequence[tuple[Weight, LazyTensor]],
    family: FamilySpec,
    config: Mapping[str, Any],
    export_format: str,
    max_shard_bytes: int,
) -> list[Path]:
    """Writes a model's weights, given in the Paddle layout, and the configuration beside them.

    A generation_config.json that is already in the folder is kept.
    """
    stored = in_layout(tensors, export_format)
    files = write_shards(folder, stored, _METADATA[export_format], max_shard_bytes)
    describe_model(folder, family, config, export_format, max(stored, key=lambda tensor: tensor.nbytes).dtype)
    return files


def describe_model(
    folder: Path,
    family: FamilySpec,
    config: Mapping[str, Any],
    export_format: str,
    dtype: str,
    *,
    tensor_parallel_degree: int = 1,
) -> None:
    """Writes the config.json and generation_config.json that belong to a model's weights of a type.

    Args:
        tensor_parallel_degree: how many processes have stored their part of the weights; 1 for whole weights.
    """
    if export_format == "hf":
        described = {**family.published_config(config), "torch_dtype": dtype}
    else:
        described = {**family.paddle_config(config), "dtype": dtype}
    described.setdefault("model_type", family.model_types[0])
    if tensor_parallel_degree > 1:
        described["tensor_parallel_degree"] = tensor_parallel_degree
    write_json(folder / "config.json", described)
    if not (folder / "generation_config.json").exists():
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        write_json(folder / "generation_config.json", {n: config[n] for n in names if n in config})
