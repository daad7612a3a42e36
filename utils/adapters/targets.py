"""Which Linear layers LoRA adapts; names only, so that a wrong one is reported before weights load."""

from __future__ import annotations

import re
from collections.abc import Sequence

from utils.checkpoints.locate import Checkpoint
from utils.checkpoints.match import match, stored_shape
from utils.errors import UserError


def target_patterns(linears: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Regular expressions over full layer names for LoRA targets.

    A plain name stands for the layers whose last name part is exactly that ("dense" does not catch
    "dense_h_to_4h"); anything with other signs is a regular expression over the full name.

    Args:
        linears: full names of the Linear layers of the model.

    Raises:
        UserError: each target that matches no Linear layer, with the names that there are.
    """
    patterns, faults = [], []
    for target in targets:
        pattern = rf"(.*\.)?{target}" if re.fullmatch(r"\w+", target) else target
        try:
            found = any(re.fullmatch(pattern, name) for name in linears)
        except re.error as error:
            faults.append(f"lora_target_modules: {target!r} is no valid regular expression ({error})")
            continue
        if found:
            patterns.append(pattern)
        else:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
            faults.append(f"lora_target_modules: {target!r} matches no Linear layer; there are: {known}")
    if faults:
        raise UserError(faults)
    return patterns


def linear_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """[in, out] of every Linear layer of a checkpoint's decoder, by full name; reads no values."""
    linears, found = set(linear_names(checkpoint)), {}
    for parameter, (tensor, transpose) in match(checkpoint).items():
        if (name := parameter.removesuffix(".weight")) in linears:
            rows, columns = stored_shape(tensor, transpose)
            found[name] = (rows, columns)
    return found


def linear_names(checkpoint: Checkpoint) -> list[str]:
    """Full names of the Linear layers of a checkpoint's decoder, without the head: its rows are the vocabulary."""
    family = checkpoint.family
    linears = (weight.parameter for weight in family.weights(checkpoint.config) if weight.is_linear)
    return [name.removesuffix(".weight") for name in linears if name != f"{family.head}.weight"]


def adapted_shapes(checkpoint: Checkpoint, targets: Sequence[str] | None) -> dict[str, tuple[int, int]]:
    """[in, out] of the Linear layers that LoRA with these targets adapts (None: the family's).

    Raises:
        UserError: see `target_patterns`.
    """
    linears = linear_shapes(checkpoint)
    patterns = target_patterns(list(linears), targets or checkpoint.family.lora_targets)
    return {n: shape for n, shape in linears.items() if any(re.fullmatch(pattern, n) for pattern in patterns)}
