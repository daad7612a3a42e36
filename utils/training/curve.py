"""The loss curve that every run leaves in its output folder: numbers as CSV, the picture as PNG."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.checkpoints.files import atomic_file, atomic_write
from utils.errors import notice

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "tokens_per_second",
    "eval_loss",
    "eval_accuracy",
    "eval_bleu4",
)


class LossCurve:
    """Points of one run, kept in `loss_curve.csv`; `draw` makes `loss_curve.png` from them.

    Neither is worth a training: where they cannot be written, a notice says so once, and the next point tries again.
    """

    def __init__(self, folder: Path) -> None:
        self.table, self.picture = folder / "loss_curve.csv", folder / "loss_curve.png"
        self.points: list[dict[str, Any]] = []
        self._whole = False  # whether the table has all points
        self._said = False

    def start(self, step: int) -> None:
        """Begins the table; of an interrupted run, takes up the points up to `step`."""
        with self._trying():
            if step and self.table.is_file():
                self.points = [point for point in _read(self.table) if int(point["step"]) <= step]
            self._write()

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds what one log event measured and writes it to the table."""
        point = {"step": step, **{key: values[key] for key in COLUMNS if key in values}}
        if self.points and int(self.points[-1]["step"]) == step:
            self.points[-1] = {**self.points[-1], **point}
            self._whole = False
        else:
            self.points.append(point)
        with self._trying():
            if self._whole and self.table.is_file():
                with open(self.table, "a", encoding="utf-8") as file:
                    file.write(_lines([point]))
            else:
                self._write()

    def _write(self) -> None:
        atomic_write(self.table, ",".join(COLUMNS) + "\n" + _lines(self.points))
        self._whole = True

    @contextmanager
    def _trying(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._whole = False  # half a line may have been written
            if not self._said:
                said = error.strerror or str(error)
                notice(f"the loss curve in {self.table.parent} cannot be kept ({said}); training goes on")
            self._said = True

    def series(self, column: str) -> tuple[list[int], list[float]]:
        """Steps and values of the points that have this column."""
        found = [(int(p["step"]), float(p[column])) for p in self.points if p.get(column) not in (None, "")]
        return [step for step, _ in found], [value for _, value in found]

    def draw(self) -> None:
        """Writes the picture: training loss, its running mean, and evaluation loss over steps."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib.figure import Figure

        steps, losses = self.series("loss")
        if not steps:
            return
        figure = Figure(figsize=(7, 4), layout="tight")
        axes = figure.add_subplot()
        axes.plot(steps, losses, color="tab:blue", alpha=0.35, label="training loss")
        axes.plot(steps, running_mean(losses), color="tab:blue", label="running mean")
        eval_steps, eval_losses = self.series("eval_loss")
        if eval_steps:
            axes.plot(eval_steps, eval_losses, color="tab:orange", marker="o", label="evaluation loss")
        axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
        axes.grid(alpha=0.3)
        axes.legend()
        with self._trying(), atomic_file(self.picture) as file:
            figure.savefig(file, format="png", dpi=120)


def _read(table: Path) -> list[dict[str, Any]]:
    """The points of a table; a killed run may leave half a line."""
    with open(table, newline="", encoding="utf-8", errors="replace") as file:
        return [row for row in csv.DictReader(file) if _is_point(row)]


def _is_point(row: dict[Any, Any]) -> bool:
    """Whether a row of a table has a step, and numbers in all of its columns, which are known."""
    try:
        for text in row.values():
            if text != "":
                float(text)  # None where the row is too short, a list where it is too long
    except (TypeError, ValueError):
        return False
    return all(key in COLUMNS for key in row) and str(row.get("step")).isdigit()


def _lines(points: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n").writerows(points)
    return text.getvalue()


def running_mean(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential running mean without the bias towards zero at the start (Kingma & Ba 2015, section 3)."""
    means, total, mass = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        means.append(total / mass)
    return means
