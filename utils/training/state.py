"""Where a training stands: what `trainer_state.json` holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError


@dataclass
class TrainerState:
    """
    Attributes:
        epoch: how often the training data has been seen; of a stream, the share of the run.
        global_step: optimizer steps taken, `max_steps` those of the whole run.
        consumed_samples: rows or packs of all ranks.
        log_history: every set of logged numbers, with its step.
        best_metric, best_model_checkpoint: of the best checkpoint until now, and its folder's name.
        is_local_process_zero, is_world_process_zero: whether this is the first rank.
        num_train_epochs: begun ones, those to come included.
        total_flos, trial_name, trial_params: never set; readers of the file expect them.
    """

    epoch: float | None = None
    global_step: int = 0
    consumed_samples: int = 0
    max_steps: int = 0
    num_train_epochs: int = 0
    total_flos: float = 0
    log_history: list[dict[str, float]] = field(default_factory=list)
    best_metric: float | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    trial_name: str | None = None
    trial_params: dict[str, Any] | None = None

    @classmethod
    def load(cls, file: Path) -> TrainerState:
        found = json.loads(file.read_text(encoding="utf-8"))
        return cls(**{one.name: found[one.name] for one in dataclasses.fields(cls) if one.name in found})

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def evaluated(self, step: int) -> dict[str, float] | None:
        """The metrics of an evaluation of the weights after a step; None if there was none."""
        for logs in self.log_history:
            found = {key: value for key, value in logs.items() if key.startswith("eval_")}
            if found and logs["step"] == step:
                return found
        return None

    def forget_best(self) -> None:
        """The best checkpoint is gone, or was measured by what no longer counts."""
        self.best_metric = self.best_model_checkpoint = None

    def note_best(
        self, checkpoint: str, metrics: Mapping[str, float] | None, name: str | None, greater_is_better: bool | None
    ) -> None:
        """Notes that a checkpoint is the best until now, if it is.

        Args:
            checkpoint: its folder's name.
            metrics: of the evaluation of these weights, None without one.
            name: the metric that decides; None for none.

        Raises:
            UserError: the evaluation does not measure that metric.
        """
        if metrics is None or name is None:
            return
        if (value := metrics.get(f"eval_{name}")) is None:
            measured = ", ".join(sorted(key.removeprefix("eval_") for key in metrics))
            raise UserError(f"metric_for_best_model {name}: this evaluation measures {measured}")
        if not np.isfinite(value):
            return
        best = self.best_metric
        if best is None or (value > best if greater_is_better else value < best):
            self.best_metric, self.best_model_checkpoint = value, checkpoint
