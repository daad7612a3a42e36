"""A run that was interrupted, in whatever way, goes on with the losses of the uninterrupted one."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from interrupted import interrupt, same_run
from tiny_runs import Result, Tiny, tensors, tiny, write_rows  # noqa: F401

# Everything at once that has a state: accumulation, packing, dropout, a warm-up, evaluation in between.
HARD = [
    *("--do_train", "--do_eval", "--intokens", "--max_length", 196, "--per_device_train_batch_size", 1),
    *(
        "--gradient_accumulation_steps",
        3,
        "--num_train_epochs",
        2,
        "--warmup_steps",
        4,
        "--lr_scheduler_type",
        "cosine",
    ),
    *("--evaluation_strategy", "steps", "--eval_steps", 3, "--save_strategy", "steps", "--save_steps", 3),
]
METHODS = {
    "sft": ["--learning_rate", 3e-3, "--neftune"],
    "lora": ["--lora", "--lora_dropout", 0.1],
    "prefix": ["--prefix_tuning", "--num_prefix_tokens", 4],
}


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    """Runs have them on the machine of these tests, also beside other tests: `same_run` has bounds for that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "2")
        yield


@pytest.fixture(scope="module")
def whole_runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:  # noqa: F811
    """The uninterrupted run of each method."""
    home = tmp_path_factory.mktemp("whole")
    return {name: tiny.run(home / name, *HARD, *options) for name, options in METHODS.items()}


def test_runs_have_epochs_of_several_steps(whole_runs: dict[str, Result]) -> None:
    """Keeps the other tests honest: checkpoints within the first and second epoch, and at an end."""
    epochs = {int(row["step"]): float(row["epoch"]) for row in whole_runs["lora"].curve}
    assert (epochs[3], epochs[6], epochs[9], epochs[12]) == (0.5, 1.0, 1.5, 2.0) and len(epochs) == 12
    assert len({len(run.losses) for run in whole_runs.values()}) == 1


@pytest.mark.parametrize(("method", "step"), [("lora", 3), ("lora", 6), ("lora", 9), ("sft", 9), ("prefix", 6)])
def test_losses_after_a_resume(
    tiny: Tiny,  # noqa: F811
    tmp_path: Path,
    whole_runs: dict[str, Result],
    method: str,
    step: int,
) -> None:
    """In the first epoch, at an epoch's end, and in the second epoch."""
    options = [*HARD, *METHODS[method]]
    interrupt(tiny, tmp_path, step, options)
    resumed = tiny.run(tmp_path, *options)
    assert f"continuing after step {step}" in resumed.err
    same_run(resumed, whole_runs[method])


def test_a_log_window_may_span_an_interruption(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    options = ["--do_train", "--lora", "--logging_steps", 4, "--save_steps", 3, "--num_train_epochs", 2]
    whole = tiny.run(tmp_path / "whole", *options)
    assert [row["step"] for row in whole.curve] == ["4", "8", "12", "14"]  # the last window is a short one
    interrupt(tiny, tmp_path / "cut", 6, options)
    resumed = tiny.run(tmp_path / "cut", *options)
    np.testing.assert_allclose(resumed.losses, whole.losses, atol=1e-6, rtol=0)
    assert resumed.json("train_results.json")["train_loss"] == pytest.approx(
        whole.json("train_results.json")["train_loss"], abs=1e-6
    )


# --- kill -9 in the middle of a save -----------------------------------------------------------------

KILL = """
import builtins, os, signal
true_open = builtins.open
def deadly_open(path, mode="r", *args, **kwargs):
    file = true_open(path, mode, *args, **kwargs)
    if "w" in mode and ".checkpoint-6.tmp" in str(path) and {name!r} in os.path.basename(str(path)):
        true_write = file.write
        class Half:
            def __getattr__(self, name): return getattr(file, name)
            def __enter__(self): return self
            def __exit__(self, *args): return file.__exit__(*args)
            def write(self, content):
                true_write(bytes(content)[: len(content) // 2])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        return Half()
    return file
builtins.open = deadly_open
"""


@pytest.mark.parametrize(("method", "name"), [("lora", "lora_model_state"), ("sft", "progress.json")])
def test_killed_while_saving(
    tiny: Tiny,  # noqa: F811
    tmp_path: Path,
    whole_runs: dict[str, Result],
    method: str,
    name: str,
) -> None:
    options = [*HARD, *METHODS[method]]
    killed = tiny.script(tmp_path, *options, code=KILL.format(name=name))
    assert killed.code == -signal.SIGKILL, killed.err
    leftovers = [path.name for path in tmp_path.glob(".checkpoint-6.tmp-*")]
    assert len(leftovers) == 1 and killed.checkpoints() == ["checkpoint-3"]
    resumed = tiny.run(tmp_path, *options)
    assert "continuing after step 3" in resumed.err
    same_run(resumed, whole_runs[method])
    assert not list(tmp_path.glob(".checkpoint-6.tmp-*"))  # cleared away


# --- signals -----------------------------------------------------------------------------------------

SLOW = """
import time
from utils import runtime
runtime.prepare()
runtime.prepare = lambda **_: None
runtime.load_paddle()
from utils.training.loop import Trainer
step = Trainer.forward_backward
def slow_step(self, *args, **kwargs):
    time.sleep(0.1)
    return step(self, *args, **kwargs)
Trainer.forward_backward = slow_step
"""


def test_a_signal_saves_and_says_so(tiny: Tiny, tmp_path: Path, whole_runs: dict[str, Result]) -> None:  # noqa: F811
    options = [*HARD, *METHODS["lora"]]
    process = tiny.start(tmp_path, *options, code=SLOW)
    table = tmp_path / "loss_curve.csv"
    deadline = time.monotonic() + 60
    while not (table.exists() and len(table.read_text().splitlines()) > 4):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "a checkpoint will be saved" in err and "the same command continues" in err
    assert "Traceback" not in err and "done:" not in out
    stopped = Result(tmp_path, 143, out, err)
    last = int(stopped.checkpoints()[-1][11:])
    assert last == int(stopped.curve[-1]["step"]) and last < 12
    assert f"stopped after step {last} of 12" in err
    assert not (tmp_path / "lora_model_state.safetensors").exists()
    resumed = tiny.run(tmp_path, *options)
    same_run(resumed, whole_runs["lora"])


AT_IMPORT = """
import builtins, signal
true_import = builtins.__import__
def sending(name, *args, **kwargs):
    if name == {module!r}:
        try:
            signal.raise_signal({number})
        except:
            pass
    return true_import(name, *args, **kwargs)
builtins.__import__ = sending
"""


@pytest.mark.parametrize(
    ("module", "number", "said"),
    [
        ("paddle", signal.SIGINT, "Ctrl-C"),
        ("paddle.vision", signal.SIGTERM, "SIGTERM"),  # within Paddle's own import
        ("utils.training.loop", signal.SIGTERM, "SIGTERM"),  # the model is loaded
    ],
)
def test_a_signal_before_the_first_step(
    module: str,
    number: signal.Signals,
    said: str,
    tiny: Tiny,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Libraries catch every exception, and Paddle has a handler that reports a crash."""
    code = AT_IMPORT.format(module=module, number=int(number))
    ended = tiny.script(tmp_path / "out", "--do_train", "--lora", "--max_steps", 1, code=code)
    assert ended.code == 128 + number, ended.err
    assert ended.err == f"note: ended by {said}\n"
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {".lock"}


def test_output_that_nobody_reads_any_more(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """`... | head`: the checkpoint is saved all the same."""
    process = tiny.start(tmp_path, "--do_train", "--lora", "--max_steps", 3000, "--save_strategy", "no")
    assert process.stdout is not None and process.stderr is not None
    assert "step 1/3000" in process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 141, err
    [checkpoint] = tmp_path.glob("checkpoint-*")
    assert f"stopped after step {checkpoint.name[11:]} of 3000" in err and "Traceback" not in err


def test_a_signal_while_the_result_is_written(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """Nothing else holds the work of the run: the result comes first."""
    from utils.training import finish

    def interrupted(*args: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return install(*args)

    options = ["--do_train", "--do_eval", "--lora", "--max_steps", 2, "--save_strategy", "no"]
    install = finish.install
    with mock.patch.object(finish, "install", interrupted):
        stopped = tiny.run(tmp_path, *options, expect=130)
    assert "its result is written" in stopped.err and not (tmp_path / "eval_results.json").exists()
    again = tiny.run(tmp_path, *options)
    assert "nothing is trained again" in again.err and again.json("eval_results.json")["eval_loss"] > 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_within_an_epoch_brings_no_early_end_of_it(
    tiny: Tiny,  # noqa: F811
    tmp_path: Path,
    number: int,
    code: int,
) -> None:
    """The loop ends the epoch when it stops: what belongs to a true end must not happen then."""
    from utils.training.loop import Trainer

    options = ["--do_train", "--do_eval", "--lora", "--num_train_epochs", 2, "--load_best_model_at_end"]
    options += ["--evaluation_strategy", "epoch", "--save_strategy", "epoch"]
    whole = tiny.run(tmp_path / "whole", *options)
    step = Trainer.forward_backward

    def step_with_signal(self: Trainer, *args: object, **kwargs: object) -> object:
        if self.state.global_step == 3:
            signal.raise_signal(number)
        return step(self, *args, **kwargs)

    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    with mock.patch.object(Trainer, "forward_backward", step_with_signal):
        stopped = tiny.run(tmp_path / "cut", *options, expect=code)
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before
    assert stopped.checkpoints() == ["checkpoint-4"] and "evaluation" not in stopped.out
    resumed = tiny.run(tmp_path / "cut", *options)
    same_run(resumed, whole)
    assert resumed.checkpoints() == ["checkpoint-4", "checkpoint-7", "checkpoint-14"]


def test_handlers_come_back_when_training_fails(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    interrupt(tiny, tmp_path, 3, [*HARD, "--lora"])
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


# --- streams -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_stream_goes_on_where_it_was(tiny: Tiny, tmp_path: Path, packed: bool) -> None:  # noqa: F811
    options = ["--do_train", "--lora", "--lora_dropout", 0.1, "--lazy", "--max_steps", 14, "--save_steps", 3]
    options += ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 3, "--max_length", 96]
    options += ["--intokens"] if packed else []
    whole = tiny.run(tmp_path / "whole", *options)
    assert len(whole.losses) == 14  # 84 rows or packs: more than one epoch of the 50 rows
    for step in (3, 12):
        interrupt(tiny, tmp_path / f"cut{step}", step, options)
        resumed = tiny.run(tmp_path / f"cut{step}", *options)
        np.testing.assert_allclose(resumed.losses, whole.losses, atol=1e-6, rtol=0)
    other = write_rows(tmp_path / "other" / "train.json", 49, seed=0).parent
    interrupt(tiny, tmp_path / "cut", 3, options)
    changed = tiny.run(tmp_path / "cut", *options, "--dataset_name_or_path", other, expect=2)
    assert "changed" in changed.err


# --- refusals and finished runs ----------------------------------------------------------------------


def test_a_half_written_checkpoint_is_ignored(tiny: Tiny, tmp_path: Path, whole_runs: dict[str, Result]) -> None:  # noqa: F811
    options = [*HARD, *METHODS["lora"]]
    interrupt(tiny, tmp_path, 6, options)
    later = tmp_path / "checkpoint-9"
    shutil.copytree(tmp_path / "checkpoint-6", later)
    weights = later / "lora_model_state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "checkpoint-12").mkdir()
    asked = tiny.run(tmp_path, *options, "--resume_from_checkpoint", later, expect=2)
    assert "no complete checkpoint" in asked.err
    resumed = tiny.run(tmp_path, *options)
    assert "checkpoint-9 is incomplete" in resumed.err and "continuing after step 6" in resumed.err
    same_run(resumed, whole_runs["lora"])


def test_a_changed_run_is_refused_before_weights_load(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    options = ["--do_train", "--lora", "--save_steps", 2, "--num_train_epochs", 2]
    interrupt(tiny, tmp_path, 2, options)
    files = sorted(path.name for path in tmp_path.rglob("*"))
    other = write_rows(tmp_path.parent / "other_rows" / "train.json", 50, seed=9).parent
    changes = {
        "other data": ["--dataset_name_or_path", other],
        "processes) = 8, now it is 4": ["--per_device_train_batch_size", 4],
        "lora_rank = 8, now it is 2": ["--lora_rank", 2],
        "seed": ["--seed", 1],
    }
    with mock.patch("utils.training.start.build", side_effect=AssertionError("weights would load")):
        for words, change in changes.items():
            refused = tiny.run(tmp_path, *options, *change, expect=2)
            assert words in refused.err and "--overwrite_output_dir" in refused.err
        two = tiny.run(tmp_path, *options, "--seed", 1, "--lora_rank", 2, expect=2)
        assert two.err.count("error:") == 3  # the default of lora_alpha follows the rank
        gone = tiny.run(tmp_path / "new", *options, "--resume_from_checkpoint", "true", expect=2)
        assert "holds no complete checkpoint" in gone.err and not gone.output.exists()
        anew = tiny.run(tmp_path, *options, "--resume_from_checkpoint", "false", expect=2)
        assert "checkpoint-2" in anew.err
    assert sorted(path.name for path in tmp_path.rglob("*")) == files


def test_a_finished_run_is_left_alone(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    options = ["--do_train", "--do_eval", "--lora", "--num_train_epochs", 1, "--save_strategy", "no"]
    first = tiny.run(tmp_path, *options).losses
    content = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with mock.patch("utils.training.start.build", side_effect=AssertionError("weights would load")):
        again = tiny.run(tmp_path, *options)
        assert "finished training of 7 steps" in again.err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == content
        changed = tiny.run(tmp_path, *options, "--lora_rank", 2, expect=2)
        assert "lora_rank = 8, now it is 2" in changed.err
        longer = tiny.run(tmp_path, *options, "--num_train_epochs", 2, expect=2)
        assert "without checkpoints" in longer.err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == content
    # killed after training, before its evaluation was done: only that is made up for
    (tmp_path / "eval_results.json").unlink()
    evaluated = tiny.run(tmp_path, *options)
    assert evaluated.json("eval_results.json") == json.loads(content[tmp_path / "eval_results.json"])
    assert "step 1/" not in evaluated.out
    anew = tiny.run(tmp_path, *options, "--lora_rank", 2, "--overwrite_output_dir")
    assert anew.json("lora_config.json")["r"] == 2
    assert anew.losses[0] == first[0] and anew.losses[-1] != first[-1]


def test_a_finished_run_may_become_longer(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    options = ["--do_train", "--lora", "--save_strategy", "epoch", "--lr_scheduler_type", "constant"]
    whole = tiny.run(tmp_path / "whole", *options, "--num_train_epochs", 2)
    tiny.run(tmp_path / "grown", *options, "--num_train_epochs", 1)
    grown = tiny.run(tmp_path / "grown", *options, "--num_train_epochs", 2)
    np.testing.assert_allclose(grown.losses, whole.losses, atol=1e-6, rtol=0)
    # the learning rate may change too, and counts from the first step on
    tiny.run(tmp_path / "changed", *options, "--num_train_epochs", 1)
    changed = tiny.run(tmp_path / "changed", *options, "--num_train_epochs", 2, "--learning_rate", 1e-3)
    assert [float(row["learning_rate"]) for row in changed.curve] == [1e-2] * 7 + [1e-3] * 7


def test_overwriting_removes_the_old_run_and_nothing_else(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    options = ["--do_train", "--lora", "--save_steps", 2, "--num_train_epochs", 1]
    tiny.run(tmp_path, *options)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-best").mkdir()
    anew = tiny.run(tmp_path, *options, "--save_steps", 5, "--overwrite_output_dir")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-best"}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    both = tiny.run(
        tmp_path, *options, "--overwrite_output_dir", "--resume_from_checkpoint", tmp_path / "checkpoint-5", expect=2
    )
    assert "would overwrite resume_from_checkpoint" in both.err
    assert (anew.output / "checkpoint-5").is_dir()


def test_a_run_never_overwrites_its_own_model(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    model = shutil.copytree(tiny.model, tmp_path / "model")
    refused = tiny.run(model, "--do_train", "--model_name_or_path", model, "--overwrite_output_dir", expect=2)
    assert "would overwrite model_name_or_path" in refused.err


# --- which checkpoints stay --------------------------------------------------------------------------


def test_the_best_and_the_newest_checkpoints_stay(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """A learning rate that ruins the model later makes an early checkpoint the best one."""
    options = ["--do_train", "--do_eval", "--lora", "--evaluation_strategy", "steps", "--eval_steps", 2]
    options += ["--save_steps", 2, "--save_total_limit", 1, "--max_steps", 12, "--load_best_model_at_end"]
    options += ["--metric_for_best_model", "accuracy", "--learning_rate", 3.0, "--warmup_steps", 12]
    run = tiny.run(tmp_path / "whole", *options)
    scores = {int(row["step"]): float(row["eval_accuracy"]) for row in run.curve if row["eval_accuracy"]}
    best = max(scores, key=lambda step: scores[step])
    assert best < 12, scores
    assert run.checkpoints() == [f"checkpoint-{best}", "checkpoint-12"]
    state = run.json("trainer_state.json")
    assert state["best_model_checkpoint"] == f"checkpoint-{best}" and state["best_metric"] == scores[best]
    final = tensors(run.output / "lora_model_state.safetensors")
    for name, value in tensors(run.output / f"checkpoint-{best}" / "lora_model_state.safetensors").items():
        np.testing.assert_array_equal(final[name], value)
    assert run.json("eval_results.json")["eval_accuracy"] == scores[best]
    # the best checkpoint is remembered by a run that was interrupted after it
    interrupt(tiny, tmp_path / "cut", best + 2, options)
    same_run(tiny.run(tmp_path / "cut", *options), run)


def test_a_best_checkpoint_that_was_removed_is_not_missed(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    options = ["--do_train", "--do_eval", "--lora", "--evaluation_strategy", "steps", "--eval_steps", 2]
    options += ["--save_steps", 2, "--max_steps", 6, "--load_best_model_at_end", "--greater_is_better", "true"]
    interrupt(tiny, tmp_path, 4, options)  # of the loss the greatest counts: the first is the best
    shutil.rmtree(tmp_path / "checkpoint-2")
    resumed = tiny.run(tmp_path, *options)
    assert "checkpoint-2, the best checkpoint until now, is not in" in resumed.err
    assert resumed.json("trainer_state.json")["best_model_checkpoint"] == "checkpoint-6"
