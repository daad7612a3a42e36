"""Which checkpoint of a run is the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError


def note_best(state: Any, args: Any, folder: Path, metrics: dict[str, float] | None) -> None:
    """Notes in the trainer's state that a checkpoint is the best until now, if it is.

    Args:
        args: with metric_for_best_model and greater_is_better.
        metrics: of the evaluation of these weights, None without one.

    Raises:
        UserError: the evaluation does not measure that metric.
    """
    name = args.metric_for_best_model
    if metrics is None or name is None:
        return
    name = name if name.startswith("eval_") else f"eval_{name}"
    if name not in metrics:
        raise UserError(
            f"metric_for_best_model {name.removeprefix('eval_')}: this evaluation measures "
            f"{', '.join(sorted(k.removeprefix('eval_') for k in metrics))}"
        )
    best, value = state.best_metric, metrics[name]
    if not np.isfinite(value):
        return
    if best is None or (value > best if args.greater_is_better else value < best):
        state.best_metric, state.best_model_checkpoint = value, folder.name
