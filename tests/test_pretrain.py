"""run_pretrain.py through its main function: learning, resume, continuation, evaluation, errors."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import paddle
import pytest
from family_cases import WITH_TOKENIZER, case
from interrupted import Killed, stop_after
from tiny_models import write_tiny_llama
from tiny_runs import tensors
from tiny_text import no_meta, pretrain, tokenize_text, write_tokens

from utils.training.optimizer import share_of

ROOT = Path(__file__).resolve().parent.parent
EVALUATED = ["--do_eval", "--evaluation_strategy", "steps", "--eval_steps", 4]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without weights and its text: configuration and tokenizer are all that training needs."""
    folder = tmp_path_factory.mktemp("pretrain")
    write_tiny_llama(folder / "model", initializer_range=0.05, hidden_size=64)
    (folder / "model" / "model.safetensors").unlink()
    tokenize_text(folder / "model", folder / "text")
    return folder


# --- learning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_TOKENIZER)
def test_every_family_learns_from_nothing(name: str, tmp_path: Path) -> None:
    folder = case(name).folder
    data = tokenize_text(folder, tmp_path / "text")
    run = pretrain(folder, data, tmp_path / "out", "--do_train", "--max_steps", 12)
    guess = math.log(case(name).checkpoint.family.shape(case(name).checkpoint.config).vocabulary)
    assert abs(run.losses[0] - guess) < 0.25 * guess  # new weights know nothing
    assert np.mean(run.losses[-3:]) < 0.7 * run.losses[0]
    config = json.loads((run.output / "config.json").read_text("utf-8"))
    assert config["model_type"] in case(name).checkpoint.family.model_types
    from utils.checkpoints import locate
    from utils.checkpoints.load import load_model

    again = load_model(locate(run.output), "float32")
    stored = tensors(run.output / "model.safetensors")
    assert set(stored) == {key for key, _ in again.named_parameters()}


def test_the_seed_decides_weights_and_order(home: Path, tmp_path: Path) -> None:
    options = ["--do_train", "--max_steps", 2]
    runs = [
        pretrain(home / "model", home / "text", tmp_path / str(n), *options, "--seed", s) for n, s in enumerate("778")
    ]
    assert runs[0].losses.tolist() == runs[1].losses.tolist() != runs[2].losses.tolist()


def test_first_loss_is_that_of_the_model_on_the_first_samples(home: Path, tmp_path: Path) -> None:
    """Labels are shifted once, and nothing else comes between text and loss."""
    import paddle

    from utils.checkpoints.load import new_model
    from utils.data.pretrain_dataset import PretrainData, TokenStream
    from utils.families import FAMILIES

    options = ["--do_train", "--max_steps", 1, "--learning_rate", 0, "--split", "1,0,0"]
    run = pretrain(home / "model", home / "text", tmp_path / "out", *options)
    config = json.loads((run.output / "config.json").read_text("utf-8"))
    text = PretrainData([(None, str(home / "text"))], (1, 0, 0), 400)
    stream = TokenStream(text.documents("train")[0], 16, seed=42)
    samples = np.stack([stream.sample(number) for number in range(4)]).astype(np.int64)
    model = new_model(FAMILIES["llama"], config, "float32")
    model.set_state_dict({k: paddle.to_tensor(v) for k, v in tensors(run.output / "model.safetensors").items()})
    hidden = model.hidden({"input_ids": paddle.to_tensor(samples[:, :-1])})
    logits = model.logits(hidden).astype("float64")
    expected = paddle.nn.functional.cross_entropy(logits, paddle.to_tensor(samples[:, 1:, None])).mean()
    assert run.losses[0] == pytest.approx(float(expected), abs=1e-5)


# --- resume and continuation -----------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, 12])
def test_an_interrupted_run_goes_on_with_the_same_losses(home: Path, tmp_path: Path, step: int) -> None:
    second = tokenize_text(home / "model", tmp_path / "second", documents=30, seed=5)
    options = ["--do_train", *EVALUATED, "--save_steps", 3, "--gradient_accumulation_steps", 2, "--warmup_steps", 2]
    options += ["--min_learning_rate", 1e-3, "--lr_scheduler_type", "cosine", "--max_steps", 14]
    data = f"2 {home / 'text'} 1 {second / 'text'}"
    whole = pretrain(home / "model", data, tmp_path / "whole", *options)
    assert float(whole.curve[-1]["epoch"]) > 1  # over the end of an epoch of the text
    with stop_after(step), pytest.raises(Killed):
        pretrain(home / "model", data, tmp_path / "cut", *options)
    resumed = pretrain(home / "model", data, tmp_path / "cut", *options)
    assert f"continuing after step {step}" in resumed.err
    np.testing.assert_allclose(resumed.losses, whole.losses, atol=1e-6, rtol=0)
    for column in ("step", "epoch", "learning_rate"):
        assert [row[column] for row in resumed.curve] == [row[column] for row in whole.curve]
    assert resumed.json("all_results.json")["eval_loss"] == pytest.approx(
        whole.json("all_results.json")["eval_loss"], abs=1e-6
    )


def test_a_run_may_be_made_longer_but_not_of_other_text(home: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ["--do_train", "--save_steps", 2, "--lr_scheduler_type", "constant"]
    whole = pretrain(home / "model", home / "text", tmp_path / "whole", *options, "--max_steps", 6)
    pretrain(home / "model", home / "text", output, *options, "--max_steps", 4)
    longer = pretrain(home / "model", home / "text", output, *options, "--max_steps", 6)
    np.testing.assert_allclose(longer.losses, whole.losses, atol=1e-6, rtol=0)
    done = pretrain(home / "model", home / "text", output, *options, "--max_steps", 6)
    assert "nothing is trained again" in done.err
    other = tokenize_text(home / "model", tmp_path / "other", seed=9)
    refused = pretrain(home / "model", other, output, *options, "--max_steps", 8, expect=2)
    assert "was trained on other data" in refused.err
    refused = pretrain(
        home / "model", home / "text", output, *options, "--max_steps", 8, "--max_seq_length", 8, expect=2
    )
    assert "was trained with max_seq_length = 16, now it is 8" in refused.err


def test_continued_training_starts_from_the_loss_of_the_base(home: Path, tmp_path: Path) -> None:
    base = pretrain(home / "model", home / "text", tmp_path / "base", "--do_train", *EVALUATED, "--max_steps", 16)
    found = base.json("eval_results.json")
    start = ["--continue_training", "--do_train", "--eval_on_start", *EVALUATED, "--max_steps", 4]
    on = pretrain(base.output, home / "text", tmp_path / "on", *start, "--learning_rate", 1e-3)
    assert float(on.curve[0]["eval_loss"]) == pytest.approx(found["eval_loss"], abs=1e-5)
    assert on.losses[0] < 0.6 * base.losses[0]
    anew = pretrain(base.output, home / "text", tmp_path / "new", *start[1:], "--learning_rate", 1e-3)
    assert anew.losses[0] > 1.5 * on.losses[0]
    only = pretrain(base.output, home / "text", tmp_path / "only", "--continue_training", "--do_eval")
    assert only.json("eval_results.json")["eval_loss"] == pytest.approx(found["eval_loss"], abs=1e-5)


def test_without_weights_there_is_nothing_to_continue(home: Path, tmp_path: Path) -> None:
    said = pretrain(home / "model", home / "text", tmp_path / "o", "--do_train", "--continue_training", expect=2).err
    assert "holds no weights" in said and not (tmp_path / "o").exists()


# --- what a run leaves -----------------------------------------------------------------------------


def test_evaluation_and_test_have_their_own_parts(home: Path, tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "t" / "a", [[10 + d] * 20 for d in range(10)])
    seen: list[set[int]] = []

    def score(self: object, labels: object, **inputs: object) -> paddle.Tensor:
        seen.append({int(i) for i in np.unique(inputs["input_ids"].numpy())})  # type: ignore[attr-defined]
        return paddle.to_tensor([2.0, 1.0, 4.0], dtype="float64")

    with mock.patch("utils.training.model.TrainingModel.score", score):
        options = ["--do_train", "--do_eval", "--do_predict", "--split", "6,2,2", "--max_steps", 1]
        run = pretrain(home / "model", prefix, tmp_path / "out", *options)
    padding = 2
    assert [found - {padding} for found in seen] == [{16, 17}, {18, 19}]
    assert run.json("eval_results.json")["eval_loss"] == 0.5
    assert run.json("predict_results.json") == {
        "predict_loss": 0.5,
        "predict_ppl": math.exp(0.5),
        "predict_accuracy": 0.25,
    }


def test_the_result_is_a_model_that_continues_text(home: Path, tmp_path: Path) -> None:
    """A prompt goes to it as it stands: the instruct model's template is no part of what it learned."""
    run = pretrain(home / "model", home / "text", tmp_path / "out", "--do_train", *EVALUATED, "--save_steps", 4)
    assert run.checkpoints() == ["checkpoint-4", "checkpoint-8"]
    for name in ("loss_curve.png", "loss_curve.csv", "arguments.json", "trainer_state.json", "tokenizer.json"):
        assert (run.output / name).stat().st_size
    assert run.json("all_results.json")["eval_ppl"] == pytest.approx(
        math.exp(run.json("all_results.json")["eval_loss"])
    )
    from utils.data.template import ChatTemplate
    from utils.families.tokenizers import load_tokenizer

    config = json.loads((run.output / "config.json").read_text("utf-8"))
    tokenizer = load_tokenizer(run.output, config)
    template = ChatTemplate.load(run.output, default=None)
    ids = template.encode_prompt(tokenizer, [{"role": "user", "content": "red red"}])
    assert ids == tokenizer.encode("red red")


def test_rates_end_where_they_should(home: Path, tmp_path: Path) -> None:
    for kind in ("linear", "cosine", "polynomial"):
        options = ["--do_train", "--max_steps", 8, "--warmup_steps", 2, "--min_learning_rate", 4e-3]
        run = pretrain(home / "model", home / "text", tmp_path / kind, *options, "--lr_scheduler_type", kind)
        rates = [float(row["learning_rate"]) for row in run.curve]
        assert rates[0] == 0.0 and rates[2] == 1e-2 and rates == [*sorted(rates[:3]), *sorted(rates[3:], reverse=True)]
        assert 4e-3 < rates[-1] < 5.1e-3
    share = share_of("linear", 4.0, 0, 10, 1.0)
    assert [share(step) for step in (0, 5, 10)] == [1.0, 0.625, 0.25]


def test_epochs_when_no_steps_are_given(home: Path, tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "t" / "a", [[10] * 128] * 10)
    options = ["--do_train", "--max_steps", -1, "--num_train_epochs", 2, "--split", "1,0,0"]
    run = pretrain(home / "model", prefix, tmp_path / "out", *options)
    assert len(run.losses) == 2 * 1280 // (16 * 4)
    assert float(run.curve[-1]["epoch"]) == 2.0


# --- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "1,2"], 'split 1,2 (--split): expected three numbers such as "949,50,1"'),
        (["--split", "a,1,1"], "expected three numbers"),
        (["--split", "1,0,1", "--do_eval"], "split 1,0,1 (--split) leaves nothing for do_eval; its validation share"),
        (["--min_learning_rate", 1], "min_learning_rate 1.0 (--min_learning_rate) must be below learning_rate 0.01"),
        (["--min_learning_rate", 1e-3, "--lr_scheduler_type", "constant"], "contradict; use linear or cosine"),
        (["--evaluation_strategy", "epoch"], "pretraining counts updates, not epochs; use steps"),
        (["--input_dir", "1 ./a 2"], "expected pairs of a weight and a prefix, found 3 words"),
        (["--input_dir", "1 ./a x ./b"], 'expected a weight above 0 before ./b, found "x"'),
        (["--input_dir", "1 ./a 2 ./b"], "./b is neither a folder nor the prefix of token files"),
        (["--tensor_parallel_degree", 2], "needs 2 processes"),
        (["--lora"], "unknown key lora"),
        (["--max_seq_length", 513], "has 512 positions; set it to 512 or less"),
        (["--do_train", "false", "--do_eval"], "do_eval without do_train evaluates the model's own weights"),
    ],
)
def test_argument_faults(home: Path, tmp_path: Path, options: list[object], message: str) -> None:
    said = pretrain(home / "model", home / "text", tmp_path / "out", "--do_train", *options, expect=2).err
    assert message in said and not (tmp_path / "out").exists()


def test_text_of_another_tokenizer_is_refused(home: Path, tmp_path: Path) -> None:
    folder = case("gpt2_tiny").folder
    shutil.copytree(home / "text", tmp_path / "text")
    options = ["--do_train", "--max_steps", 1]
    said = pretrain(folder, tmp_path / "text", tmp_path / "out", *options, expect=2).err
    assert "was made with the tokenizer of model, not with this one; build others with python data/tools" in said
    no_meta(tmp_path / "text")  # files of other tools do not say what made them; ids beyond the model's are seen
    said = pretrain(folder, tmp_path / "text", tmp_path / "out", *options, expect=2).err
    assert "the model has ids from 0 to" in said


def test_degrees_must_divide_the_processes(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "3")
    options = ["--do_train", "--tensor_parallel_degree", 2]
    said = pretrain(home / "model", home / "text", tmp_path / "out", *options, expect=2).err
    assert "tensor_parallel_degree" in said and "3" in said and "Traceback" not in said


def test_all_faults_come_at_once_and_soon(tmp_path: Path) -> None:
    """A folder without token files: the message holds commands that make them, and these run as they stand."""
    (tmp_path / "data").mkdir()
    words = ["./llama/pretrain_argument.json", "--input_dir", str(tmp_path / "data"), "--split", "x", "--lr", "1"]
    started = time.monotonic()
    done = subprocess.run([sys.executable, "run_pretrain.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and time.monotonic() - started < 3  # of which most is Python's own start when busy
    faults = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(faults) == 3 and "Traceback" not in done.stderr
    [fault] = [fault for fault in faults if "holds no token files PREFIX.bin and PREFIX.idx" in fault]
    commands = fault.split("build them from the sample text: ")[1].replace(
        "./data/text.jsonl", f"{tmp_path}/text.jsonl"
    )
    commands = commands.replace("--output_path ./data/text", f"--output_path {tmp_path}/text")
    model = write_tiny_llama(tmp_path / "model")
    commands = commands.replace("smollm2-135m-instruct", str(model)).replace("python ", f"{sys.executable} ")
    subprocess.run(commands, shell=True, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "data" / "text.idx").is_file()
    run = pretrain(model, tmp_path / "data", tmp_path / "out", "--do_train", "--max_steps", 1)
    with open(run.output / "loss_curve.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 1
