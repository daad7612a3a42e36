"""Hooks of our trainer into the library's loop."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paddlenlp import trainer as library

from utils.data.stream import FileLost
from utils.errors import UserError
from utils.training.plan import Plan
from utils.training.resume import STATE, checkpoints, last_good

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

    Raises:
        UserError: a file of a stream has changed or gone.
    """
    if plan.start is None or plan.progress is None or plan.progress["global_step"] < plan.steps:
        try:
            owner.train(str(plan.start) if plan.start else None)
        except FileLost as error:
            raise UserError(f"{error}; {_kept(owner)}") from None
        return
    owner.trained.restore(plan.start)
    owner.state = library.TrainerState.load_from_json(str(plan.start / STATE))
    owner.state.max_steps = plan.steps
    owner.state.is_local_process_zero = owner.state.is_world_process_zero = owner.peers.first
    owner.callback_handler.on_train_begin(owner.args, owner.state, owner.control)
    owner.callback_handler.on_train_end(owner.args, owner.state, owner.control)


def _kept(owner: Trainer) -> str:
    """Saves the steps that a run has taken until its data went, and says what is there to continue from.

    One of several processes may be the only one that knows, and saving takes all of them: these keep what they have.
    Micro-batches of the step under way have drawn from the generators, so its dropout may be another one when it is
    taken again.
    """
    output, step = Path(owner.args.output_dir), owner.state.global_step
    if not owner.peers.several:
        owner.saver.settle()  # a checkpoint may be under way
        if step and f"checkpoint-{step}" not in [path.name for path in checkpoints(output)]:
            owner._save_checkpoint(owner.model)
            owner.saver.wait()
    return last_good(output)
