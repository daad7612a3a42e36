"""Ranks that are killed, hang or fail under tensor and pipeline parallel, and what is saved then."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from launching import Launched, start_launched
from many_runs import figures
from tiny_runs import Tiny, tiny  # noqa: F401

from utils.training.resume import checkpoints, step_of

LAYOUTS: dict[str, tuple[int, list[object]]] = {
    "TP2": (2, ["--tensor_parallel_degree", 2]),
    "PP2": (2, ["--pipeline_parallel_degree", 2]),
    "TP2 PP2": (4, ["--tensor_parallel_degree", 2, "--pipeline_parallel_degree", 2]),
}
SHARED = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4]
SFT = ["--do_train", "--learning_rate", 3e-3, "--lr_scheduler_type", "constant"]
# Runs a script whose training step does something on one rank; the waits are shorter than usual.
PREPARED = """
import os, runpy
from utils import runtime
runtime.prepare()
runtime.prepare = lambda **_: None
runtime.load_paddle()
from utils.errors import UserError
from utils.parallel import process_group
from utils.parallel.cpu import pairs
from utils.training.loop import Trainer
from utils.training.saving import Saver
process_group.STEP_SECONDS = pairs.WAIT_SECONDS = 20.0
RANK = int(os.environ.get("PADDLE_TRAINER_ID") or 0)
"""


def start(tiny: Tiny, output: Path, layout: str, *options: object, code: str | None = None) -> Launched:  # noqa: F811
    processes, shared = LAYOUTS[layout]
    words = tiny.arguments(output, [*SFT, *SHARED, *shared, *options])
    script = "finetune_generation.py"
    if code is not None:
        path = output.parent / f"{output.name}_script.py"
        path.write_text(f"{PREPARED}{code}\nrunpy.run_path('finetune_generation.py', run_name='__main__')\n")
        script = str(path)
    return start_launched(tiny, output, processes=processes, script=script, words=words)


def until(run: Launched, step: int, seconds: float = 120) -> None:
    """Waits until rank 0 has logged a step."""
    deadline = time.monotonic() + seconds
    while f"step {step}/" not in run.log(0):
        assert time.monotonic() < deadline and run.process.poll() is None, run.log(0)
        time.sleep(0.01)


def same(output: Path, alone: Path) -> None:
    ours, wanted = np.array(list(figures(output))), np.array(list(figures(alone)))
    np.testing.assert_allclose(ours, wanted, atol=1e-4, rtol=0)


heavy = pytest.mark.matrix


@pytest.mark.parametrize("layout", ["TP2", pytest.param("PP2", marks=heavy), pytest.param("TP2 PP2", marks=heavy)])
def test_a_killed_rank(layout: str, tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """Rank 1 is killed; the same command goes on as if nothing had happened."""
    saved = ["--max_steps", 10, "--save_strategy", "steps", "--save_steps", 2]
    run = start(tiny, tmp_path / "out", layout, *saved)
    until(run, 5)
    os.kill(run.worker(1), signal.SIGKILL)
    killed = run.wait()
    assert killed.code != 0 and killed.checkpoints()[-1] in ("checkpoint-4", "checkpoint-6", "checkpoint-8")
    assert "Traceback" not in run.log(0), run.log(0)
    again = start(tiny, tmp_path / "out", layout, *saved).wait()
    assert again.code == 0 and "continuing after step" in again.err, again.err
    alone = tiny.run(tmp_path / "alone", *SFT, "--max_steps", 10, "--save_strategy", "no")
    same(tmp_path / "out", alone.output)


@pytest.mark.parametrize("layout", ["PP2", pytest.param("TP2", marks=heavy), pytest.param("TP2 PP2", marks=heavy)])
def test_a_signal_to_the_launcher(layout: str, tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """All ranks save after the same step, and one process continues."""
    run = start(tiny, tmp_path / "out", layout, "--max_steps", 3000, "--save_strategy", "no")
    until(run, 5)
    run.process.send_signal(signal.SIGTERM)
    stopped = run.wait()
    assert len(stopped.checkpoints()) == 1, stopped.out + stopped.err
    [checkpoint] = stopped.checkpoints()
    step = int(checkpoint.rsplit("-", 1)[1])
    assert step >= 5 and f"stopped after step {step} of 3000" in stopped.err, stopped.err
    assert "Traceback" not in stopped.err
    options = [*SFT, "--max_steps", step + 2, "--save_strategy", "no"]
    continued = tiny.run(tmp_path / "out", *options)
    assert f"continuing after step {step}" in continued.err
    same(continued.output, tiny.run(tmp_path / "alone", *options).output)


FAILING = """
process_group.READ_SECONDS = 2.0  # rank 0 is still there when the launcher ends the others
step = Trainer.forward_backward
def failing(self, *args, **kwargs):
    if self.state.global_step == 2 and RANK == {rank}:
        raise UserError('row 7 is bad')
    return step(self, *args, **kwargs)
Trainer.forward_backward = failing
"""


@pytest.mark.parametrize(
    ("layout", "rank"),
    [("TP2", 1), *(pytest.param(*case, marks=heavy) for case in (("TP2", 0), ("PP2", 0), ("PP2", 1), ("TP2 PP2", 3)))],
)
def test_a_failing_rank(layout: str, rank: int, tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """One rank alone finds a fault while the others are in an exchange with it."""
    run = start(tiny, tmp_path / "out", layout, "--max_steps", 10, code=FAILING.format(rank=rank)).wait()
    assert run.code == 2, run.out + run.err
    assert "error: row 7 is bad" in run.out and "Traceback" not in run.err + run.out, run.out + run.err
    assert next(line for line in run.err.splitlines() if line.startswith("error:")) == "error: row 7 is bad"


SLOW_TO_END = """
process_group.SEEN_SECONDS = process_group.READ_SECONDS = 0.1  # rank 1 does not wait for rank 0
import time
from utils.training.callbacks import StopOnSignal
ended = StopOnSignal.release
def slowly(self):
    ended(self)
    if RANK == 0:
        time.sleep(1.5)  # the launcher looks every second
StopOnSignal.release = slowly
"""


def test_a_failing_rank_while_another_still_writes(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """Rank 0 draws its loss curve when the launcher, which has seen rank 1 end, sends it a signal."""
    code = (FAILING + SLOW_TO_END).format(rank=1)
    run = start(tiny, tmp_path / "out", "TP2", "--max_steps", 10, code=code).wait()
    assert run.code == 2, run.out + run.err
    assert "error: row 7 is bad" in run.err and "Traceback" not in run.err, run.err


@pytest.mark.matrix
@pytest.mark.parametrize("layout", ["TP2", "PP2"])
def test_a_rank_that_hangs(layout: str, tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """The others name the ranks of the exchange, or the one that is late."""
    run = start(tiny, tmp_path / "out", layout, "--max_steps", 3000, "--save_strategy", "no", code="")
    until(run, 5)
    os.kill(run.worker(1), signal.SIGSTOP)
    ended = run.wait(180)
    assert ended.code != 0
    first = next(line for line in run.log(0).splitlines() if line.startswith(("error:", "Traceback")))
    assert first.startswith("error:") and ("ranks 0, 1" in first or "rank 1 did not come" in first), run.log(0)
    assert "Traceback" not in run.log(0)


FULL = """
import errno
from utils.training import saving
write = saving.write_lazy
def full(path, *args):
    if RANK == {rank}:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write(path, *args)
saving.write_lazy = full
"""


@pytest.mark.matrix
@pytest.mark.parametrize(("rank", "background"), [(1, True), (0, False)])
def test_a_full_disk(rank: int, background: bool, tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    options = ["--max_steps", 3000, "--save_strategy", "steps", "--save_steps", 2, "--async_save", background]
    run = start(tiny, tmp_path / "out", "TP2", *options, code=FULL.format(rank=rank)).wait()
    assert run.code == 2, run.out + run.err
    said = [line for line in run.err.splitlines() if line.startswith("error:")]
    assert "checkpoint-2 could not be written: No space left on device" in said[0] and len(set(said)) == 1
    assert "Traceback" not in run.err and not run.checkpoints()


SLOW = """
import time
from utils.training import saving
write = saving.write_lazy
def slow(*args):
    time.sleep(2)
    write(*args)
saving.write_lazy = slow
"""


@pytest.mark.parametrize("layout", ["one", pytest.param("TP2", marks=heavy)])
def test_a_signal_while_a_checkpoint_is_written(layout: str, tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """Steps go on while it is written; it is finished, and that of the last step is written too."""
    options = ["--max_steps", 3000, "--save_strategy", "steps", "--save_steps", 10, "--async_save", "true"]
    output = tmp_path / "out"
    if layout == "one":
        process = tiny.start(output, *SFT, *options, code=PREPARED + SLOW)
        read = iter(process.stdout.readline, "")
        assert any("step 11/" in line for line in read) and not (output / "checkpoint-10").exists()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    else:
        run = start(tiny, output, layout, *options, code=SLOW)
        until(run, 11)
        assert not (output / "checkpoint-10").exists()
        run.process.send_signal(signal.SIGTERM)
        err = run.wait().err
    first, last = checkpoints(output)
    assert first.name == "checkpoint-10" and step_of(last) >= 11, err
    assert f"stopped after step {step_of(last)} of 3000" in err and "Traceback" not in err
