"""The weights of a LoRA adapter: pairs A [in, r] and B [r, out] of layers, read and checked. No Paddle."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from utils.adapters.check import LORA_CONFIG, adapter_weights
from utils.checkpoints.locate import Checkpoint
from utils.checkpoints.match import some, stored_shape
from utils.checkpoints.tensors import LazyTensor, open_tensors
from utils.errors import UserError, raise_if

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


def check_scale(file: Path, config: Mapping[str, Any]) -> None:
    """Raises `UserError` unless rank and alpha in an adapter's configuration are positive numbers."""
    wrong = [
        name for name in ("r", "lora_alpha") if not isinstance(config.get(name), (int, float)) or config[name] <= 0
    ]
    raise_if([f"{file}: {name} is missing or is no positive number" for name in wrong])


def read_pairs(folder: Path, config: Mapping[str, Any]) -> dict[str, Pair]:
    """The pairs of an adapter by the name of their layer, e.g. "llama.layers.0.self_attn.q_proj".

    Raises:
        UserError: a method that is not plain LoRA, tensors of other kinds, or halves of pairs.
    """
    file = folder / LORA_CONFIG
    used = [name for name in _OTHER_METHODS if config.get(name)]
    raise_if([f"{file}: {name} is set; such an adapter is more than W + scale * A B" for name in used])
    check_scale(file, config)
    path = adapter_weights(folder, LORA_CONFIG)

    def named() -> Iterable[tuple[str, tuple[str, str] | None, LazyTensor]]:
        for name, tensor in open_tensors(path).items():
            found = re.fullmatch(r"(.+)\.lora_([AB])", name)
            yield name, (found[1], found[2]) if found else None, tensor

    return pair_up(path, named())


def pair_up(path: Path, named: Iterable[tuple[str, tuple[str, str] | None, LazyTensor]]) -> dict[str, Pair]:
    """Puts halves together.

    Args:
        path: the file that they come from, for messages.
        named: name in the file; layer and "A" or "B", or None if it is no half; the tensor.

    Raises:
        UserError: tensors that are no halves, or halves without the other one.
    """
    halves: dict[str, dict[str, LazyTensor]] = {}
    others = []
    for name, place, tensor in named:
        if place is None:
            others.append(name)
        else:
            halves.setdefault(place[0], {})[place[1]] = tensor
    if others:
        raise UserError(f"{path}: holds tensors that are no LoRA pair of a layer of the model: {some(others)}")
    odd = [layer for layer, pair in halves.items() if len(pair) != 2]
    if odd or not halves:
        missing = some(odd) if odd else "every layer"
        raise UserError(f"{path}: not a whole adapter; lora_A or lora_B is missing for {missing}")
    return {layer: (pair["A"], pair["B"]) for layer, pair in halves.items()}


def check_fit(
    adapter: Path,
    pairs: Mapping[str, Pair],
    sources: Mapping[str, tuple[LazyTensor, bool]],
    base: Checkpoint,
    rank: int,
) -> None:
    """Compares the pairs of an adapter with the base's layers.

    Raises:
        UserError: layers that the base does not have or that have other shapes there; all are named.
    """
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
