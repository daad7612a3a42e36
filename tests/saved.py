"""Models and adapters of one process into folders, as a training run writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from utils.adapters.targets import matrix_shapes
from utils.checkpoints.fingerprint import fingerprint
from utils.checkpoints.locate import Checkpoint
from utils.checkpoints.tensors import safetensors_header, write_safetensors
from utils.parallel.process_group import ProcessGroup
from utils.partition.parts import Parts
from utils.partition.tensor import ShardPlan
from utils.training.saving import Saver
from utils.training.trained import Lora, Prefix, Trained


def save_trained(folder: Path, trained: Trained) -> None:
    """Writes the result of a training."""
    from contextlib import nullcontext

    folder.mkdir(parents=True, exist_ok=True)
    Saver(ProcessGroup()).save(lambda: nullcontext(folder), [trained.checkpoint_shard()], trained.describe)


def shard_plan(base: Checkpoint) -> ShardPlan:
    """All of a model."""
    return ShardPlan(Parts(base.family, base.config), ProcessGroup())


def save_lora(folder: Path, adapted: Any, base: Checkpoint) -> None:
    """Writes an adapter's folder."""
    save_trained(folder, Lora(base, shard_plan(base), adapted))


def save_prefix(folder: Path, prefix: Any, base: Checkpoint) -> None:
    """Writes a prefix's folder."""
    save_trained(folder, Prefix(base, shard_plan(base), prefix))


def spoil(file: Path, name: str, value: float) -> None:
    """Puts a value into one tensor of a safetensors file."""
    found, metadata = safetensors_header(file)
    values = {key: tensor.read().copy() for key, tensor in found.items()}
    values[name].flat[-1] = value
    write_safetensors(file, list(values.items()), metadata)


def write_lora(
    folder: Path,
    base: Checkpoint,
    layers: list[str] | None = None,
    *,
    rslora: bool = False,
    even: bool = False,
    spread: float = 0.15,
) -> Path:
    """Writes an adapter of our layout with random values, on all layers by default.

    Args:
        even: whether all layers have the same rank and alpha; else they differ.
        spread: standard deviation of the values.
    """
    shapes, random = matrix_shapes(base), np.random.default_rng(1)
    layers = list(shapes) if layers is None else layers
    ranks = {layer: 2 if even else 2 + place % 3 for place, layer in enumerate(layers)}
    alphas = {layer: 3 if even else 3 + place % 2 for place, layer in enumerate(layers)}
    tensors = []
    for layer in layers:
        rows, columns = shapes[layer]
        tensors.append((f"{layer}.lora_A", random.normal(0, spread, (rows, ranks[layer])).astype(np.float32)))
        tensors.append((f"{layer}.lora_B", random.normal(0, spread, (ranks[layer], columns)).astype(np.float32)))
    folder.mkdir(parents=True)
    write_safetensors(folder / "lora_model_state.safetensors", tensors, {"format": "np"})
    config = {
        **{"r": 2, "lora_alpha": 3, "rslora": rslora, "target_modules": layers},
        **{"rank_pattern": {layer: rank for layer, rank in ranks.items() if rank != 2}},
        **{"alpha_pattern": {layer: alpha for layer, alpha in alphas.items() if alpha != 3}},
        **{"base_model_name_or_path": str(base.folder), "base_fingerprint": fingerprint(base)},
    }
    (folder / "lora_config.json").write_text(json.dumps(config))
    return folder
