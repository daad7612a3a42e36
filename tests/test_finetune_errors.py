"""What goes wrong: mistakes end before anything slow starts, and numbers that are not finite before an update."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from tiny_models import write_tiny_llama
from tiny_runs import ROOT, Tiny, tensors, tiny, write_rows  # noqa: F401

from utils.data import stream

# --- numbers that are not finite ----------------------------------------------------------------------


def poisoned(step: int, quantity: str) -> mock._patch:
    """Makes one weight of the model NaN right before a step, or one gradient infinite in it."""
    import paddle

    from utils.training.loop import Trainer

    train = Trainer.forward_backward

    def poisoned_step(self: Trainer, batch: dict) -> None:
        parameter = next(p for p in self.model.parameters() if not p.stop_gradient)
        due = self.state.global_step == step - 1
        if due and quantity == "loss":
            parameter.set_value(paddle.full_like(parameter, np.nan))
        train(self, batch)
        if due and quantity == "gradient":
            with paddle.no_grad():
                parameter.grad.scale_(float("inf"))

    return mock.patch.object(Trainer, "forward_backward", poisoned_step)


@pytest.mark.parametrize("quantity", ["loss", "gradient"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_that_is_not_finite_is_not_taken(
    tiny: Tiny,  # noqa: F811
    tmp_path: Path,
    quantity: str,
    packed: bool,
) -> None:
    rows = "".join(json.dumps({"src": f"Say {n}", "tgt": f"{n} is said"}) + "\n" for n in range(6))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text("\n" + rows)  # the first row is on line 2
    options = ["--do_train", "--save_steps", 2, "--dataset_name_or_path", tmp_path / "data"]
    options += ["--max_steps", 6, *(["--intokens"] if packed else ["--per_device_train_batch_size", 2])]
    output = tmp_path / "out"
    with (
        poisoned(4, quantity),
        mock.patch("paddle.optimizer.AdamW.step", autospec=True, side_effect=paddle_step()) as updates,
    ):
        run = tiny.run(output, *options, expect=2)
    assert updates.call_count == 3
    assert f"the {quantity}" in run.err and "in step 4" in run.err and "the weights were not updated" in run.err
    assert "checkpoint-2 is the last good checkpoint" in run.err
    named = {line for line in range(2, 8) if f"train.json line {line}" in run.err}
    assert named == lines_of_step(tmp_path / "out", 4, packed)
    assert run.checkpoints() == ["checkpoint-2"]
    assert (output / "loss_curve.png").exists() and len(run.losses) == 3
    resumed = tiny.run(output, *options)
    assert "continuing after step 2" in resumed.err and resumed.code == 0


def paddle_step() -> object:
    import paddle

    return paddle.optimizer.AdamW.step


def lines_of_step(output: Path, step: int, packed: bool) -> set[int]:
    """Lines of train.json in a step, from the sampler's own definition (epochs of 3 steps of 2 rows; packs are
    steps of 8 packs at most, so all rows)."""
    if packed:
        return set(range(2, 8))
    epoch, place = divmod(step - 1, 3)
    order = np.random.Generator(np.random.PCG64([42, epoch])).permutation(6)
    return {int(number) + 2 for number in order[2 * place : 2 * place + 2]}


def test_a_huge_learning_rate_is_stopped(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    run = tiny.run(tmp_path, "--do_train", "--learning_rate", 1e30, "--max_grad_norm", 0, expect=2)
    assert "in step 2" in run.err and "no checkpoint had been saved yet" in run.err and "train.json line" in run.err
    assert not list(tmp_path.glob("*.safetensors"))


# --- mistakes that a look at arguments and files finds -------------------------------------------------

WITHOUT_PADDLE = """
import sys
sys.argv[0] = "finetune_generation.py"
sys.path.insert(0, ".")
import finetune_generation
from utils.errors import run_script
try:
    run_script(finetune_generation.main)
finally:
    assert "paddle" not in sys.modules and "paddlenlp" not in sys.modules, "Paddle was loaded"
"""


@pytest.fixture(scope="module")
def other_base(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A LoRA adapter and a prefix of another model of the same shape, in one folder each."""
    home = tmp_path_factory.mktemp("other")
    model = write_tiny_llama(home / "model", seed=8, hidden_size=64, intermediate_size=96, tie_word_embeddings=True)
    for kind in ("lora", "prefix"):
        options = ["--lora"] if kind == "lora" else ["--prefix_tuning", "--num_prefix_tokens", 2]
        tiny.run(home / kind, "--do_train", "--max_steps", 1, "--model_name_or_path", model, *options)
    return home


def mistakes(home: Path, data: Path, other: Path) -> dict[str, tuple[list[object], list[str]]]:
    """name -> (options, what the message says)."""
    broken = home / "broken"
    shutil.copytree(data, broken)
    lines = (broken / "train.json").read_text().splitlines()
    lines[2] = '{"src": "Say red", "tgt": '
    lines[6] = '{"src": "Say red"}'
    (broken / "train.json").write_text("\n".join(lines) + "\n")
    empty = home / "empty"
    empty.mkdir()
    (empty / "train.json").write_text("\n\n")
    train = ["--do_train"]
    return {
        "empty": ([*train, "--dataset_name_or_path", empty], ["empty"]),
        "no dev": ([*train, "--do_eval", "--dataset_name_or_path", empty], ["dev.json"]),
        "broken rows": ([*train, "--dataset_name_or_path", broken], ["train.json line 3", "train.json line 7"]),
        "unwritable": ([*train, "--output_dir", "/proc/out"], ["output_dir", "cannot be written"]),
        "both": ([*train, "--lora", "--prefix_tuning"], ["lora", "prefix_tuning", "exclude"]),
        "lengths": ([*train, "--src_length", 128], ["src_length"]),
        "lora of another base": ([*train, "--lora", "--lora_path", other / "lora"], ["another base"]),
        "prefix of another base": (
            [*train, "--prefix_tuning", "--prefix_path", other / "prefix"],
            ["another base"],
        ),
        "layers": ([*train, "--lora", "--lora_target_modules", "nothing"], ["'nothing' matches no Linear layer"]),
        "reporter": (
            [*train, "--report_to", "wandb,swanlab"],
            ["report_to wandb", "report_to swanlab", "not installed"],
        ),
        "untrained prefix": (["--do_eval", "--prefix_tuning"], ["prefix_path"]),
        "resume": ([*train, "--resume_from_checkpoint", data], ["no complete checkpoint"]),
    }


def test_mistakes_end_before_paddle_loads(tiny: Tiny, tmp_path: Path, other_base: Path) -> None:  # noqa: F811
    """Each in a process of its own, which fails if it has loaded Paddle or taken longer than a second."""
    for name, (options, messages) in mistakes(tmp_path, tiny.data, other_base).items():
        output = tmp_path / "out"
        command = [sys.executable, "-c", WITHOUT_PADDLE, *tiny.arguments(output, options)]
        found = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **tiny.environment}, capture_output=True, text=True, timeout=60
        )
        assert found.returncode == 2, (name, found.stderr)
        errors = [line for line in found.stderr.splitlines() if line.startswith("error:")]
        for message in messages:
            assert any(message in line for line in errors), (name, message, found.stderr)
        assert "Traceback" not in found.stderr and not found.stdout, name
        assert not output.exists(), name


def test_training_needs_no_dev_rows_and_evaluating_no_train_rows(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    only_train = write_rows(tmp_path / "train_only" / "train.json", 8).parent
    only_dev = write_rows(tmp_path / "dev_only" / "dev.json", 8).parent
    trained = tiny.run(tmp_path / "a", "--do_train", "--lora", "--dataset_name_or_path", only_train)
    assert not (trained.output / "eval_results.json").exists()
    evaluated = tiny.run(tmp_path / "b", "--do_eval", "--dataset_name_or_path", only_dev)
    names = [".lock", "all_results.json", "eval_results.json"]
    assert sorted(path.name for path in evaluated.output.iterdir()) == names


def test_a_failed_run_leaves_the_result_of_the_one_before(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """Weights in output_dir are replaced when training has ended, not when it begins."""
    first = tiny.run(tmp_path, "--do_train", "--lora", "--max_steps", 2)
    before = tensors(first.output / "lora_model_state.safetensors")
    with poisoned(3, "loss"):
        tiny.run(tmp_path, "--do_train", "--lora", "--max_steps", 4, "--overwrite_output_dir", expect=2)
    after = tensors(first.output / "lora_model_state.safetensors")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "finished.json").exists()


def test_rows_longer_than_the_models_positions_are_refused(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    data = tmp_path / "data"
    data.mkdir()
    row = json.dumps({"src": "Say red", "tgt": " ".join(["red"] * 900)})
    (data / "train.json").write_text(row + "\n", encoding="utf-8")
    options = ["--do_train", "--dataset_name_or_path", data, "--src_length", "64", "--max_length", "2000"]
    found = tiny.run(tmp_path / "out", *options, expect=2)
    assert found.code == 2, found.err
    assert "positions" in found.err and "max_length" in found.err
    assert not (tmp_path / "out").exists()


# --- streams -----------------------------------------------------------------------------------------


def test_rows_of_a_stream_that_nobody_can_read_cost_only_themselves(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """Behind the rows that are checked at the start."""
    file = write_rows(tmp_path / "data" / "train.json", 1005)
    long = '{"src": "Say red", "tgt": "red", "id": ' + "1" * 5000 + "}"
    rows = [long, '{"src": "a\\ud83d", "tgt": "b"}', "[" * 100_000]
    file.write_text(file.read_text("utf-8") + "\n".join([*rows, '{"src": "Say red", "tgt": "red"}']), "utf-8")
    options = ["--do_train", "--lora", "--lazy", "--max_steps", 33, "--per_device_train_batch_size", 32]
    options += ["--dataset_name_or_path", tmp_path / "data", "--save_strategy", "no", "--max_length", 80]
    with mock.patch.object(stream, "encode_row", wraps=stream.encode_row) as encoded:
        run = tiny.run(tmp_path / "out", *options, "--dataloader_num_workers", 2)
    assert len(run.losses) == 33
    assert encoded.call_count <= 2 * 1006  # two epochs; nothing is read for what only prefix tuning needs
    for line, said in ((1006, "holds a whole number"), (1007, "half of a surrogate"), (1008, "nested too deeply")):
        assert f"row left out: {file} line {line}: " in run.err and said in run.err
    assert f"3 rows: dropped, broken ({file} line 1006; {file} line 1007; " in run.err


def test_a_stream_whose_file_goes_ends_the_run(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """The steps until then are saved; the command continues there once the file is back."""
    file = write_rows(tmp_path / "data" / "train.json", 50)
    kept, output = file.read_bytes(), tmp_path / "out"
    options = ["--do_train", "--lora", "--lazy", "--dataset_name_or_path", tmp_path / "data"]

    def remove() -> None:
        curve = output / "loss_curve.csv"  # a line of names, then one for each step
        while not (curve.is_file() and len(curve.read_text().splitlines()) > 2) and not ended.is_set():
            time.sleep(0.01)
        file.unlink()

    ended = threading.Event()
    remover = threading.Thread(target=remove)
    remover.start()
    try:
        run = tiny.run(output, *options, "--max_steps", 100_000, expect=2)
    finally:
        ended.set()
        remover.join()
    assert "train.json: cannot be read any more (No such file or directory)" in run.err
    step = int(run.checkpoints()[-1].rsplit("-", 1)[1])
    assert f"give the same command again; {output / f'checkpoint-{step}'} is the last good checkpoint" in run.err
    file.write_bytes(kept)
    assert f"continuing after step {step}" in tiny.run(output, *options, "--max_steps", step + 2).err


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_data_is_raised_in_the_loop(workers: int) -> None:
    from utils.training.loader import Loader

    def collate(items: list[int]) -> dict[str, np.ndarray]:
        return {"items": np.array(items)}

    loader = Loader(range(5), [[0, 1], [2, 3], [4, 5]], collate, workers)
    batches = iter(loader)
    assert [next(batches)["items"].tolist() for _ in range(2)] == [[0, 1], [2, 3]] and len(loader) == 3
    with pytest.raises(IndexError):
        next(batches)
