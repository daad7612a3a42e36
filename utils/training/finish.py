"""The end of every training script: train as planned, leave the result, or say that it is there already."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.checkpoints.files import write_json
from utils.errors import notice
from utils.training.output import install, write_results
from utils.training.plan import Plan, clear_output, describe_evaluation, mark_finished
from utils.training.record import RESULTS, is_evaluated
from utils.training.resume import STATE

if TYPE_CHECKING:
    from utils.arguments import RunArguments
    from utils.training.loop import Trainer


def is_all_done(args: RunArguments, plan: Plan | None, data: Mapping[str, Any]) -> bool:
    """Whether an earlier run has left everything that this one would; says so where its training is finished."""
    if plan is None or not plan.finished:
        return False
    output = args.output
    although = f", although other options are given: {plan.differs}" if plan.differs else ""
    notice(
        f"{output} holds the finished training of {plan.finished_steps} steps, nothing is trained again{although}; "
        "to train anew give another output_dir, or --overwrite_output_dir"
    )
    for split, dataset in data.items():
        if split != "train" and not is_evaluated(output, split, describe_evaluation(args, dataset)):
            if (output / RESULTS[split]).is_file():
                notice(f"{output / RESULTS[split]} was made of other rows, settings or weights, and is made anew")
            return False
    print(f"done: {output}")
    return True


def train(trainer: Trainer, args: RunArguments, plan: Plan | None, companions: Callable[[Path], None]) -> None:
    """Trains and writes the result into output_dir, or takes the result that is there into the model.

    A training that a signal has stopped ends the process, with 128 and the number of the signal.

    Args:
        companions: writes what belongs beside weights.

    Raises:
        UserError: a loss or gradient that is not finite.
    """
    if plan is None:
        return
    output, processes = trainer.output, trainer.processes
    processes.alike(
        [plan.run, plan.steps, str(plan.start), plan.finished],
        f"the ranks of this run see different data, arguments or checkpoints in {output}; start every machine with "
        "the same command, on a file system that all of them share",
    )
    if plan.finished:
        trainer.take_result(output, plan.result_step)
        return
    if processes.first:
        clear_output(args)
    try:
        results = trainer.train_by(plan)
        if (number := trainer.signals.wanted) and trainer.state.global_step < plan.steps:
            notice(
                f"stopped after step {trainer.state.global_step} of {plan.steps}, its checkpoint is saved; "
                "the same command continues there"
            )
            sys.exit(128 + number)
        _write_result(trainer, args, plan, results, companions)
        trainer.signals.agree_among(processes)
    finally:
        trainer.signals.release()
    if number := trainer.signals.wanted:
        notice("the training is finished, its result is written; the same command does what is left")
        sys.exit(128 + number)


def _write_result(
    trainer: Trainer, args: RunArguments, plan: Plan, results: dict[str, float], companions: Callable[[Path], None]
) -> None:
    output, processes = trainer.output, trainer.processes
    if args.load_best_model_at_end and (best := trainer.load_best()):
        notice(f"the best checkpoint is {best}; its weights are the result")

    def beside(folder: Path) -> None:
        trainer.trained.describe(folder)
        companions(folder)
        write_json(folder / STATE, trainer.state.to_json())

    with trainer.whole_weights():
        checkpoint_shards = [trainer.trained.checkpoint_shard()]
        trainer.saver.save(lambda: install(output), checkpoint_shards, beside, target=output, background=False)
    if processes.first:
        if not args.skip_memory_metrics:
            from utils.training.callbacks import memory_gib  # loads Paddle

            results["train_memory_gib"] = memory_gib()
        write_results(output, "train", results)
        mark_finished(output, plan, trainer.state.global_step, trainer.weights_step)
    processes.barrier("waiting for rank 0 to write the result")
