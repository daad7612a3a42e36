"""LoRA adapters in files, ours or PEFT's: one description of what they compute, read and checked. No Paddle."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.adapters.check import LORA_CONFIG, adapter_weights, base_faults, read_config, value_faults
from utils.adapters.targets import matched, matrices, matrix_shapes
from utils.checkpoints.locate import Checkpoint
from utils.checkpoints.match import some
from utils.checkpoints.tensors import LazyTensor, open_tensors
from utils.errors import UserError, raise_if
from utils.settings import FLAG, TEXTS, Kind, Table, number, typed, whole

PEFT_CONFIG = "adapter_config.json"
FLOATS = ("float64", "float32", "float16", "bfloat16")
MAX_RANK = 2**31 - 1
RANK = whole(1, MAX_RANK)
ALPHA = number(0, 3e38, above=True)  # a float32 scale


def _no_parts(value: Any) -> None:
    if any(value if isinstance(value, list) else [value]):
        raise ValueError


_TABLE: Table = {
    "r": RANK,
    "lora_alpha": ALPHA,
    "rslora": FLAG,
    "lora_dropout": number(0, 1, below=True),
    "target_modules": TEXTS,
    "rank_pattern": {},
    "alpha_pattern": {},
    "enable_lora_list": Kind("null for every target; adapters of parts of a layer are not known here", _no_parts),
}
# Keys of PaddleNLP and of ours that say how an adapter was trained or is stored, and options of methods that are off.
_HARMLESS = {
    "base_fingerprint",
    "base_model_name_or_path",
    "dtype",
    "head_dim",
    "lora_plus_scale",
    "lorapro_scaling_factor",
    "lorapro_x_mode",
    "merge_weights",
    "mixer_num",
    "nola_basis_num",
    "scaling",
    "tensor_parallel_degree",
    "use_quick_lora",
}

Pair = tuple[LazyTensor, LazyTensor]  # lora_A [in, r] and lora_B [r, out]


@dataclass(frozen=True)
class LoraSettings:
    """What LoRA computes: W + scale * A B for every adapted layer.

    Attributes:
        rank, alpha: of the layers that `ranks` or `alphas` do not name.
        rslora: whether the scale is alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732) instead of alpha / rank.
        dropout: share of the inputs of A that training drops.
        targets: regular expressions over the full names of the adapted layers.
        ranks, alphas: of single layers, by full name.
    """

    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    ranks: Mapping[str, int] | None = None
    alphas: Mapping[str, float] | None = None

    def rank_of(self, layer: str) -> int:
        """r of A [in, r] and B [r, out]."""
        return (self.ranks or {}).get(layer, self.rank)

    def alpha_of(self, layer: str) -> float:
        """The numerator of the scale."""
        return (self.alphas or {}).get(layer, self.alpha)

    def scale_of(self, layer: str) -> float:
        """The factor on A B."""
        return self._scale(self.rank_of(layer), self.alpha_of(layer))

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def to_json(self) -> dict[str, Any]:
        """The keys of lora_config.json."""
        found: dict[str, Any] = {
            "r": self.rank,
            "lora_alpha": plain(self.alpha),
            "lora_dropout": self.dropout,
            "rslora": self.rslora,
            "target_modules": list(self.targets),
            "scaling": self._scale(self.rank, self.alpha),
        }
        patterns = {"rank_pattern": self.ranks, "alpha_pattern": self.alphas}
        return found | {
            name: {layer: plain(value) for layer, value in pattern.items()}
            for name, pattern in patterns.items()
            if pattern
        }


def plain(value: float) -> float:
    """A number as people write it: whole ones without a point."""
    return int(value) if float(value).is_integer() else value


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter that was read from a folder and fits its base.

    Attributes:
        folder: where it is.
        settings: what it computes.
        pairs: A and B by the full name of their layer, values not read.
        head: the layer among them that is the head of the model, or None.
    """

    folder: Path
    settings: LoraSettings
    pairs: dict[str, Pair]
    head: str | None = None

    def tensors(self) -> dict[str, LazyTensor]:
        """A and B by their names in our files and as parameters."""
        both = {layer: zip("AB", pair, strict=True) for layer, pair in self.pairs.items()}
        return {f"{layer}.lora_{letter}": half for layer, halves in both.items() for letter, half in halves}

    def of_layers(self, layers: Collection[str]) -> LoraAdapter:
        """The part of it that adapts these layers."""
        kept = {layer: pair for layer, pair in self.pairs.items() if layer in layers}
        return replace(self, pairs=kept, head=self.head if self.head in kept else None)


def read_lora(folder: str | Path, base: Checkpoint) -> LoraAdapter:
    """The adapter of a folder in our layout (which is PaddleNLP's) or in PEFT's; all its values are finite.

    Raises:
        UserError: no adapter, one of another base or of another method, or files that do not fit; every fault that
            can be told is.
    """
    from utils.adapters.peft_files import read_peft

    folder = Path(folder)
    if (folder / LORA_CONFIG).is_file():
        return _read(folder, base)
    if (folder / PEFT_CONFIG).is_file():
        return read_peft(folder, base)
    raise UserError(f"{folder}: is no LoRA adapter, it has neither {LORA_CONFIG} nor {PEFT_CONFIG}")


def _read(folder: Path, base: Checkpoint) -> LoraAdapter:
    file = folder / LORA_CONFIG
    config, faults = read_config(file, _TABLE, needed=("r", "lora_alpha"), harmless=_HARMLESS)
    given = config.get("target_modules") or []
    targets = tuple(dict.fromkeys([given] if isinstance(given, str) else given))
    faults += pattern_faults(file, "target_modules", targets)
    try:
        weights = adapter_weights(folder, LORA_CONFIG)
        pairs, wrong = pair_up(weights, _named(weights))
    except UserError as error:
        raise UserError([*faults, *error.faults]) from error
    ranks, wrong_ranks = _by_layer(file, "rank_pattern", config, RANK, pairs)
    alphas, wrong_alphas = _by_layer(file, "alpha_pattern", config, ALPHA, pairs)
    faults += wrong_ranks + wrong_alphas
    settings = LoraSettings(
        config.get("r", 1),
        config.get("lora_alpha", 1.0),
        config.get("rslora", False),
        config.get("lora_dropout", 0.0),
        targets,
        ranks,
        alphas,
    )
    other = base_faults(folder, config, base)
    if not other:
        if targets and not faults and not wrong:
            wrong += _target_faults(file, weights, targets, pairs, base)
        wrong += fit_faults(folder, None if faults else settings, pairs, base)
    raise_if([*faults, *other, *wrong])
    return LoraAdapter(folder, settings, pairs, head_of(pairs, base))


def _named(weights: Path) -> Iterable[tuple[str, tuple[str, str] | None, LazyTensor]]:
    for name, tensor in open_tensors(weights).items():
        found = re.fullmatch(r"(.+)\.lora_([AB])", name)
        yield name, (found[1], found[2]) if found else None, tensor


def _by_layer(
    file: Path, name: str, config: Mapping[str, Any], kind: Kind, layers: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """What a configuration says of single layers, by their full names, and what is wrong with it."""
    values = config.get(name) or {}
    found, faults = typed(dict.fromkeys(values, kind), values, str(file), f"{name}: ")
    others = [layer for layer in values if layer not in layers]
    return found, [*faults, *(f"{file}: {name}: {layer} is no layer that the adapter adapts" for layer in others)]


def pattern_faults(file: Path, name: str, patterns: Iterable[str]) -> list[str]:
    """Names the patterns that are no regular expressions."""
    faults = []
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            faults.append(f"{file}: {name}: {pattern!r} is no valid regular expression ({error})")
    return faults


def _target_faults(
    file: Path, weights: Path, targets: Sequence[str], pairs: Mapping[str, Pair], base: Checkpoint
) -> list[str]:
    """Compares the layers that the configuration names with those that the weights are of."""
    named = set(matched([*matrices(base), *pairs], targets))
    missing, beside = sorted(named - set(pairs)), [layer for layer in pairs if layer not in named]
    faults = [f"{weights}: has no weights for layers of target_modules: {some(missing)}"] if missing else []
    if beside:
        faults.append(f"{file}: target_modules does not name layers that have weights: {some(beside)}")
    return faults


def pair_up(
    path: Path, named: Iterable[tuple[str, tuple[str, str] | None, LazyTensor]]
) -> tuple[dict[str, Pair], list[str]]:
    """Puts halves together, and says what is none, lacks the other one or holds values that are not finite.

    Args:
        path: the file that they come from, for messages.
        named: name in the file; layer and "A" or "B", or None if it is no half; the tensor.
    """
    halves: dict[str, dict[str, LazyTensor]] = {}
    others, coded, numbers, faults = [], [], [], []
    for name, place, tensor in named:
        if place is None:
            others.append(name)
            continue
        halves.setdefault(place[0], {})[place[1]] = tensor
        if tensor.dtype in FLOATS:
            numbers.append((name, tensor))
        else:
            coded.append(f"{name} ({tensor.dtype})")
    if others:
        faults.append(
            f"{path}: holds tensors that are no LoRA pair of a layer of the model: {some(others)}; merge such an "
            "adapter into its base with the tool that trained it, and name the merged model"
        )
    if coded:
        faults.append(f"{path}: holds tensors that are no floating-point numbers: {some(coded)}")
    faults += value_faults(path, numbers)
    odd = [layer for layer, pair in halves.items() if len(pair) != 2]
    if odd or not halves:
        missing = some(odd) if odd else "every layer"
        faults.append(f"{path}: not a whole adapter; lora_A or lora_B is missing for {missing}")
    return {layer: (pair["A"], pair["B"]) for layer, pair in halves.items() if len(pair) == 2}, faults


def fit_faults(folder: Path, settings: LoraSettings | None, pairs: Mapping[str, Pair], base: Checkpoint) -> list[str]:
    """Compares pairs with the matrices of the base: layers that it does not have, other shapes, other ranks.

    Args:
        settings: None, if wrong themselves, takes the ranks of the pairs.
    """
    shapes, wrong, faults = matrix_shapes(base), [], []
    for layer, (a, b) in pairs.items():
        shape = shapes.get(layer)
        rank = max(a.shape[1:], default=0) if settings is None else settings.rank_of(layer)
        if shape is None and layer == base.architecture.head_layer:
            faults.append(
                f"{folder}: adapts {layer}, which {base.name} shares with its embedding; train it without {layer}, "
                "or merge it with the tool that trained it"
            )
        elif shape is None:
            wrong.append(f"{layer} (the base has no such layer)")
        elif a.shape != (shape[0], rank) or b.shape != (rank, shape[1]):
            wrong.append(f"{layer} (A {list(a.shape)}, B {list(b.shape)}, rank {rank}, base {list(shape)})")
    if wrong:
        faults.append(f"{folder}: does not fit {base.name}; is it an adapter of another base? {some(wrong)}")
    return faults


def head_of(pairs: Collection[str], base: Checkpoint) -> str | None:
    """The layer among them that is the head of the model."""
    return base.architecture.head_layer if base.architecture.head_layer in pairs else None
