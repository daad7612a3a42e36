"""Runs that end without another word after a checkpoint, and what must be the same once they have been continued."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from tiny_runs import Result, Tiny, tensors


class Killed(BaseException):
    """Stands for a process that ends without another word."""


def stop_after(step: int) -> mock._patch:
    """Ends the run of this process as soon as checkpoint-STEP is complete."""
    from utils.training.loop import Trainer

    save = Trainer.save_checkpoint

    def save_and_end(self: Trainer, *args: object) -> None:
        save(self, *args)
        if self.state.global_step >= step:
            raise Killed

    return mock.patch.object(Trainer, "save_checkpoint", save_and_end)


def interrupt(tiny: Tiny, output: Path, step: int, options: list[object]) -> None:
    with stop_after(step), pytest.raises(Killed):
        tiny.run(output, *options)
    assert (output / f"checkpoint-{step}").is_dir()


def same_run(resumed: Result, whole: Result) -> None:
    """Losses to 1e-6, those of evaluations too, and everything else that the run leaves.

    Between two processes a sum in float32 may differ in its last digit: the math library adds up in
    another order where a buffer lies at another address. Weights are compared to 1e-6 in the root mean square, and to
    1e-5 each: AdamW divides a gradient by its own size, so that where it is almost zero its last digit counts.
    """
    assert [row["step"] for row in resumed.curve] == [row["step"] for row in whole.curve]
    np.testing.assert_allclose(resumed.losses, whole.losses, atol=1e-6, rtol=0)
    for column in ("learning_rate", "epoch"):
        assert [row[column] for row in resumed.curve] == [row[column] for row in whole.curve], column
    evaluated = [[float(row["eval_loss"] or "nan") for row in run.curve] for run in (resumed, whole)]
    np.testing.assert_allclose(*evaluated, atol=1e-6, rtol=0)  # the same steps are without one in both
    mine, wanted = resumed.json("all_results.json"), whole.json("all_results.json")
    for name in ("train_loss", "eval_loss", "train_tokens", "global_step"):
        assert mine[name] == pytest.approx(wanted[name], abs=1e-6), name
    states = [run.json("trainer_state.json") for run in (resumed, whole)]
    assert [(log["step"], "eval_loss" in log) for log in states[0]["log_history"]] == [
        (log["step"], "eval_loss" in log) for log in states[1]["log_history"]
    ]
    assert states[0]["best_metric"] == pytest.approx(states[1]["best_metric"], abs=1e-6)
    for name in ("best_model_checkpoint", "global_step"):
        assert states[0][name] == states[1][name]
    for path in whole.output.glob("*.safetensors"):
        for name, value in tensors(path).items():
            apart = np.abs(tensors(resumed.output / path.name)[name].astype(np.float64) - value)
            assert np.sqrt(np.mean(apart**2)) < 1e-6 and apart.max() < 1e-5, (path.name, name, apart.max())
