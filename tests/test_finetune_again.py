"""A command that is given again, or into a folder that holds something: what is there is neither lost nor mistaken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from tiny_models import write_tiny_llama
from tiny_runs import ROOT, Result, Tiny, tensors, tiny, write_rows  # noqa: F401

LORA = ["--do_train", "--lora", "--max_steps", 2]


def no_weights() -> mock._patch:
    return mock.patch("utils.training.start.build", side_effect=AssertionError("weights would load"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- a model of another origin -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["model", "bin", "checkpoint", "own checkpoint"])
def test_a_model_of_another_origin_is_never_overwritten(kind: str, tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    output = tmp_path / "out"
    if kind == "model":
        write_tiny_llama(output)
    elif kind == "bin":
        output.mkdir()
        (output / "pytorch_model.bin").write_bytes(b"mine")
    elif kind == "checkpoint":
        write_tiny_llama(output / "checkpoint-2")
    else:
        tiny.run(tmp_path / "run", *LORA, "--save_steps", 2)
        output = tmp_path / "run" / "checkpoint-2"
    before = contents(output)
    for options in ([], ["--overwrite_output_dir"]):
        with no_weights():
            refused = tiny.run(output, *LORA, *options, expect=2)
        assert "give another folder" in refused.err and refused.err.count("error:") == 1
    assert contents(output) == before


def test_results_of_a_training_may_be_replaced(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """By another method too, also after a training that was cut short, and of a version that kept no record."""
    sft, lora = ["--do_train", "--max_steps", 1], [*LORA, "--overwrite_output_dir"]
    tiny.run(tmp_path, *sft)
    (tmp_path / "result.json").unlink()
    tiny.run(tmp_path, *lora)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["lora_model_state.safetensors"]
    with mock.patch("utils.training.finish.mark_finished", side_effect=KeyboardInterrupt):
        tiny.run(tmp_path, *sft, "--overwrite_output_dir", expect=130)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    tiny.run(tmp_path, *lora)
    write_tiny_llama(tmp_path, hidden_size=32)  # somebody else's model, beside the adapter
    assert "model.safetensors" in tiny.run(tmp_path, *lora, expect=2).err


def test_results_that_are_read_only_stay(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """Whatever of them a training would replace or remove; nothing is trained for it, and evaluating is allowed."""
    again = [*LORA, "--overwrite_output_dir"]
    tiny.run(tmp_path, *LORA, "--save_steps", 2)
    before = contents(tmp_path)
    names = ["lora_model_state.safetensors", "train_results.json", "checkpoint-2/optimizer.safetensors"]
    for name in names:
        (tmp_path / name).chmod(0o444)
    with no_weights():
        refused = tiny.run(tmp_path, *again, expect=2)
    assert sorted(refused.err.splitlines()[-3:]) == sorted(
        f"error: {tmp_path / name}: is read-only; chmod u+w allows to replace it" for name in names
    )
    assert contents(tmp_path) == before
    tiny.run(tmp_path, *LORA)
    for name in names:
        (tmp_path / name).chmod(0o644)
    tiny.run(tmp_path, *again)


# --- one run at a time -------------------------------------------------------------------------------

HOLD = """
import sys
from utils.arguments import FinetuneArguments, parse
from utils.parallel.topology import Layout
from utils.training.record import claim
args = parse(FinetuneArguments)
held = claim(args, Layout(), new=True)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_runs_never_share_an_output_folder(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    words = tiny.arguments(tmp_path / "out", LORA)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, *words], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with no_weights():
        refused = tiny.run(tmp_path / "out", *LORA, expect=2)
        assert "right now" in tiny.run(tmp_path / "out", "--do_eval", expect=2).err
    assert f"process {holder.pid} on " in refused.err and "is at work there right now" in refused.err
    tiny.run(tmp_path / "out", *LORA, "--dry_run")
    holder.kill()
    holder.communicate()
    tiny.run(tmp_path / "out", *LORA)


# --- finished, or not --------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [True, False])
def test_weights_that_are_gone_are_made_again(saved: bool, tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """From the last checkpoint, or by a new training."""
    options = [*LORA, "--save_strategy", *(["steps", "--save_steps", 2] if saved else ["no"])]
    first = tiny.run(tmp_path, *options)
    file = tmp_path / "lora_model_state.safetensors"
    before = tensors(file)
    file.unlink()
    again = tiny.run(tmp_path, *options)
    assert "lora_model_state.safetensors is not there any more" in again.err
    assert ("continuing after step 2" in again.err) is saved
    assert len(again.losses) == len(first.losses)
    for name, values in tensors(file).items():
        np.testing.assert_allclose(values, before[name], atol=1e-6)
    with no_weights():
        assert "nothing is trained again;" in tiny.run(tmp_path, *options).err
    file.write_bytes(file.read_bytes() + b" ")
    with no_weights():
        assert "is not the file that" in tiny.run(tmp_path, *options, expect=2).err


def test_what_differs_from_the_finished_run_is_said(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    options = [*LORA, "--do_eval", "--save_steps", 1]
    tiny.run(tmp_path, *options)
    changes = ["--learning_rate", 1e-3, "--save_strategy", "epoch", "--evaluation_strategy", "epoch"]
    with no_weights():
        again = tiny.run(tmp_path, *options, *changes)
        same = tiny.run(tmp_path, *options)
    assert "nothing is trained again, although other options are given: " in again.err
    for name in ("learning_rate 0.001 (was 0.01)", "save_strategy epoch (was steps)", "evaluation_strategy epoch"):
        assert name in again.err
    assert "although" not in same.err
    shorter = tiny.run(tmp_path, *options, "--max_steps", 1)
    assert "finished training of 2 steps" in shorter.err and "max_steps 1 (was 2)" in shorter.err
    longer = tiny.run(tmp_path, *options, "--max_steps", 3, "--learning_rate", 1e-3)
    assert "learning_rate 0.001 (was 0.01)" in longer.err and "count from its step on" in longer.err


def test_evaluations_are_repeated_when_what_they_are_made_of_changes(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    data = shutil.copytree(tiny.data, tmp_path / "data")
    output = tmp_path / "out"
    options = [*LORA, "--do_eval", "--do_predict", "--dataset_name_or_path", data]
    options += ["--save_strategy", "no", "--eval_max_new_tokens", 4]
    first = tiny.run(output, *options).json("eval_results.json")
    write_rows(data / "dev.json", 7, seed=5)
    again = tiny.run(output, *options)
    assert "step 1/" not in again.out and "made anew" in again.err
    second = again.json("eval_results.json")
    assert second["eval_loss"] != first["eval_loss"]
    fresh = tiny.run(tmp_path / "fresh", *options).json("eval_results.json")
    assert second["eval_loss"] == pytest.approx(fresh["eval_loss"], abs=1e-6)
    assert again.json("all_results.json")["eval_loss"] == second["eval_loss"]
    answered = tiny.run(output, *options, "--eval_with_do_generation")
    assert set(answered.json("eval_results.json")) == {"eval_bleu4", "eval_rouge1", "eval_rouge2", "eval_rougel"}
    before = (output / "predict_results.json").stat().st_mtime_ns
    with no_weights():
        tiny.run(output, *options, "--eval_with_do_generation")
    write_rows(data / "test.json", 3, seed=5)
    tiny.run(output, *options, "--eval_with_do_generation")
    assert (output / "predict_results.json").stat().st_mtime_ns > before
    # of the same result, but not known to be by the same settings
    tiny.run(output, "--do_eval", "--dataset_name_or_path", data, "--do_predict", "--lora", "--lora_path", output)
    assert "made anew" in tiny.run(output, *options, "--eval_with_do_generation").err


def test_evaluations_of_other_rows_are_not_compared(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """An interrupted run whose dev rows change: its best checkpoint was the best on others."""
    data, output = shutil.copytree(tiny.data, tmp_path / "data"), tmp_path / "out"
    options = ["--do_train", "--do_eval", "--lora", "--dataset_name_or_path", data, "--load_best_model_at_end"]
    options += ["--evaluation_strategy", "steps", "--eval_steps", 1, "--save_steps", 1, "--max_steps"]
    with mock.patch("utils.training.finish._write_result", side_effect=KeyboardInterrupt):
        tiny.run(output, *options, 2, "--greater_is_better", "true", expect=130)  # the first is the best
    again = tiny.run(output, *options, 3, "--greater_is_better", "true", "--per_device_eval_batch_size", 3)
    assert again.json("trainer_state.json")["best_model_checkpoint"] == "checkpoint-1"
    before = again.json("eval_results.json")["eval_loss"]
    (output / "finished.json").unlink()
    write_rows(data / "dev.json", 7, seed=5)
    fresh = tiny.run(output, *options, 3, "--greater_is_better", "true")
    assert "the best checkpoint is sought anew" in fresh.err
    assert fresh.json("trainer_state.json")["best_model_checkpoint"] is None
    assert fresh.json("eval_results.json")["eval_loss"] != before


# --- damaged files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", '{"global_step": 2}', "[1]", '{"run": ', "[" * 100_000])
def test_a_damaged_mark_of_a_finished_run(content: str, tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    output = tmp_path / "out"
    output.mkdir()
    (output / "finished.json").write_text(content)
    with no_weights():
        refused = tiny.run(output, *LORA, expect=2)
    assert "finished.json: is damaged" in refused.err and "remove it" in refused.err and "Traceback" not in refused.err


def test_damaged_files_of_a_run(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    options = [*LORA, "--do_eval", "--save_steps", 1]
    first = tiny.run(tmp_path, *options)
    for name in ("trainer_state.json", "all_results.json", "result.json", "arguments.json"):
        (tmp_path / name).write_text("{")
    again = tiny.run(tmp_path, *options)
    assert again.json("eval_results.json") == json.loads((first.output / "eval_results.json").read_text())
    assert "all_results.json was damaged" in again.err


@pytest.mark.parametrize("name", ["progress.json", "trainer_state.json"])
def test_a_damaged_checkpoint_is_ignored(name: str, tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """Its sizes are right, but what is in it cannot be read: the one before counts."""
    options = ["--do_train", "--lora", "--save_steps", 1]
    tiny.run(tmp_path, *options, "--max_steps", 2)
    file = tmp_path / "checkpoint-2" / name
    file.write_bytes(b"{" * file.stat().st_size)
    longer = tiny.run(tmp_path, *options, "--max_steps", 3)
    assert "checkpoint-2 is incomplete" in longer.err and "continuing after step 1" in longer.err


def test_a_run_that_was_cut_after_its_last_step(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """It takes no step more, and its figures are those of the whole run."""
    options = [*LORA, "--do_eval", "--save_steps", 1, "--lr_scheduler_type", "constant"]
    whole = tiny.run(tmp_path / "whole", *options)
    with mock.patch("utils.training.finish._write_result", side_effect=KeyboardInterrupt):
        tiny.run(tmp_path / "cut", *options, expect=130)
    again: Result = tiny.run(tmp_path / "cut", *options)
    assert "step 3/" not in again.out and again.checkpoints() == ["checkpoint-1", "checkpoint-2"]
    for name, values in tensors(whole.output / "lora_model_state.safetensors").items():
        np.testing.assert_array_equal(tensors(again.output / "lora_model_state.safetensors")[name], values)
    mine, wanted = again.json("all_results.json"), whole.json("all_results.json")
    assert (mine["global_step"], mine["train_tokens"]) == (2, wanted["train_tokens"])
    assert mine["eval_loss"] == pytest.approx(wanted["eval_loss"], abs=1e-6)
    assert mine["train_tokens_per_second"] == pytest.approx(mine["train_tokens"] / mine["train_runtime"])
