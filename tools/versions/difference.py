"""What two runs have written, and how far it lies apart."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from utils.checkpoints.tensors import read_tensors

Value = float | str | np.ndarray
Quantities = dict[str, Value]
# Figures that no two runs share, and the library's own, which nobody reads.
_OF_THE_CLOCK = re.compile(r"per_second|runtime|seconds|memory|_time|total_flos|time_")


@dataclass(frozen=True)
class Difference:
    """The largest difference between two runs.

    Attributes:
        worst: relative; infinite where a text differs or something is missing.
        where: the quantity it was found at, with both values.
        compared: how many quantities were compared.
    """

    worst: float = 0.0
    where: str = ""
    compared: int = 0

    def labelled(self, label: str) -> Difference:
        return replace(self, where=f"{label}: {self.where}" if self.where else "")


def largest(found: Iterable[Difference]) -> Difference:
    """Of several comparisons the one with the largest difference; it counts all of their quantities."""
    every = list(found)
    worst = max(every, key=lambda one: one.worst, default=Difference())
    return replace(worst, compared=sum(one.compared for one in every))


def apart(before: Value, after: Value) -> float:
    """The relative difference of two values; of a tensor the largest difference by its largest value.

    Two values that are not finite in the same way are equal.
    """
    if isinstance(before, str) or isinstance(after, str):
        return 0.0 if before == after else math.inf
    one, other = np.asarray(before), np.asarray(after)
    if one.shape != other.shape or one.dtype != other.dtype:
        return math.inf
    if np.array_equal(one, other, equal_nan=one.dtype.kind == "f"):
        return 0.0
    one, other = one.astype(np.float64), other.astype(np.float64)
    if not np.array_equal(np.isfinite(one), np.isfinite(other)):
        return math.inf
    far = np.nanmax(np.abs(np.where(np.isfinite(one), one - other, 0.0)))
    return float(far / max(np.nanmax(np.abs(one)), np.nanmax(np.abs(other))))


def compare(before: Mapping[str, Value], after: Mapping[str, Value]) -> Difference:
    """All quantities of the version before; what is new in the other one is no difference."""
    found = [Difference(apart(value, after[name]), name, 1) for name, value in before.items() if name in after]
    found += [Difference(math.inf, f"{name} is missing", 1) for name in before if name not in after]
    tensors = [one for one in found if isinstance(before.get(one.where), np.ndarray)]
    figures = [one for one in found if one not in tensors]
    worst = largest(found)
    # AdamW makes whole steps of the roundings of a gradient that is nearly zero: figures tell more than weights
    said = [told(one, before, after) for one in (largest(figures), largest(tensors)) if one.worst]
    return replace(worst, where="; ".join(said))


def told(found: Difference, before: Mapping[str, Value], after: Mapping[str, Value]) -> str:
    """A difference with its place, and of figures and texts both values."""
    name = found.where
    if name not in before:
        return name
    if isinstance(before[name], np.ndarray):
        return f"{name} by {found.worst:.0e}"
    return f"{name}: {before[name]!r} is now {after[name]!r}"


def of_rows(rows: Iterable[Mapping[str, object]], label: str) -> Quantities:
    """Every number and text of rows of figures, without those of the clock."""
    found: Quantities = {}
    for number, row in enumerate(rows):
        name = f"{label} {row.get('step', number)}"
        for key, value in row.items():
            if key == "step" or _OF_THE_CLOCK.search(key):
                continue
            if isinstance(value, str):
                found[f"{name} {key}"] = value
            elif isinstance(value, (int, float)):
                found[f"{name} {key}"] = float(value)
    return found


def of_training(output: Path, *, after_step: int = 0) -> Quantities:
    """Losses, gradient norms, rates and evaluations of every step, results, generated texts and weights of a run.

    Args:
        after_step: leaves out the steps up to this one.
    """
    state = json.loads((output / "trainer_state.json").read_text("utf-8"))
    found = of_rows((row for row in state["log_history"] if row.get("step", 0) > after_step), "step")
    for path in sorted(output.glob("*_results.json")):
        if path.name in ("eval_results.json", "predict_results.json"):
            found |= of_rows([json.loads(path.read_text("utf-8"))], path.stem)
    for path in sorted(output.rglob("*.jsonl")):
        found[path.relative_to(output).as_posix()] = path.read_text("utf-8")
    return found | of_weights(output)


def of_weights(folder: Path) -> Quantities:
    """Every tensor of the files of weights in a folder itself."""
    found: Quantities = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".pdparams"):
            found |= {f"{path.name} {name}": np.array(values) for name, values in read_tensors(path)}
    return found


def of_answers(path: Path) -> Quantities:
    """The answers of predictor.py, by the number of their prompt."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {f"answer {number}": str(row["output"]) for number, row in enumerate(rows)}
