"""LoRA (Hu et al. 2021, arXiv:2106.09685), rsLoRA (arXiv:2312.03732) and LoRA+ (arXiv:2402.12354)."""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.adapters.check import LORA_CONFIG
from utils.adapters.fill import fill_parameters
from utils.adapters.lora_files import LoraAdapter, LoraSettings
from utils.adapters.targets import default_targets, matched, target_patterns
from utils.checkpoints.files import atomic_write
from utils.checkpoints.fingerprint import fingerprint
from utils.checkpoints.load import fill
from utils.checkpoints.locate import Checkpoint
from utils.checkpoints.match import some
from utils.errors import UserError
from utils.kernels.linear import Linear, LoraLinear, replace_layer
from utils.partition.tensor import ShardPlan

# What other toolchains know of an adapter and ours does not have; their readers ask for these keys.
_OTHER_SETTINGS: dict[str, Any] = {
    "do_qat": False,
    "enable_lora_list": None,
    "head_dim": None,
    "lora_use_mixer": False,
    "loraga": False,
    "merge_weights": False,
    "pissa": False,
    "trainable_bias": None,
    "trainable_modules": None,
    "use_mora": False,
}


@dataclass(frozen=True)
class Adapted:
    """A model with LoRA layers in it.

    Attributes:
        plus_scale: learning rate of B, in that of A (LoRA+).
        dtype: of A and B.
    """

    model: Any
    settings: LoraSettings
    plus_scale: float
    dtype: str


def add_lora(
    model: Any,
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    rslora: bool = False,
    lora_plus_scale: float = 1.0,
    linears: Sequence[str] | None = None,
    seed: int = 0,
    dtype: str | None = None,
    shard_plan: ShardPlan | None = None,
) -> Adapted:
    """Puts LoRA layers into `model` (in place) and freezes everything else.

    Args:
        rank: r of W + scale * A B.
        alpha: numerator of the scale (alpha / r, with rsLoRA alpha / sqrt(r)); None is 2 * rank.
        targets: layer names or regular expressions; None is all Linear layers inside of the transformer layers.
        lora_plus_scale: learning-rate ratio of B over A (LoRA+).
        linears: names of the Linear layers of the whole model, where `model` has some of them only.
        seed: of the values that A starts with.
        dtype: of the trained weights; that of `model` by default, in which layers compute in any case.
        shard_plan: what this rank holds of `model`, if not all.
    """
    if linears is None:
        found = [name for name, layer in model.named_sublayers() if isinstance(layer, Linear)]
        linears = [name for name in found if name != model.architecture.head_layer]
    patterns = target_patterns(linears, targets or default_targets(linears, model.architecture))
    settings = LoraSettings(rank, 2 * rank if alpha is None else alpha, rslora, dropout, tuple(patterns))
    adapted = _adapted(model, settings, matched(linears, patterns), lora_plus_scale, dtype, shard_plan)
    _draw(adapted, seed, shard_plan)
    return adapted


def _adapted(
    model: Any,
    settings: LoraSettings,
    layers: Collection[str],
    lora_plus_scale: float,
    dtype: str | None,
    shard_plan: ShardPlan | None,
) -> Adapted:
    """`model` with a LoRA layer in the place of those of `layers` that it has; everything else is frozen."""
    dtype = dtype or model.settings.dtype
    for parameter in model.parameters():
        parameter.stop_gradient = True
    wanted = set(layers)
    for name, layer in list(model.named_sublayers()):
        if name in wanted:
            change = LoraLinear(
                layer,
                settings.rank_of(name),
                settings.scale_of(name),
                dropout=settings.dropout,
                dtype=dtype,
                rate_of_b=lora_plus_scale,
            )
            replace_layer(model, name, change)
    return Adapted(model, settings, lora_plus_scale, dtype)


def _draw(adapted: Adapted, seed: int, shard_plan: ShardPlan | None) -> None:
    """Draws A of every layer anew, by the layer's name: it starts alike however processes share the layers.

    The distribution is the library's, Kaiming's uniform one with a = sqrt(5). B starts with zeros.
    """
    for name, parameter in lora_parameters(adapted).items():
        if not name.endswith("lora_A"):
            continue
        shape = tuple(parameter.shape) if shard_plan is None else shard_plan.parts.whole_shape(name, parameter.shape)
        bound = shape[0] ** -0.5
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = generator.uniform(-bound, bound, shape).astype(np.float32)
        fill(parameter, values if shard_plan is None else shard_plan.parts.cut(name, values))


def describe_lora(folder: Path, adapted: Adapted, base: Checkpoint) -> None:
    """Writes the `lora_config.json` that belongs beside the weights of `lora_parameters`."""
    config = {
        **_OTHER_SETTINGS,
        **adapted.settings.to_json(),
        "dtype": adapted.dtype,
        "lora_plus_scale": adapted.plus_scale,
        "use_quick_lora": not adapted.settings.dropout,
        "tensor_parallel_degree": -1,  # files hold whole tensors
        "base_model_name_or_path": base.name,
        "base_fingerprint": fingerprint(base),
    }
    atomic_write(folder / LORA_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def lora_parameters(adapted: Adapted) -> dict[str, Any]:
    """The weights of the LoRA layers, by their names in files."""
    return {n: p for n, p in adapted.model.named_parameters() if "lora_" in n.rsplit(".", 1)[-1]}


def restore_lora(adapted: Adapted, adapter: LoraAdapter, shard_plan: ShardPlan | None = None) -> None:
    """Fills the LoRA weights of `adapted` from an adapter with the same settings.

    Args:
        shard_plan: what this rank holds of them, if not all.

    Raises:
        UserError: weights that are missing, left over or of another shape, or layers with another scale.
    """
    ours, theirs = adapted.settings, adapter.settings
    others = [layer for layer in adapter.pairs if theirs.scale_of(layer) != ours.scale_of(layer)]
    if others:
        raise UserError(f"{adapter.folder}: was trained with another scale (alpha and rank) of {some(others)}")
    fill_parameters(lora_parameters(adapted), adapter.tensors(), adapter.folder, shard_plan)


def load_lora(
    model: Any,
    adapter: LoraAdapter,
    *,
    dropout: float = 0.0,
    lora_plus_scale: float = 1.0,
    dtype: str | None = None,
    shard_plan: ShardPlan | None = None,
) -> Adapted:
    """`model` with the LoRA layers of an adapter in it, weights filled, ready to run or train.

    Args:
        adapter: without one of the head, which no Linear of the model computes.
        dropout, lora_plus_scale: for further training; what the adapter was trained with is history.
        dtype: see `add_lora`.
        shard_plan: what this rank holds of `model`, if not all.
    """
    settings = replace(adapter.settings, dropout=dropout)
    adapted = _adapted(model, settings, adapter.pairs, lora_plus_scale, dtype, shard_plan)
    restore_lora(adapted, adapter, shard_plan)
    return adapted
