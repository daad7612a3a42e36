"""A LoRA adapter merged into its base, tensor by tensor: W + scale * A B (arXiv:2106.09685). No Paddle."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from utils.adapters.check import LORA_CONFIG, adapter_weights, check_adapter
from utils.checkpoints.files import atomic_directory
from utils.checkpoints.locate import Checkpoint
from utils.checkpoints.match import match, some, stored_shape
from utils.checkpoints.save import MAX_SHARD_BYTES, stored_as, write_model
from utils.checkpoints.tensors import LazyTensor, cast, open_tensors
from utils.data.template import ChatTemplate
from utils.errors import UserError, raise_if
from utils.families import Weight
from utils.families.tokenizers import SENTENCEPIECE_FILES, TOKENIZER_JSON, load_tokenizer

# Variants of the library's LoRA that are not W + scale * A B on an unchanged base.
_OTHER_METHODS = (
    "pissa",
    "loraga",
    "use_mora",
    "lora_use_mixer",
    "do_qat",
    "enable_lora_list",
    "trainable_bias",
)

Pair = tuple[LazyTensor, LazyTensor]  # lora_A [in, r] and lora_B [r, out]


def scaling(config: Mapping[str, Any]) -> float:
    """The factor on A B: alpha / r, with rsLoRA (arXiv:2312.03732) alpha / sqrt(r)."""
    rank = config["r"]
    return float(config["lora_alpha"] / (math.sqrt(rank) if config.get("rslora") else rank))


def read_adapter(folder: Path, config: Mapping[str, Any]) -> dict[str, Pair]:
    """The pairs of an adapter by the name of their layer, e.g. "llama.layers.0.self_attn.q_proj".

    Raises:
        UserError: a method that cannot be merged, tensors of other kinds, or halves of pairs.
    """
    path = adapter_weights(folder, LORA_CONFIG)
    used = [name for name in _OTHER_METHODS if config.get(name)]
    raise_if([f"{folder / LORA_CONFIG}: {name} is set; such adapters cannot be merged" for name in used])
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), (int, float)) or config[name] <= 0:
            raise UserError(f"{folder / LORA_CONFIG}: {name} is missing or is no positive number")
    halves: dict[str, dict[str, LazyTensor]] = {}
    others = []
    for name, tensor in open_tensors(path).items():
        found = re.fullmatch(r"(.+)\.lora_([AB])", name)
        if found:
            halves.setdefault(found[1], {})[found[2]] = tensor
        else:
            others.append(name)
    if others:
        raise UserError(f"{path}: holds tensors that are no LoRA pair: {some(others)}")
    odd = [layer for layer, pair in halves.items() if len(pair) != 2]
    if odd or not halves:
        raise UserError(f"{path}: not a whole adapter; half of a pair is missing for {some(odd) or 'every layer'}")
    return {layer: (pair["A"], pair["B"]) for layer, pair in halves.items()}


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
        adapter: folder with lora_config.json.
        dtype: the type to store; None keeps that of each base tensor.

    Returns:
        The files of tensors.

    Raises:
        UserError: an adapter of another base or one that does not fit, or a damaged file.
    """
    config = check_adapter(adapter, LORA_CONFIG, base)
    pairs = read_adapter(adapter, config)
    sources = match(base)
    _check_fit(adapter, pairs, sources, base, int(config["r"]))
    scale = scaling(config)
    tensors = []
    for weight in base.family.weights(base.config):
        tensor, transpose = sources[weight.parameter]
        pair = pairs.get(weight.parameter.removesuffix(".weight"))
        tensors.append(_merged(weight, tensor, transpose, pair, scale, export_format, dtype or tensor.dtype))
    with atomic_directory(target) as staging:
        _write_companions(base, adapter, staging)
        files = write_model(staging, tensors, base.family, base.config, export_format, max_shard_bytes)
    return [target / file.name for file in files]


def _check_fit(
    adapter: Path,
    pairs: Mapping[str, Pair],
    sources: Mapping[str, tuple[LazyTensor, bool]],
    base: Checkpoint,
    rank: int,
) -> None:
    wrong = []
    for layer, (a, b) in pairs.items():
        source = sources.get(f"{layer}.weight")
        shape = stored_shape(*source) if source else None
        if shape is None:
            wrong.append(f"{layer} (the base has no such layer)")
        elif len(shape) != 2 or a.shape != (shape[0], rank) or b.shape != (rank, shape[1]):
            wrong.append(f"{layer} (A {list(a.shape)}, B {list(b.shape)}, rank {rank}, base {list(shape)})")
    if wrong:
        raise UserError(f"{adapter}: does not fit {base.name}; is it an adapter of another base? {some(wrong)}")


def _merged(
    weight: Weight,
    tensor: LazyTensor,
    transpose: bool,
    pair: Pair | None,
    scale: float,
    export_format: str,
    dtype: str,
) -> LazyTensor:
    """One tensor of the result; its values are computed when it is written."""

    def read() -> np.ndarray:
        values = tensor.read()
        if transpose:
            values = values.T
        if pair is None:
            return cast(values, dtype)
        a, b = (cast(half.read(), "float32") for half in pair)
        change = np.float32(scale) * (a @ b)
        change += cast(values, "float32")
        return cast(change, dtype)

    return stored_as(weight, export_format, dtype, stored_shape(tensor, transpose), read)


def _write_companions(base: Checkpoint, adapter: Path, folder: Path) -> None:
    """Tokenizer and chat template as they were in training (beside the adapter), else those of the base."""
    trained = any((adapter / name).is_file() for name in (TOKENIZER_JSON, *SENTENCEPIECE_FILES))
    source = adapter if trained else base.folder
    load_tokenizer(source, base.config).save(folder)
    ChatTemplate.load(source, default=base.family.chat_template).save(folder)
    generation = base.folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
