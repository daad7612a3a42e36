"""Hooks of our trainer into the library's loop."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from paddlenlp import trainer as library

from utils.training.plan import Plan
from utils.training.resume import STATE

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


def run_loop(owner: Trainer, plan: Plan) -> None:
    """The library's loop, to the last step of a plan.

    From a checkpoint of the last step the loop would take another one: then only the state is taken over.
    """
    if plan.start is None or plan.progress is None or plan.progress["global_step"] < plan.steps:
        owner.train(str(plan.start) if plan.start else None)
        return
    owner.trained.restore(plan.start)
    owner.state = library.TrainerState.load_from_json(str(plan.start / STATE))
    owner.state.max_steps = plan.steps
    owner.state.is_local_process_zero = owner.state.is_world_process_zero = owner.peers.first
    owner.callback_handler.on_train_begin(owner.args, owner.state, owner.control)
    owner.callback_handler.on_train_end(owner.args, owner.state, owner.control)
