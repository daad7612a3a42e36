"""Which layers adapters adapt; names only, so that a wrong one is reported before weights load."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from utils.checkpoints.locate import Checkpoint
from utils.checkpoints.match import match, stored_shape
from utils.errors import UserError
from utils.model.architecture import Architecture
from utils.model.weights import Weight


def target_patterns(linears: Sequence[str], targets: Sequence[str], others: Collection[str] = ()) -> list[str]:
    """Regular expressions over full layer names for LoRA targets.

    A plain name stands for the layers whose last name part is exactly that ("dense" does not catch
    "dense_h_to_4h"); anything with other signs is a regular expression over the full name. One that would match
    `others` too becomes the names of its Linear layers.

    Args:
        linears: full names of the Linear layers of the model that LoRA adapts.
        others: full names of its other layers.

    Raises:
        UserError: each target that matches no Linear layer, with the names that there are.
    """
    patterns, faults = [], []
    for target in targets:
        pattern = _pattern(target)
        try:
            found = matched(linears, [pattern])
        except re.error as error:
            faults.append(f"lora_target_modules: {target!r} is no valid regular expression ({error})")
            continue
        if not found:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
            faults.append(f"lora_target_modules: {target!r} matches no Linear layer; there are: {known}")
        elif matched(others, [pattern]):
            patterns += [re.escape(name) for name in found]
        else:
            patterns.append(pattern)
    if faults:
        raise UserError(faults)
    return list(dict.fromkeys(patterns))


def _pattern(target: str) -> str:
    return rf"(.*\.)?{target}" if re.fullmatch(r"\w+", target) else target


def matched(names: Collection[str], patterns: Sequence[str]) -> list[str]:
    """Those of `names` that a regular expression matches as a whole."""
    return [name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)]


def matrices(checkpoint: Checkpoint) -> dict[str, Weight]:
    """The matrices that an adapter may change, by full layer name: of the Linear layers, and of the head.

    A head that is tied to the embedding has no matrix of its own. One that is no Linear has the layout of an
    embedding, [out, in]; all others are [in, out].
    """
    weights, head = checkpoint.family.weights(checkpoint.config), checkpoint.architecture.head
    found = [weight for weight in weights if weight.is_linear or weight.parameter == head]
    return {weight.parameter.rpartition(".")[0]: weight for weight in found}


def linear_names(checkpoint: Checkpoint) -> list[str]:
    """Full names of the Linear layers of a checkpoint's decoder, without the head: its rows are the vocabulary."""
    return [name for name in matrices(checkpoint) if name != checkpoint.architecture.head_layer]


def default_targets(linears: Sequence[str], architecture: Architecture) -> list[str]:
    """The last parts of the names of all Linear layers inside of the transformer layers: what LoRA adapts by default.

    Args:
        linears: full names of the Linear layers of the model.
    """
    inside = (name for name in linears if name.startswith(f"{architecture.layers}."))
    return list(dict.fromkeys(name.rpartition(".")[2] for name in inside))


def other_names(checkpoint: Checkpoint) -> list[str]:
    """Full names of all layers that hold parameters, inside or themselves, and are not among `linear_names`."""
    linears, found = set(linear_names(checkpoint)), {}
    for weight in checkpoint.family.weights(checkpoint.config):
        parts = weight.parameter.split(".")[:-1]
        found.update(dict.fromkeys(".".join(parts[:count]) for count in range(1, len(parts) + 1)))
    return [name for name in found if name not in linears]


def matrix_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """[in, out] of the matrices of a checkpoint, by full layer name; reads no values."""
    tensors, found = match(checkpoint), {}
    for name, weight in matrices(checkpoint).items():
        shape = stored_shape(*tensors[weight.parameter])
        if len(shape) == 2:  # what is no matrix is reported when the model loads
            found[name] = (shape[0], shape[1]) if weight.is_linear else (shape[1], shape[0])
    return found


def checkpoint_patterns(checkpoint: Checkpoint, targets: Sequence[str] | None) -> list[str]:
    """Regular expressions for the Linear layers, and them alone, that LoRA with these targets adapts (None: the
    family's).

    Raises:
        UserError: see `target_patterns`.
    """
    linears, architecture = linear_names(checkpoint), checkpoint.architecture
    return target_patterns(linears, targets or default_targets(linears, architecture), other_names(checkpoint))


def left_out(checkpoint: Checkpoint, targets: Sequence[str] | None) -> list[str]:
    """Full names of layers that the targets match and that LoRA does not adapt: the head, and what is no Linear."""
    return matched(other_names(checkpoint), [_pattern(target) for target in targets or ()])


def adapted_shapes(checkpoint: Checkpoint, targets: Sequence[str] | None) -> dict[str, tuple[int, int]]:
    """[in, out] of the Linear layers that LoRA with these targets adapts (None: the family's).

    Raises:
        UserError: see `target_patterns`.
    """
    shapes = matrix_shapes(checkpoint)
    return {name: shapes[name] for name in matched(linear_names(checkpoint), checkpoint_patterns(checkpoint, targets))}
