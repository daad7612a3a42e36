"""What users of the training scripts should know of their options before a run: what will have no effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from utils.parallel.topology import world_size

# What nobody sets who does not mean to train; others have a part in evaluation or calibration too.
_OF_TRAINING = (
    *("num_train_epochs", "max_steps", "learning_rate", "min_learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "neftune"),
)


def training(run: Any) -> Iterator[str]:
    """All of them, of a run whose dependent defaults are filled in."""
    yield from _nothing_trained(run)
    yield from _new_adapter(run)
    yield from _nothing_shared(run)


def _nothing_trained(run: Any) -> Iterator[str]:
    """Options of training in a run that was not told whether to train, and so does not."""
    given = [name for name in _OF_TRAINING if name in run.provided]
    if given and "do_train" not in run.provided:
        yield f"nothing is trained without do_train (add --do_train true); no effect have {', '.join(given)}"


def _new_adapter(run: Any) -> Iterator[str]:
    """An adapter that is neither read nor trained, and evaluated."""
    if run.do_train or not (run.do_eval or run.do_predict):
        return
    for switch, path, what in (
        ("lora", "lora_path", "a new adapter, which leaves the model as it is,"),
        ("prefix_tuning", "prefix_path", "a new prefix, which is random,"),
    ):
        if getattr(run, switch, False) and getattr(run, path) is None:
            yield f"{run.where(switch)} without {path} and do_train: {what} is evaluated; name a trained one as {path}"


def _nothing_shared(run: Any) -> Iterator[str]:
    """Sharding where no other process has the same part of the model."""
    parts = max(1, run.tensor_parallel_degree) * max(1, run.pipeline_parallel_degree)
    if run.sharding and world_size() <= parts:
        running = "one process" if world_size() == 1 else f"{world_size()} processes, each with its part of the model"
        yield f"{run.where('sharding')} has no effect in {running}; it takes {2 * parts} or more"
