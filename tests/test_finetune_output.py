"""What a run says while it goes on, and what it leaves behind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from tiny_runs import Result, Tiny, tensors, tiny  # noqa: F401

from utils.training.output import write_results

LINE = re.compile(
    r"step (\d+)/(\d+)  epoch (\d+\.\d\d)  loss (\d+\.\d{4})  lr (\d\.\d\de[+-]\d\d)  (\d+) tokens/s  "
    r"effective (\d+\.\d)%  memory (\d+\.\d\d) GiB  ETA \d\d:\d\d"
)
EVALUATION = re.compile(r"evaluation at step (\d+): loss (\d+\.\d{4})  ppl (\d+\.\d{4})  accuracy (\d+\.\d{4})")


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Result:  # noqa: F811
    """The real script, as a user starts it, with everything that it can show."""
    options = ["--do_train", "--do_eval", "--lora", "--num_train_epochs", 2, "--logging_steps", 4]
    options += ["--evaluation_strategy", "epoch", "--save_strategy", "epoch", "--load_best_model_at_end"]
    options += ["--disable_tqdm", "false", "--report_to", "visualdl,tensorboard", "--fp16"]
    return tiny.script(tmp_path_factory.mktemp("finished") / "out", *options)


def test_output_is_ours_alone(finished: Result) -> None:
    """No warning, log line or banner of a library on either stream."""
    assert finished.code == 0, finished.err
    lines = finished.out.splitlines()
    assert all(LINE.fullmatch(line) or EVALUATION.fullmatch(line) for line in lines[:-1]), lines
    assert lines[-1] == f"done: {finished.output}"
    for line in re.split(r"[\r\n]+", finished.err):
        assert not line.strip() or line.startswith("note: ") or line.lstrip().startswith("training: "), line
    notes = [line for line in finished.err.splitlines() if line.startswith("note: ")]
    assert any("float16" in line and "float32" in line for line in notes)
    assert any("best checkpoint" in line for line in notes)


def test_the_one_line_log(finished: Result, tiny: Tiny) -> None:  # noqa: F811
    lines = [match for line in finished.out.splitlines() if (match := LINE.fullmatch(line))]
    assert [(match[1], match[2]) for match in lines] == [(step, "14") for step in ("4", "8", "12", "14")]
    assert lines[-1][3] == "2.00"
    assert [f"{float(row['loss']):.4f}" for row in finished.curve if row["loss"]] == [match[4] for match in lines]
    # linear decay from 1e-2 over 14 steps: the rate of the step, not of the one after
    assert [float(match[5]) for match in lines] == [
        pytest.approx(1e-2 * (14 - step) / 14, rel=1e-2) for step in (3, 7, 11, 13)
    ]
    assert all(50 < float(match[7]) < 100 and 0.1 < float(match[8]) < 4 for match in lines)
    evaluations = [match for line in finished.out.splitlines() if (match := EVALUATION.fullmatch(line))]
    assert [match[1] for match in evaluations] == ["7", "14"]


def test_effective_share_and_tokens_are_those_of_the_batches(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    run = tiny.run(tmp_path, "--do_train", "--max_steps", 1, "--per_device_train_batch_size", 50, "--lora")
    said = float(LINE.search(run.out)[7])  # type: ignore[index]
    dry = tiny.run(tmp_path / "dry", "--do_train", "--dry_run").out
    tokens, longest = int(re.search(r"([\d,]+) tokens", dry)[1].replace(",", "")), longest_row(tiny)  # type: ignore[index]
    assert said == pytest.approx(100 * tokens / (50 * longest), abs=0.06)
    assert run.json("train_results.json")["train_tokens"] == tokens


def longest_row(tiny: Tiny) -> int:  # noqa: F811
    from utils.checkpoints.locate import locate
    from utils.data.encode import encode_row
    from utils.data.rows import read_rows
    from utils.data.template import ChatTemplate
    from utils.families.tokenizers import load_tokenizer

    checkpoint = locate(tiny.model)
    tokenizer = load_tokenizer(tiny.model, checkpoint.config)
    template = ChatTemplate.load(tiny.model, default=None)
    rows = read_rows(tiny.data / "train.json")
    return max(len(encode_row(row, tokenizer, template, 64, 128).input_ids) for row in rows)


def test_result_files(finished: Result, tiny: Tiny) -> None:  # noqa: F811
    everything = finished.json("all_results.json")
    train, evaluation = finished.json("train_results.json"), finished.json("eval_results.json")
    assert everything == {**train, **evaluation}
    assert set(evaluation) == {"eval_loss", "eval_ppl", "eval_accuracy"}
    assert evaluation["eval_ppl"] == pytest.approx(np.exp(evaluation["eval_loss"]))
    assert train["global_step"] == 14 and train["train_runtime"] > 0
    state = finished.json("trainer_state.json")
    assert state["global_step"] == state["max_steps"] == 14 and state["epoch"] == 2.0
    logged = {log["step"]: log["eval_loss"] for log in state["log_history"] if "eval_loss" in log}
    assert state["best_metric"] == min(logged.values()) == evaluation["eval_loss"]
    assert [log["step"] for log in state["log_history"] if "loss" in log] == [4, 8, 12, 14]
    assert all(log["grad_norm"] > 0 for log in state["log_history"] if "loss" in log)
    arguments = finished.json("arguments.json")
    assert arguments["lora"] is True and arguments["fp16"] is True and arguments["seed"] == 42
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (finished.output / name).is_file()
    for folder in (finished.output, finished.output / "checkpoint-14"):
        template = (folder / "chat_template.jinja").read_text("utf-8")
        assert "im_start" in template
        assert {"lora_config.json", "lora_model_state.safetensors", "arguments.json"} <= {
            p.name for p in folder.iterdir()
        }
    assert not list(finished.output.glob(".*tmp*"))


def test_the_curve_is_a_table_and_a_picture(finished: Result) -> None:
    from matplotlib import image

    assert [row["step"] for row in finished.curve] == ["4", "7", "8", "12", "14"]
    assert [bool(row["eval_loss"]) for row in finished.curve] == [False, True, False, False, True]
    picture = image.imread(finished.output / "loss_curve.png")
    assert picture.shape[:2] == (480, 840)
    colours = {tuple(np.round(pixel, 2)) for pixel in picture[:, :, :3].reshape(-1, 3)[::7]}
    assert len(colours) > 20  # lines in two colours, axes and text
    assert any(pixel[0] > 0.9 and pixel[1] < 0.6 and pixel[2] < 0.3 for pixel in colours)  # orange: evaluation


def test_reporters_got_every_number(finished: Result) -> None:
    from visualdl import LogReader

    logs = list((finished.output / "runs").glob("vdlrecords*.log"))
    assert len(logs) == 1
    reader = LogReader(file_path=str(logs[0]))
    recorded = {item.id: item.value for item in reader.get_data("scalar", "train/loss")}
    assert recorded.keys() == {4, 8, 12, 14}
    for row in finished.curve:
        if row["loss"]:
            assert recorded[int(row["step"])] == pytest.approx(float(row["loss"]), rel=1e-5)
    assert {item.id for item in reader.get_data("scalar", "eval/ppl")} == {7, 14}
    assert list((finished.output / "runs").glob("events.out.tfevents.*"))


def test_memory_is_among_the_results_if_it_is_wanted(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """Scores of evaluations stay on the device for as many batches as is said: the same figures."""
    options = ["--do_train", "--do_eval", "--lora", "--max_steps", 1, "--per_device_eval_batch_size", 2]
    plain = tiny.run(tmp_path / "plain", *options)
    told = tiny.run(tmp_path / "told", *options, "--skip_memory_metrics", "false", "--eval_accumulation_steps", 2)
    assert told.json("train_results.json")["train_memory_gib"] > 0.01
    assert "train_memory_gib" not in plain.json("train_results.json")
    assert told.json("eval_results.json") == plain.json("eval_results.json")


def test_evaluating_without_a_strategy_happens_once_at_the_end(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    run = tiny.run(tmp_path, "--do_train", "--do_eval", "--lora", "--max_steps", 3)
    assert run.out.count("evaluation at step") == 1 and "evaluation at step 3:" in run.out
    assert run.json("eval_results.json")["eval_loss"] == pytest.approx(float(run.curve[-1]["eval_loss"]))


def test_eta_after_a_resume_counts_only_the_steps_of_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    from utils.training.callbacks import Progress, clock
    from utils.training.state import TrainerState

    progress, logs = Progress(bar=False), {"loss": 1.0, "epoch": 1.0, "learning_rate": 0.1}
    logs |= {"tokens_per_second": 10.0, "effective_tokens": 1.0, "memory_gib": 1.0}
    state = TrainerState(global_step=50, max_steps=100)
    with mock.patch("time.monotonic", side_effect=[0.0, 4.0]):
        progress.on_train_begin(state)
        state.global_step = 51
        progress.on_log(state, logs)
    assert "ETA 03:16" in capsys.readouterr().out  # 49 steps of 4 s
    assert (clock(59.6), clock(3600), clock(90061)) == ("01:00", "1:00:00", "25:01:01")


# --- dry run ---------------------------------------------------------------------------------------------

RUNS: dict[str, list[Any]] = {
    "sft": [],
    "lora": ["--lora", "--lora_rank", 3],
    "some layers": ["--lora", "--lora_target_modules", "q_proj,.*layers.1.*down_proj"],
    "prefix": ["--prefix_tuning", "--num_prefix_tokens", 5],
    "projection": ["--prefix_tuning", "--num_prefix_tokens", 5, "--prefix_projection"],
    "hidden": ["--prefix_tuning", "--prefix_projection", "--prefix_projection_hidden_size", 12],
    "accumulated": ["--lora", "--gradient_accumulation_steps", 4, "--num_train_epochs", 0.7, "--intokens"],
    "stream": ["--lora", "--lazy", "--max_steps", 3],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_dry_run_tells_what_the_run_then_does(tiny: Tiny, tmp_path: Path, name: str) -> None:  # noqa: F811
    options = ["--do_train", "--num_train_epochs", 1, "--learning_rate", 1e-3, *RUNS[name]]
    with mock.patch("utils.training.start.build", side_effect=AssertionError("weights would load")):
        dry = tiny.run(tmp_path, *options, "--output_dir", tmp_path / "out", "--dry_run")
    assert not list(tmp_path.iterdir())
    run = tiny.run(tmp_path / "out", *options)
    said = re.search(r"model: ([\d,]+) parameters, ([\d,]+) ", dry.out)
    base = sum(value.size for value in tensors(tiny.model / "model.safetensors").values())
    trained = sum(value.size for path in run.output.glob("*.safetensors") for value in tensors(path).values())
    assert said is not None
    assert (int(said[1].replace(",", "")), int(said[2].replace(",", ""))) == (base, trained)
    steps = re.search(r"steps: ([\d,]+) ", dry.out)
    assert steps is not None and int(steps[1]) == run.json("trainer_state.json")["global_step"]
    assert "starts: anew" in dry.out and "⟦" in dry.out
    again = tiny.run(run.output, *options, "--dry_run")
    assert "nothing, the training in output_dir is finished" in again.out


def test_a_dry_run_shows_the_loss_mask_and_the_origin_of_values(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    first = json.loads((tiny.data / "train.json").read_text("utf-8").splitlines()[0])
    dry = tiny.run(tmp_path / "out", "--do_train", "--dry_run").out
    assert f"{first['src']}<|im_end|>\n<|im_start|>assistant\n⟦{first['tgt']}<|im_end|>⟧" in dry
    assert "  learning_rate = 0.01\n" in dry and "  weight_decay = 0.0  (default)\n" in dry


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "3", "null"])
def test_damaged_results_of_an_earlier_run_are_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / "all_results.json").write_text(content)
    for split, name in (("train", "train"), ("dev", "eval")):
        write_results(tmp_path, split, {f"{name}_loss": 1.0})
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"train_loss": 1.0, "eval_loss": 1.0}
