"""LoRA adapters from and to the layout of Hugging Face PEFT:

    python -m utils.checkpoints.convert_peft --to-peft ADAPTER OUTPUT [--base MODEL]
    python -m utils.checkpoints.convert_peft --from-peft ADAPTER OUTPUT [--base MODEL]

PEFT keeps adapter_config.json and adapter_model.safetensors, with lora_A as [r, in] and lora_B as [out, r];
here it is lora_config.json and lora_model_state.safetensors, with [in, r] and [r, out].
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import signals

if __name__ == "__main__":
    signals.take()  # before the slow imports

import numpy as np

from utils.adapters.check import LORA_CONFIG, WEIGHTS, check_adapter
from utils.checkpoints.companions import has_tokenizer, write_companions
from utils.checkpoints.files import atomic_directory, write_json
from utils.checkpoints.fingerprint import fingerprint
from utils.checkpoints.locate import Checkpoint, locate
from utils.checkpoints.lora_pairs import Pair, check_fit, check_scale, pair_up, read_pairs, scaling
from utils.checkpoints.match import match, part_of
from utils.checkpoints.tensors import LazyTensor, open_tensors, write_lazy
from utils.errors import UserError, raise_if, run_script
from utils.families import Weight
from utils.settings import read_json

PEFT_CONFIG = "adapter_config.json"
_PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PEFT_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
# Settings of PEFT that change what an adapter computes and have no counterpart here.
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "alora_invocation_tokens",
)


def _base_of(config: Mapping[str, Any], file: Path, base: Checkpoint | None) -> Checkpoint:
    if base is not None:
        return base
    name = config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{file}: does not say which model it belongs to; name it with --base")
    try:
        return locate(str(name), allow_network=False)
    except UserError as error:
        raise UserError([*error.faults, f"{file}: its base cannot be used; name it with --base"]) from error


def _check_target(target: Path) -> None:
    if target.exists():
        raise UserError(f"{target}: is there already; name a new folder")


def _layers(base: Checkpoint) -> dict[str, list[Weight]]:
    """The matrices of all Linear layers by the published name of their layer, parts in order."""
    found: dict[str, list[Weight]] = {}
    for weight in base.family.weights(base.config):
        if weight.is_linear:
            found.setdefault(weight.published.removesuffix(".weight"), []).append(weight)
    return found


def _layer(weight: Weight) -> str:
    """The layer of the Paddle model that a matrix belongs to."""
    return weight.parameter.removesuffix(".weight")


def _targets(adapted: Collection[str], layers: Collection[str]) -> tuple[list[str], bool]:
    """Last name parts, if they say which layers are adapted; else full names. And whether it is the first."""
    last = {layer.rsplit(".", 1)[-1] for layer in adapted}
    if {layer for layer in layers if layer.rsplit(".", 1)[-1] in last} == set(adapted):
        return sorted(last), True
    return sorted(adapted), False


def _turned(name: str, tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(name, tensor.dtype, tensor.shape[::-1], lambda: np.ascontiguousarray(tensor.read().T))


@dataclass(frozen=True)
class _Fused:
    """The pairs of one published layer: one, or those of its adapted parts.

    Attributes:
        count: how many parts the layer has.
        parts: which of them are adapted, and their pairs.
    """

    count: int
    parts: dict[int, Pair]

    @classmethod
    def of(cls, weights: Sequence[Weight], pairs: Mapping[str, Pair]) -> _Fused:
        found = {place: pairs[_layer(weight)] for place, weight in enumerate(weights) if _layer(weight) in pairs}
        return cls(len(weights), found)

    def pair(self) -> Pair:
        """A [in, ranks of all parts] and B [ranks of all parts, out], whose blocks are the parts' own."""
        if self.count == 1:
            return self.parts[0]
        (a, b), ranks = next(iter(self.parts.values())), [half.shape[0] for _, half in self.parts.values()]

        def read_a() -> np.ndarray:
            return np.concatenate([half.read() for half, _ in self.parts.values()], axis=1)

        def read_b() -> np.ndarray:
            joined, row = np.zeros((sum(ranks), self.count * b.shape[1]), b.read().dtype), 0
            for place, (_, half) in self.parts.items():
                joined[row : row + half.shape[0], place * b.shape[1] : (place + 1) * b.shape[1]] = half.read()
                row += half.shape[0]
            return joined

        return (
            LazyTensor(a.name, a.dtype, (a.shape[0], sum(ranks)), read_a),
            LazyTensor(b.name, b.dtype, (sum(ranks), self.count * b.shape[1]), read_b),
        )


def to_peft(adapter: Path, target: Path, base: Checkpoint | None = None) -> None:
    """Writes an adapter of this project (or of PaddleNLP) as a PEFT adapter folder.

    Args:
        base: the model that it belongs to; None is the one that its configuration names.

    Raises:
        UserError: no adapter, one of another base, a method that PEFT does not have, or `target` exists.
    """
    _check_target(target)
    base = _base_of(read_json(adapter / LORA_CONFIG), adapter / LORA_CONFIG, base)
    config = check_adapter(adapter, LORA_CONFIG, base)
    pairs = read_pairs(adapter, config)
    check_fit(adapter, pairs, match(base), base, int(config["r"]))
    layers = _layers(base)
    found = {name: _Fused.of(weights, pairs) for name, weights in layers.items()}
    fused = {name: layer for name, layer in found.items() if layer.parts}
    targets, _ = _targets(fused, layers)
    alpha, rank = config["lora_alpha"], config["r"]
    wider = {name: len(layer.parts) for name, layer in fused.items() if len(layer.parts) > 1}
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        # a fused layer has the ranks of all its parts; its scale (alpha / r, or its root) is theirs
        "rank_pattern": {name: count * rank for name, count in wider.items()},
        "alpha_pattern": {
            name: alpha * (math.sqrt(count) if config.get("rslora") else count) for name, count in wider.items()
        },
        "lora_dropout": config.get("lora_dropout", 0.0),
        "use_rslora": bool(config.get("rslora")),
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": any(layers[name][0].conv1d for name in fused),
        "inference_mode": True,
    }

    def tensors() -> Iterator[LazyTensor]:
        for name, layer in fused.items():
            for letter, half in zip("AB", layer.pair(), strict=True):
                yield _turned(f"base_model.model.{name}.lora_{letter}.weight", half)

    with atomic_directory(target) as folder:
        write_lazy(folder / _PEFT_WEIGHTS[0], list(tensors()), {"format": "pt"})
        write_json(folder / PEFT_CONFIG, written)
        if has_tokenizer(adapter, base.family):
            write_companions(base, adapter, folder)


def from_peft(adapter: Path, target: Path, base: Checkpoint | None = None) -> None:
    """Writes a PEFT LoRA adapter as an adapter of this project.

    Args:
        base: the model that it belongs to; None is the one that its configuration names.

    Raises:
        UserError: no PEFT LoRA adapter, one that does not fit the base, settings without counterpart, or
            `target` exists.
    """
    _check_target(target)
    file = adapter / PEFT_CONFIG
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {config.get('peft_type')!r}; only LORA can be converted")
    faults = [f"{file}: {name} is set, which has no counterpart here" for name in _UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        faults.append(f"{file}: bias is {config['bias']!r}, which has no counterpart here")
    raise_if(faults)
    check_scale(file, config)
    base = _base_of(config, file, base)
    pairs = _read_peft(adapter, _layers(base))
    targets, short = _targets(pairs, [_layer(weight) for weights in _layers(base).values() for weight in weights])
    written = {
        "r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "lora_dropout": config.get("lora_dropout", 0.0),
        "rslora": bool(config.get("use_rslora")),
        "target_modules": [rf"(.*\.)?{name}" if short else re.escape(name) for name in targets],
        "base_model_name_or_path": base.name,
        "base_fingerprint": fingerprint(base),
    }
    written["scaling"] = scaling(written)
    check_fit(adapter, pairs, match(base), base, int(config["r"]))
    tensors = [
        LazyTensor(f"{layer}.lora_{letter}", half.dtype, half.shape, half.read)
        for layer, halves in pairs.items()
        for letter, half in zip("AB", halves, strict=True)
    ]
    with atomic_directory(target) as folder:
        write_lazy(folder / f"{WEIGHTS[LORA_CONFIG]}.safetensors", tensors, {"format": "np"})
        write_json(folder / LORA_CONFIG, written)
        if has_tokenizer(adapter, base.family):
            write_companions(base, adapter, folder)


def _read_peft(adapter: Path, layers: Mapping[str, Sequence[Weight]]) -> dict[str, Pair]:
    """The pairs of a PEFT adapter, turned, by the layer names of the Paddle model.

    The parts of a fused layer share its A and have their part of its B.
    """
    path = next((adapter / name for name in _PEFT_WEIGHTS if (adapter / name).is_file()), None)
    if path is None:
        raise UserError(f"{adapter}: has {PEFT_CONFIG} but neither {' nor '.join(_PEFT_WEIGHTS)}")

    def named() -> Iterator[tuple[str, tuple[str, str] | None, LazyTensor]]:
        for name, tensor in open_tensors(path).items():
            found = _PEFT_NAME.fullmatch(name)
            turned = _turned(name, tensor)
            if not found or found[1] not in layers:
                yield name, None, turned
                continue
            for weight in layers[found[1]]:
                part = weight.part if found[2] == "B" else None
                yield name, (_layer(weight), found[2]), part_of(turned, part, axis=-1)

    return pair_up(path, named())


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
