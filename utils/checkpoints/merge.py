"""A LoRA adapter merged into its base, tensor by tensor: W + scale * A B (arXiv:2106.09685). No Paddle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from utils.adapters.lora_files import LoraAdapter, Pair, read_lora
from utils.adapters.targets import matrices
from utils.checkpoints.companions import write_companions
from utils.checkpoints.files import atomic_directory, check_replaceable, holds_nothing_else, write_json
from utils.checkpoints.locate import Checkpoint
from utils.checkpoints.match import match, stored_shape
from utils.checkpoints.save import MAX_SHARD_BYTES, write_model
from utils.checkpoints.tensors import LazyTensor, cast, is_finite
from utils.errors import UserError

MERGE_RECORD = "merge_lora.json"  # what was merged; also marks a folder that another merge may replace


def merge_lora(
    base: Checkpoint,
    adapter: Path,
    target: Path,
    *,
    export_format: str = "paddle",
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Writes base + adapter as an ordinary model folder: weights, config, tokenizer, chat template.

    Sums are computed in float32 and then cast. One tensor is in memory at a time. `target` appears
    complete or not at all.

    Args:
        adapter: folder of a LoRA adapter, ours or PEFT's.
        dtype: the type to store; None keeps that of each base tensor.

    Returns:
        The files of tensors.

    Raises:
        UserError: an adapter of another base or one that does not fit, a damaged file, values that are not
            finite, or a `target` that holds anything but an earlier merge.
    """
    check_target(target, MERGE_RECORD, (base.folder, adapter))
    found = read_lora(adapter, base)
    merged = parameters(base, found, dtype)
    tensors = [(weight, _finite(merged[weight.parameter], base)) for weight in base.family.weights(base.config)]
    record = {"base": base.name, "adapter": str(adapter), **found.settings.to_json()}
    with atomic_directory(target) as staging:
        write_companions(base, adapter, staging)
        write_json(staging / MERGE_RECORD, record)
        files = write_model(staging, tensors, base.family, base.config, export_format, max_shard_bytes)
    return [target / file.name for file in files]


def parameters(base: Checkpoint, adapter: LoraAdapter | None = None, dtype: str | None = None) -> dict[str, LazyTensor]:
    """Every parameter of a model in the Paddle layout, with an adapter merged into it; read when asked for.

    Args:
        dtype: of the values; None is as stored.

    Raises:
        UserError: see `match`.
    """
    changes: dict[str, Callable[[], np.ndarray]] = {}
    if adapter is not None:
        layers = matrices(base)
        for layer, pair in adapter.pairs.items():
            weight = layers[layer]
            changes[weight.parameter] = _change(pair, adapter.settings.scale_of(layer), weight.is_linear)
    return {
        name: _merged(name, tensor, transpose, changes.get(name), dtype or tensor.dtype)
        for name, (tensor, transpose) in match(base).items()
    }


def changed_parameters(base: Checkpoint, adapter: LoraAdapter) -> set[str]:
    """Names of the parameters that an adapter changes."""
    layers = matrices(base)
    return {layers[layer].parameter for layer in adapter.pairs}


def _finite(tensor: LazyTensor, base: Checkpoint) -> LazyTensor:
    """A tensor whose reading raises `UserError` where the result would hold NaN or infinity."""

    def read() -> np.ndarray:
        with np.errstate(over="ignore"):  # is an error here
            values = tensor.read()
        if not is_finite(values):
            raise UserError(
                f"{base.name}: merged {tensor.name} would hold NaN or infinity in {tensor.dtype}; the weights of the "
                "base hold such values, or are with the adapter too large for that type"
            )
        return values

    return replace(tensor, read=read)


def check_target(target: Path, record: str, inputs: Sequence[Path]) -> None:
    """Only an earlier merge is ever replaced: whatever else stands there may be somebody's work.

    Args:
        record: the file that marks an earlier merge.
        inputs: folders that are read.

    Raises:
        UserError: something else is there, or a file of the merge is read-only.
    """
    place = target.resolve()
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    holds_input = any(place in (path.resolve(), *path.resolve().parents) for path in inputs)
    if holds_input or not (target / record).is_file() or not holds_nothing_else(target):
        raise UserError(f"{target}: is there already and holds more than an earlier merge; name a new folder")
    check_replaceable([target])


def _change(pair: Pair, scale: float, is_linear: bool) -> Callable[[], np.ndarray]:
    """What an adapter adds to a matrix, float32; that of a Linear is [in, out], any other [out, in]."""

    def read() -> np.ndarray:
        a, b = (cast(half.read(), "float32") for half in pair)
        change = np.float32(scale) * (a @ b)
        return change if is_linear else change.T

    return read


def _merged(
    name: str, tensor: LazyTensor, transpose: bool, change: Callable[[], np.ndarray] | None, dtype: str
) -> LazyTensor:
    """One parameter of the result, in the Paddle layout; its values are computed when it is written."""

    def read() -> np.ndarray:
        values = tensor.read()
        if transpose:
            values = values.T
        if change is None:
            return cast(values, dtype)
        total = change()
        total += cast(values, "float32")
        return cast(total, dtype)

    return LazyTensor(name, dtype, stored_shape(tensor, transpose), read)
