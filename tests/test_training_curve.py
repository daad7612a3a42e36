"""The loss curve: kept as well as the disk allows, and never the end of a training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from full_disk import full_disk
from tiny_runs import Tiny, tensors, tiny  # noqa: F401

from utils.training.curve import COLUMNS, LossCurve


def lines(curve: LossCurve) -> list[str]:
    return curve.table.read_text("utf-8").splitlines()


def test_a_full_disk_is_told_once_and_what_is_missing_comes_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curve = LossCurve(tmp_path)
    curve.start(0)
    with full_disk(150):
        for step in range(1, 20):
            curve.add(step, {"loss": 1 / step, "epoch": step / 7})
            curve.draw()
    said = capsys.readouterr().err
    assert said.count("note: ") == 1 and f"{tmp_path} cannot be kept (File too large)" in said
    assert not curve.picture.exists()
    curve.add(20, {"loss": 0.05})
    curve.add(21, {"loss": 0.04})
    curve.draw()
    assert lines(curve)[0] == ",".join(COLUMNS) and [int(line.split(",")[0]) for line in lines(curve)[1:]] == [
        *range(1, 22)
    ]
    assert curve.picture.exists() and sorted(path.name for path in tmp_path.iterdir()) == [
        "loss_curve.csv",
        "loss_curve.png",
    ]
    assert capsys.readouterr().err == ""


def test_a_folder_that_is_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    curve = LossCurve(tmp_path / "out")
    curve.start(0)
    curve.add(1, {"loss": 2.0})
    shutil.rmtree(tmp_path / "out")
    curve.add(2, {"loss": 1.0})
    assert [line.split(",")[0] for line in lines(curve)] == ["step", "1", "2"]


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"loss,epoch\n1,2\n", b"step,epoch\n1,0.5,7,8\n", b"step,loss\n1,2.0\n2,abc\n3"]
)
def test_a_damaged_table_is_no_obstacle(tmp_path: Path, content: bytes) -> None:
    curve = LossCurve(tmp_path)
    curve.table.write_bytes(content)
    curve.start(5)
    curve.add(6, {"loss": 1.0})
    curve.draw()
    assert [line.split(",")[0] for line in lines(curve)] == ["step", *(["1"] if b"abc" in content else []), "6"]


def test_training_goes_on_without_its_curve(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """A folder in the place of the picture, and a table that somebody protects."""
    (tmp_path / "loss_curve.png").mkdir()
    (tmp_path / "loss_curve.csv").write_text("mine")
    (tmp_path / "loss_curve.csv").chmod(0o444)
    run = tiny.run(tmp_path, "--do_train", "--lora", "--max_steps", 2, "--save_steps", 1)
    assert run.checkpoints() == ["checkpoint-1", "checkpoint-2"] and "done" in run.out
    assert run.err.count("the loss curve in") == 1
    assert (tmp_path / "loss_curve.csv").read_text() == "mine" and not list(tmp_path.glob(".*.tmp-*"))


def test_training_outlives_its_output_folder(
    tiny: Tiny,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is removed after the second step, with the checkpoint that was the best."""
    from utils.training.loop import Trainer

    step = Trainer.forward_backward

    def removing(self: Trainer, *args: Any, **options: Any) -> Any:
        if self.state.global_step == 2:
            shutil.rmtree(tmp_path / "out")
        return step(self, *args, **options)

    monkeypatch.setattr(Trainer, "forward_backward", removing)
    options = ["--do_train", "--do_eval", "--lora", "--max_steps", 4, "--evaluation_strategy", "steps"]
    options += ["--eval_steps", 1, "--save_steps", 1, "--load_best_model_at_end", "--greater_is_better", "true"]
    run = tiny.run(tmp_path / "out", *options)
    assert run.checkpoints() == ["checkpoint-3", "checkpoint-4"] and len(run.losses) == 4
    assert "checkpoint-1, the best checkpoint, is not in" in run.err
    last, result = (
        tensors(folder / "lora_model_state.safetensors") for folder in (run.output / "checkpoint-4", run.output)
    )
    assert all(np.array_equal(result[name], values) for name, values in last.items()) and result
