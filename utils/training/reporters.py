"""Where else the numbers go: VisualDL, TensorBoard, Weights & Biases, SwanLab, when installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from utils.errors import UserError

Report = Callable[[Mapping[str, float], int], None]

PACKAGES = {"visualdl": "visualdl", "tensorboard": "tensorboardX", "wandb": "wandb", "swanlab": "swanlab"}


def installed(name: str) -> bool:
    """Whether the package of a reporter is there."""
    return importlib.util.find_spec(PACKAGES[name]) is not None


def check_reporters(names: Sequence[str]) -> None:
    """Raises `UserError` for each named reporter whose package is not installed."""
    faults = [
        f"report_to {name}: the package {PACKAGES[name]} is not installed; pip install {PACKAGES[name]}"
        for name in names
        if name in PACKAGES and not installed(name)
    ]
    if faults:
        raise UserError(faults)


def _scalar_writer(writer: Any) -> Report:
    """A report over a SummaryWriter-like object (VisualDL and TensorBoard have the same two methods)."""

    def report(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return report


def open_reporter(name: str, log_dir: str, run_name: str, settings: dict[str, Any]) -> Report:
    """A function that sends named values of one step to the reporter."""
    if name == "visualdl":
        from visualdl import LogWriter  # type: ignore[import-untyped]

        return _scalar_writer(LogWriter(logdir=log_dir))
    if name == "tensorboard":
        from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

        return _scalar_writer(SummaryWriter(log_dir))
    module = importlib.import_module(PACKAGES[name])
    module.init(project="paddle-llm-toolchain", name=run_name, config=settings)
    return lambda values, step: module.log(dict(values), step=step)


def chart_name(key: str) -> str:
    """ "eval_loss" -> "eval/loss", "loss" -> "train/loss"."""
    return f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
