"""Data parallel: two real processes train as one that has all their rows."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from launching import launch, start_launched
from tiny_runs import Result, Tiny, tiny  # noqa: F401

from utils.errors import UserError
from utils.model.architecture import ModelShape
from utils.parallel.topology import Layout
from utils.training.sampler import EpochSampler

HALF = ["--per_device_train_batch_size", 4]


def equal(parallel: Result, alone: Result) -> None:
    """Losses, gradient norms and what is measured of the result."""
    assert len(alone.losses) >= 10
    np.testing.assert_allclose(parallel.losses, alone.losses, atol=1e-4, rtol=0)
    norms = [
        [log["grad_norm"] for log in run.json("trainer_state.json")["log_history"] if "grad_norm" in log]
        for run in (parallel, alone)
    ]
    assert len(norms[0]) == len(alone.losses)
    np.testing.assert_allclose(*norms, atol=1e-4, rtol=0)
    mine, wanted = parallel.json("all_results.json"), alone.json("all_results.json")
    for name in ("train_loss", "train_tokens", "eval_loss", "eval_accuracy"):
        assert mine[name] == pytest.approx(wanted[name], abs=1e-4), name


def uneven_rows(home: Path) -> Path:
    """51 rows, an odd number, whose answers are of 1 or of 40 words; returns their folder."""
    home.mkdir()
    for split, count in (("train", 51), ("dev", 7)):
        rows = [{"src": f"Say {n}", "tgt": " ".join(["river"] * (40 if n % 3 == 0 else 1))} for n in range(count)]
        (home / f"{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return home


def test_two_processes_train_as_one(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """SFT: uneven answers, accumulation, a last step with fewer rows than micro-batches, generation in evaluation."""
    options = ["--do_train", "--do_eval", "--learning_rate", 3e-3, "--num_train_epochs", 2, "--save_strategy", "no"]
    options += ["--dataset_name_or_path", uneven_rows(tmp_path / "rows")]
    alone = tiny.run(tmp_path / "alone", *options)
    both = launch(tiny, tmp_path / "both", *options, *HALF[:1], 2, "--gradient_accumulation_steps", 2)
    equal(both, alone)
    assert both.out.count("step 1/") == 1 and "step 1/" in both.err and both.err.count("step 1/") == 1
    ours, theirs = ({path.name for path in run.output.iterdir()} for run in (both, alone))
    assert ours == theirs


def test_a_killed_rank_ends_the_run_and_the_next_one_continues(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """LoRA with answers generated in evaluation; continued by two processes again, then by one."""
    options = ["--do_train", "--do_eval", "--lora", "--max_steps", 12, "--save_strategy", "steps", "--save_steps", 2]
    alone = tiny.run(tmp_path / "alone", *options)
    run = start_launched(tiny, tmp_path / "both", *options, *HALF)
    deadline = time.monotonic() + 60
    while "step 5/" not in run.log(0) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(run.worker(1), signal.SIGKILL)
    killed = run.wait()
    assert killed.code != 0 and not (killed.output / "finished.json").exists()
    equal(launch(tiny, killed.output, *options, *HALF), alone)


def test_a_signal_to_the_launcher_saves_and_one_process_continues(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    options = ["--do_train", "--do_eval", "--lora", "--max_steps", 300, "--save_strategy", "no"]
    run = start_launched(tiny, tmp_path / "both", *options, *HALF)
    deadline = time.monotonic() + 60
    while "step 5/" not in run.log(0) and time.monotonic() < deadline:
        time.sleep(0.01)
    run.process.send_signal(signal.SIGTERM)
    stopped = run.wait()
    [checkpoint] = stopped.checkpoints()
    step = int(checkpoint.rsplit("-", 1)[1])
    assert 5 <= step < 300 and f"stopped after step {step} of 300" in stopped.err
    continued = tiny.run(stopped.output, *options, "--max_steps", step + 2)
    assert f"continuing after step {step}" in continued.err
    refused = tiny.run(stopped.output, *options, "--max_steps", step + 4, *HALF, expect=2)
    assert "= 8, now it is 4" in refused.err


def test_a_failing_rank_ends_all_with_its_own_words(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """Rank 1 alone finds the fault, in the middle of training; rank 0 says it, once."""
    script = tmp_path / "failing.py"
    script.write_text(
        "import os, runpy\n"
        "from utils import runtime\n"
        "runtime.prepare()\n"
        "runtime.prepare = lambda **_: None\n"
        "runtime.load_paddle()\n"
        "from utils.errors import UserError\n"
        "from utils.training.loop import Trainer\n"
        "step = Trainer.forward_backward\n"
        "def failing(self, *args, **kwargs):\n"
        "    if self.state.global_step == 2 and os.environ['PADDLE_TRAINER_ID'] == '1':\n"
        "        raise UserError('row 7 is bad')\n"
        "    return step(self, *args, **kwargs)\n"
        "Trainer.forward_backward = failing\n"
        "runpy.run_path('finetune_generation.py', run_name='__main__')\n"
    )
    words = tiny.arguments(tmp_path / "out", ["--do_train", "--lora", *HALF])
    result = start_launched(tiny, tmp_path / "out", script=str(script), words=words).wait()
    assert result.code == 2, result.out
    assert result.err.count("error: row 7 is bad") == 1 and "Traceback" not in result.err
    assert "error: row 7 is bad" in result.out


# --- the layout ------------------------------------------------------------------------------------------


def arguments(**values: object) -> SimpleNamespace:
    defaults = {"tensor_parallel_degree": -1, "pipeline_parallel_degree": -1, "sharding": "", "device": "cpu"}
    defaults |= {
        "virtual_pp_degree": 1,
        "sharding_parallel_degree": -1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
    }
    return SimpleNamespace(**defaults | values, where=lambda name: name)


def test_ranks_are_numbered_from_tensor_parallel_outwards() -> None:
    asked = arguments(
        tensor_parallel_degree=2, pipeline_parallel_degree=2, sharding="stage1", sharding_parallel_degree=2
    )
    layout = Layout.of(asked, {"PADDLE_TRAINERS_NUM": "16", "PADDLE_TRAINER_ID": "5", "PADDLE_LOCAL_SIZE": "8"})
    assert (layout.data, layout.readers, layout.rank) == (2, 4, 5)
    assert [layout.coordinates(rank) for rank in (0, 1, 2, 4, 8, 15)] == [
        (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0), (1, 1, 1, 1)
    ]  # fmt: skip
    assert len({layout.coordinates(rank) for rank in range(16)}) == 16
    assert layout.global_batch(asked) == 24
    assert {layout.reader(rank) for rank in range(16)} == {0, 1, 2, 3}


def test_layouts_that_cannot_be() -> None:
    with pytest.raises(UserError, match="does not divide the 3 processes"):
        Layout.of(arguments(tensor_parallel_degree=2), {"PADDLE_TRAINERS_NUM": "3"})
    with pytest.raises(UserError, match="write gpu"):
        Layout(world=8, tensor=2, pipeline=2).check_device(arguments(device="gpu:1"))
    shape = ModelShape(
        layers=2, hidden=48, heads=6, kv_heads=2, head_dim=8, intermediate=12, vocabulary=9, positions=9, tied=True
    )
    Layout(world=6, tensor=6, pipeline=1).check_model(shape)  # key-value heads are repeated
    for layout, words in (
        (Layout(tensor=4), "6 attention heads"),
        (Layout(pipeline=3), "2 layers"),
    ):
        with pytest.raises(UserError, match=words):
            layout.check_model(shape)


@pytest.mark.parametrize(("ranks", "accumulation", "batch"), [(1, 1, 12), (2, 1, 6), (2, 3, 2), (4, 3, 1), (12, 1, 1)])
def test_every_layout_has_the_same_rows_in_a_step(ranks: int, accumulation: int, batch: int) -> None:
    rows = range(29)
    samplers = [EpochSampler(rows, batch, accumulation, seed=3, ranks=ranks, rank=rank) for rank in range(ranks)]
    assert {len(sampler) for sampler in samplers} == {3 * accumulation}
    order = EpochSampler(rows, 12, 1, seed=3).batches(1)
    for step in range(3):
        parts = [s.batches(1)[step * accumulation : (step + 1) * accumulation] for s in samplers]
        seen = sorted(row for part in parts for one in part for row in one if row >= 0)
        assert seen == sorted(order[step])
