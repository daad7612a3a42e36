"""Hooks of our trainer into the library's loop."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from paddlenlp import trainer as library

if TYPE_CHECKING:
    from utils.training.trainer import Trainer


class Boundaries(library.TrainerCallback):
    """Hooks into the library's loop at the places where exactness needs them."""

    def __init__(self, owner: Trainer) -> None:
        self.owner = owner

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.owner.continue_state()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.owner.evaluate_first and state.global_step == 0:
            started = time.monotonic()
            self.owner.evaluate()
            self.owner.window.pause(time.monotonic() - started)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.owner.restore_random_state()

    def on_optimizer_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.owner.weight_gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # the loop counts epochs from the batches of this process, wrong after a resume
        state.epoch = state.global_step / self.owner.steps_per_epoch
        if state.global_step >= state.max_steps and args.logging_strategy == library.IntervalStrategy.STEPS:
            control.should_log = True  # the last steps may not fill a logging window
