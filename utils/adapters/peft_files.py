"""LoRA adapters in the layout of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors. No Paddle.

There lora_A is [r, in] and lora_B [out, r], and layers have their published names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.adapters.check import read_config
from utils.adapters.lora_files import (
    ALPHA,
    PEFT_CONFIG,
    RANK,
    LoraAdapter,
    LoraSettings,
    Pair,
    fit_faults,
    head_of,
    pair_up,
    pattern_faults,
)
from utils.adapters.targets import matrices
from utils.checkpoints.locate import Checkpoint
from utils.checkpoints.match import part_of
from utils.checkpoints.tensors import LazyTensor, in_memory, open_tensors
from utils.errors import UserError, raise_if
from utils.settings import FLAG, TEXTS, Kind, Table, number, typed

PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_PLAIN = (True, False, "gaussian", "orthogonal", "eva")  # init_lora_weights that leave the base as it is


def _start(value: Any) -> Any:
    if value not in _PLAIN:
        raise ValueError
    return value


def _lora(value: Any) -> Any:
    if value != "LORA":
        raise ValueError
    return value


_TABLE: Table = {
    "peft_type": Kind("LORA, the only one that is known here", _lora),
    "r": RANK,
    "lora_alpha": ALPHA,
    "use_rslora": FLAG,
    "lora_dropout": number(0, 1, below=True),
    "target_modules": TEXTS,
    "rank_pattern": {},
    "alpha_pattern": {},
    "init_lora_weights": Kind(
        "true, false, gaussian, orthogonal or eva: other ways to start change the base; let PEFT write the adapter for "
        "the unchanged one (save_pretrained with path_initial_model_for_weight_conversion), or merge it",
        _start,
    ),
}
# Keys of PEFT and of tools around it that choose the layers, which the weights name, or say how the adapter was
# trained, and options of methods that are off. fan_in_fan_out follows from the base.
_HARMLESS = {
    "_name_or_path",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dtype",
    "lora_ga_config",
    "lorap_emb_lr",
    "lorap_lr_ratio",
    "megatron_core",
    "merge_weights",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}


def read_peft(folder: Path, base: Checkpoint) -> LoraAdapter:
    """The adapter of a PEFT folder, by the layer names of the Paddle model.

    Raises:
        UserError: as `read_lora`.
    """
    file = folder / PEFT_CONFIG
    weights = next((folder / name for name in PEFT_WEIGHTS if (folder / name).is_file()), None)
    config, faults = read_config(file, _TABLE, needed=("peft_type", "r", "lora_alpha"), harmless=_HARMLESS)
    for name, kind in (("rank_pattern", RANK), ("alpha_pattern", ALPHA)):
        values = config.get(name) or {}
        config[name], wrong = typed(dict.fromkeys(values, kind), values, str(file), f"{name}: ")
        faults += wrong + pattern_faults(file, name, values)
    if weights is None:
        faults.append(f"{folder}: has {PEFT_CONFIG} but neither {' nor '.join(PEFT_WEIGHTS)}")
        raise UserError(faults)
    layers = by_published(base)
    try:
        halves, wrong = pair_up(weights, _named(weights, layers, base.architecture.head_layer))
    except UserError as error:
        raise UserError([*faults, *error.faults]) from error
    sound = config if not faults else {"r": 1, "lora_alpha": 1.0, "rank_pattern": {}, "alpha_pattern": {}}
    settings, pairs = _by_layer(sound, halves, layers)
    settings = replace(settings, targets=layer_patterns(pairs, matrices(base)))
    raise_if([*faults, *wrong, *fit_faults(folder, None if faults else settings, pairs, base)])
    return LoraAdapter(folder, settings, pairs, head_of(pairs, base))


def by_published(base: Checkpoint) -> dict[str, list[str]]:
    """The layers that an adapter may change by the published name of their matrix: one, or the parts of a fused one."""
    found: dict[str, list[str]] = {}
    for layer, weight in matrices(base).items():
        found.setdefault(weight.published.removesuffix(".weight"), []).append(layer)
    return found


def _named(
    weights: Path, layers: Collection[str], head: str
) -> Iterator[tuple[str, tuple[str, str] | None, LazyTensor]]:
    for name, tensor in open_tensors(weights).items():
        found = _NAME.fullmatch(name)
        place = (found[1], found[2]) if found and (found[1] in layers or found[1] == head) else None
        yield name, place, transposed(name, tensor)


def transposed(name: str, tensor: LazyTensor) -> LazyTensor:
    """A tensor under another name and with its axes exchanged."""
    return LazyTensor(name, tensor.dtype, tensor.shape[::-1], lambda: np.ascontiguousarray(tensor.read().T))


def _by_layer(
    config: Mapping[str, Any], found: Mapping[str, Pair], layers: Mapping[str, Sequence[str]]
) -> tuple[LoraSettings, dict[str, Pair]]:
    """Settings and pairs by the layers of the Paddle model from pairs by published names."""
    start = LoraSettings(
        config["r"], config["lora_alpha"], config.get("use_rslora", False), config.get("lora_dropout", 0.0)
    )
    pairs: dict[str, Pair] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, pair in found.items():
        rank = _chosen(config["rank_pattern"], name, start.rank)
        alpha = _chosen(config["alpha_pattern"], name, start.alpha)
        parts = layers.get(name, (name,))
        for layer, part, own in zip(parts, *_divided(pair, len(parts), rank), strict=True):
            if own > 0:
                share = own / rank
                pairs[layer], ranks[layer] = part, own
                alphas[layer] = alpha * (math.sqrt(share) if start.rslora else share)
    settings = replace(
        start,
        ranks={layer: rank for layer, rank in ranks.items() if rank != start.rank},
        alphas={layer: alpha for layer, alpha in alphas.items() if not math.isclose(alpha, start.alpha, rel_tol=1e-12)},
    )
    return settings, pairs


def _chosen(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """The value of the first pattern that matches the last parts of a layer's name, as PEFT takes it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), default)


def _divided(pair: Pair, count: int, rank: int) -> tuple[list[Pair], list[int]]:
    """The pairs of the equal parts of a fused layer, and the rank of each.

    Parts share A and have their part of B. A row of zeros in a part of B does nothing: where parts with adapters of
    their own were written as one layer (`convert_peft`), each gets its own back, and one without has rank 0.
    """
    a, b = pair
    if count == 1 or len(b.shape) != 2:
        return [pair] * count, [rank] * count
    shared = [(a, part_of(b, (place, count), axis=-1)) for place in range(count)]
    used = [np.flatnonzero(half.read().any(axis=1)) for _, half in shared]
    if not any(len(rows) for rows in used) or a.shape[1:] != (rank,) or b.shape[0] != rank:
        return shared, [rank] * count
    cut = [
        (a, half) if len(rows) == rank else (_taken(a, rows, axis=1), _taken(half, rows, axis=0))
        for (_, half), rows in zip(shared, used, strict=True)
    ]
    return cut, [len(rows) for rows in used]


def _taken(tensor: LazyTensor, places: np.ndarray, axis: int) -> LazyTensor:
    return in_memory(tensor.name, tensor.read().take(places, axis=axis))


def layer_patterns(adapted: Collection[str], layers: Collection[str]) -> tuple[str, ...]:
    """Regular expressions for full names of adapted layers, short where the last parts of their names say which."""
    names, short = short_names(adapted, layers)
    return tuple(rf"(.*\.)?{name}" if short else re.escape(name) for name in names)


def short_names(adapted: Collection[str], layers: Collection[str]) -> tuple[list[str], bool]:
    """Last name parts, if they say which layers are adapted; else full names. And whether it is the first."""
    last = {layer.rsplit(".", 1)[-1] for layer in adapted}
    if {layer for layer in layers if layer.rsplit(".", 1)[-1] in last} == set(adapted):
        return sorted(last), True
    return sorted(adapted), False
