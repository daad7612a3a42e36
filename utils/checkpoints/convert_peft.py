"""LoRA adapters from and to the layout of Hugging Face PEFT:

    python -m utils.checkpoints.convert_peft --to-peft ADAPTER OUTPUT [--base MODEL]
    python -m utils.checkpoints.convert_peft --from-peft ADAPTER OUTPUT [--base MODEL]

PEFT keeps adapter_config.json and adapter_model.safetensors, with lora_A as [r, in] and lora_B as [out, r];
here it is lora_config.json and lora_model_state.safetensors, with [in, r] and [r, out].
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import signals

if __name__ == "__main__":
    signals.take()  # before the slow imports

import numpy as np

from utils.adapters.check import LORA_CONFIG, WEIGHTS
from utils.adapters.lora_files import PEFT_CONFIG, LoraAdapter, Pair, plain, read_lora
from utils.adapters.peft_files import PEFT_WEIGHTS, by_published, read_peft, short_names, transposed
from utils.adapters.targets import matrices
from utils.checkpoints.companions import has_tokenizer, write_companions
from utils.checkpoints.files import atomic_directory, write_json
from utils.checkpoints.fingerprint import fingerprint
from utils.checkpoints.locate import Checkpoint, locate
from utils.checkpoints.tensors import LazyTensor, cast, in_memory, write_lazy
from utils.errors import UserError, run_script
from utils.settings import read_json


def _base_of(folder: Path, config_name: str, base: Checkpoint | None) -> Checkpoint:
    """The base of an adapter: the one given, else the one that its configuration names."""
    file = folder / config_name
    if not file.is_file():
        others = [name for name in (LORA_CONFIG, PEFT_CONFIG) if (folder / name).is_file()]
        hint = "; it holds an adapter in the other layout" if others else ""
        raise UserError(f"{folder}: has no {config_name}{hint}")
    if base is not None:
        return base
    name = read_json(file).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise UserError(f"{file}: does not say which model it belongs to; name it with --base")
    try:
        return locate(name, allow_network=False)
    except UserError as error:
        raise UserError([*error.faults, f"{file}: its base cannot be used; name it with --base"]) from error


def _check_target(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise UserError(f"{target}: is there already; name a new folder")


def _joined(layers: Sequence[str], adapter: LoraAdapter) -> tuple[Pair, int, float]:
    """(A and B, rank, alpha) of one published layer from those of its parts, of which some may have none.

    Parts that share A keep it, as PEFT trains them. Others become blocks: A [in, ranks of all parts] and
    B [ranks of all parts, out].
    """
    settings, adapted = adapter.settings, [layer for layer in layers if layer in adapter.pairs]
    pairs = [adapter.pairs[layer] for layer in adapted]
    rank, alpha = settings.rank_of(adapted[0]), settings.alpha_of(adapted[0])
    if len(layers) == 1:
        return pairs[0], rank, alpha
    (a, b), scales = pairs[0], [settings.scale_of(layer) for layer in adapted]
    if len(adapted) == len(layers) and len(set(scales)) == 1 and _same([half for half, _ in pairs]):
        return (a, in_memory(b.name, np.concatenate([half.read() for _, half in pairs], axis=1))), rank, alpha
    ranks, width = [settings.rank_of(layer) for layer in adapted], b.shape[1]
    joined, row = np.zeros((sum(ranks), len(layers) * width), b.read().dtype), 0
    for layer, (_, half), own, scale in zip(adapted, pairs, ranks, scales, strict=True):
        values, column = half.read(), layers.index(layer) * width
        if scale != scales[0]:  # the layer has one scale
            values = cast(values, "float32") * np.float32(scale / scales[0])
        joined[row : row + own, column : column + width] = cast(values, b.dtype)
        row += own
    wider = sum(ranks) / rank
    alpha *= math.sqrt(wider) if settings.rslora else wider
    side_by_side = in_memory(a.name, np.concatenate([cast(half.read(), a.dtype) for half, _ in pairs], axis=1))
    return (side_by_side, in_memory(b.name, joined)), sum(ranks), alpha


def _same(tensors: Sequence[LazyTensor]) -> bool:
    return all(np.array_equal(tensor.read(), tensors[0].read()) for tensor in tensors)


def to_peft(adapter: Path, target: Path, base: Checkpoint | None = None) -> None:
    """Writes an adapter of this project (or of PaddleNLP) as a PEFT adapter folder.

    Args:
        base: the model that it belongs to; None is the one that its configuration names.

    Raises:
        UserError: no adapter, one of another base, a method that PEFT does not have, or `target` exists.
    """
    _check_target(target)
    base = _base_of(adapter, LORA_CONFIG, base)
    found = read_lora(adapter, base)
    settings, layers = found.settings, by_published(base)
    adapted = {name: _joined(parts, found) for name, parts in layers.items() if set(parts) & set(found.pairs)}
    targets, _ = short_names(adapted, layers)
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": settings.rank,
        "lora_alpha": plain(settings.alpha),
        "rank_pattern": {name: rank for name, (_, rank, _) in adapted.items() if rank != settings.rank},
        "alpha_pattern": {name: plain(alpha) for name, (_, _, alpha) in adapted.items() if alpha != settings.alpha},
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": any(matrices(base)[layers[name][0]].conv1d for name in adapted),
        "inference_mode": True,
    }
    tensors = [
        transposed(f"base_model.model.{name}.lora_{letter}.weight", half)
        for name, (pair, _, _) in adapted.items()
        for letter, half in zip("AB", pair, strict=True)
    ]
    _write(target, base, adapter, PEFT_WEIGHTS[0], tensors, "pt", PEFT_CONFIG, written)


def from_peft(adapter: Path, target: Path, base: Checkpoint | None = None) -> None:
    """Writes a PEFT LoRA adapter as an adapter of this project.

    Args:
        base: the model that it belongs to; None is the one that its configuration names.

    Raises:
        UserError: no PEFT LoRA adapter, one that does not fit the base, settings that are not known here, or `target`
            exists.
    """
    _check_target(target)
    base = _base_of(adapter, PEFT_CONFIG, base)
    found = read_peft(adapter, base)
    written = {
        **found.settings.to_json(),
        "base_model_name_or_path": base.name,
        "base_fingerprint": fingerprint(base),
    }
    tensors = [LazyTensor(name, half.dtype, half.shape, half.read) for name, half in found.tensors().items()]
    weights = f"{WEIGHTS[LORA_CONFIG]}.safetensors"
    _write(target, base, adapter, weights, tensors, "np", LORA_CONFIG, written)


def _write(
    target: Path,
    base: Checkpoint,
    adapter: Path,
    weights: str,
    tensors: Sequence[LazyTensor],
    layout: str,
    config_name: str,
    config: Mapping[str, Any],
) -> None:
    """Writes the folder of a converted adapter, with the tokenizer that stands beside the original."""
    with atomic_directory(target) as folder:
        write_lazy(folder / weights, tensors, {"format": layout})
        write_json(folder / config_name, config)
        if has_tokenizer(adapter, base.family):
            write_companions(base, adapter, folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m utils.checkpoints.convert_peft", description=__doc__)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to-peft", action="store_true", help="write the PEFT layout")
    direction.add_argument("--from-peft", action="store_true", help="read the PEFT layout")
    parser.add_argument("adapter", type=Path, help="folder of the adapter")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--base", help="the model that it belongs to; by default the one that the adapter names")
    run = parser.parse_args()
    base = locate(run.base) if run.base else None
    (to_peft if run.to_peft else from_peft)(run.adapter, run.output, base)
    print(f"adapter written to {run.output}")


if __name__ == "__main__":
    run_script(main)
