"""What evaluations measure, against sums done by hand and by numpy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from unittest import mock

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import Tiny, tiny  # noqa: F401

from utils.kernels.loss import summed_loss
from utils.kernels.precision import autocast
from utils.parallel.topology import Layout
from utils.training.batches import batch_sizes, epoch_steps, run_steps
from utils.training.metrics import likelihood_metrics, text_metrics


def test_text_metrics_by_hand() -> None:
    # 6 of 7 words, 5 of 6 pairs, 4 of 5 triples, 3 of 4 quadruples are in the reference
    found = text_metrics(["the cat sat on the mat today"], ["the cat sat on the mat"])
    assert found["bleu4"] == pytest.approx((6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25)
    assert found["rouge1"] == pytest.approx(12 / 13) and found["rougel"] == pytest.approx(12 / 13)
    assert found["rouge2"] == pytest.approx(10 / 11)


def test_chinese_text_counts_by_characters() -> None:
    found = text_metrics(["我喜欢吃苹果"], ["我喜欢吃香蕉"])
    assert found["bleu4"] == pytest.approx((4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert found["rouge1"] == pytest.approx(4 / 6) and found["rouge2"] == pytest.approx(3 / 5)


def test_text_metrics_at_their_ends() -> None:
    same = ["a b c d e", "f g h i"]
    assert all(value == pytest.approx(1.0) for value in text_metrics(same, same).values())
    assert all(value == 0.0 for value in text_metrics(["x", ""], same).values())
    # a short answer pays the brevity penalty: 4 of 8 words, exp(1 - 8/4)
    short = text_metrics(["a b c d"], ["a b c d e f g h"])["bleu4"]
    assert short == pytest.approx(math.exp(-1))
    # rouge is a mean over rows, LCS may skip words
    mean = text_metrics(["a x b", "q"], ["a b", "q"])
    assert mean["rougel"] == pytest.approx((0.8 + 1) / 2)
    with pytest.raises(ValueError, match="1 outputs and 2 references"):
        text_metrics(["a"], same)


def test_likelihood_metrics() -> None:
    assert likelihood_metrics(6.0, 1, 4) == {"loss": 1.5, "ppl": pytest.approx(math.exp(1.5)), "accuracy": 0.25}
    assert all(math.isnan(value) for value in likelihood_metrics(0.0, 0, 0).values())
    assert likelihood_metrics(1e6, 0, 1)["ppl"] < math.inf


def test_a_broken_model_has_no_loss() -> None:
    """Paddle's operator gives log(vocabulary) for NaN logits."""
    targets = paddle.to_tensor([1, 2])
    for bad in (math.nan, math.inf):
        logits = paddle.ones([2, 5])
        logits[0, 3] = bad
        assert math.isnan(float(summed_loss(logits, targets)))
    assert float(summed_loss(paddle.ones([2, 5]), targets)) == pytest.approx(2 * math.log(5), rel=1e-6)


def test_a_sound_model_has_its_loss_in_mixed_precision() -> None:
    """50,257 logits of -30 have a sum that no float16 can hold."""
    logits, targets = paddle.full([2, 50_257], -30.0), paddle.to_tensor([1, 50_000])
    with autocast("float16"):
        loss = float(summed_loss(logits, targets))
        broken = float(summed_loss(paddle.full([2, 50_257], math.inf), targets))
    assert loss == float(summed_loss(logits, targets)) == pytest.approx(2 * math.log(50_257), rel=1e-6)
    assert math.isnan(broken)


@pytest.mark.parametrize("intokens", [False, True])
def test_evaluation_is_what_numpy_finds_in_the_logits(tiny: Tiny, tmp_path: Path, intokens: bool) -> None:  # noqa: F811
    from utils.checkpoints.load import load_model
    from utils.checkpoints.locate import locate
    from utils.data.encode import encode_row
    from utils.data.rows import read_rows
    from utils.data.template import ChatTemplate
    from utils.families.tokenizers import load_tokenizer

    options = ["--do_train", "--num_train_epochs", 2, "--learning_rate", 3e-3]
    trained = tiny.run(tmp_path / "trained", *options).output
    run = tiny.run(
        tmp_path / "evaluated",
        *("--do_eval", "--model_name_or_path", trained, "--per_device_eval_batch_size", 3),
        *(["--intokens"] if intokens else []),
    )
    checkpoint = locate(trained)
    model = load_model(checkpoint, "float32")
    tokenizer = load_tokenizer(trained, checkpoint.config)
    template = ChatTemplate.load(trained, default=None)
    losses, hits = [], []
    for row in read_rows(tiny.data / "dev.json"):
        example = encode_row(row, tokenizer, template, 64, 128)
        ids = paddle.to_tensor(example.input_ids[None].astype("int64"))
        with paddle.no_grad():
            hidden = model.hidden({"input_ids": ids})
            logits = model.logits(hidden)[0].numpy().astype("float64")
        for place, label in enumerate(example.labels):
            if label >= 0:
                losses.append(np.log(np.exp(logits[place]).sum()) - logits[place][label])
                hits.append(logits[place].argmax() == label)
    found = run.json("eval_results.json")
    assert found["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["eval_ppl"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert found["eval_accuracy"] == np.mean(hits) and 0 < np.mean(hits) < 1


# --- evaluation by generation --------------------------------------------------------------------------


def test_generated_answers_are_kept_and_measured(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    options = ["--do_train", "--do_eval", "--do_predict", "--num_train_epochs", 8, "--learning_rate", 5e-3]
    options += ["--eval_with_do_generation", "--save_generation_output", "--eval_max_new_tokens", 12]
    options += ["--evaluation_strategy", "steps", "--eval_steps", 28, "--save_steps", 28, "--load_best_model_at_end"]
    run = tiny.run(tmp_path / "run", *options)

    def rows(name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (run.output / name).read_text("utf-8").splitlines()]

    for split, prefix, name in (
        ("dev", "eval", "generated_output.json"),
        ("test", "predict", "test_generated_output.json"),
    ):
        given_rows = [json.loads(line) for line in (tiny.data / f"{split}.json").read_text("utf-8").splitlines()]
        answered = rows(name)
        assert [(row["src"], row["tgt"]) for row in answered] == [(row["src"], row["tgt"]) for row in given_rows]
        measured = text_metrics([row["output"] for row in answered], [row["tgt"] for row in given_rows])
        results = run.json(f"{prefix}_results.json")
        assert results == {f"{prefix}_{key}": pytest.approx(value) for key, value in measured.items()}
        assert results[f"{prefix}_rouge1"] > 0
    scores = {step: text_metrics(*zip(*[(r["output"], r["tgt"]) for r in rows(f"generated_output-step-{step}.json")],
                                      strict=True)) for step in (28, 56)}  # fmt: skip
    table = {int(row["step"]): row["eval_bleu4"] for row in run.curve if row["eval_bleu4"]}
    assert table.keys() == scores.keys()
    assert all(float(table[step]) == pytest.approx(scores[step]["bleu4"]) for step in scores)
    best = max(scores, key=lambda step: scores[step]["bleu4"])
    assert run.json("trainer_state.json")["best_model_checkpoint"] == f"checkpoint-{best}"
    assert run.json("eval_results.json")["eval_bleu4"] == pytest.approx(scores[best]["bleu4"])
    # the predictor answers the same with the weights that the run left
    from utils.data.rows import read_rows
    from utils.inference.loading import load, prepare
    from utils.inference.sampling import SamplingOptions

    prepared = prepare(str(run.output), device="cpu", dtype="float32")
    prompts = [prepared.encode(row.question, 64)[0] for row in read_rows(tiny.data / "dev.json")]
    texts = load(prepared, "cpu").generate(prompts, SamplingOptions(max_new_tokens=12), 4)
    assert [one.text for one in texts] == [row["output"] for row in rows("generated_output.json")]


def test_training_evaluation_and_prediction_see_the_same_prompts(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """A conversation of two rounds with a system text: one list of ids for all, and training begins with it."""
    from utils.data.rows import read_rows
    from utils.inference.generator import Generator
    from utils.inference.loading import prepare
    from utils.training.inputs import SizingCollator

    row = {
        "messages": [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": "What is red?"},
            {"role": "assistant", "content": "apple"},
            {"role": "user", "content": "And green?"},
            {"role": "assistant", "content": "tree"},
        ]
    }
    for split in ("train", "dev"):
        (tmp_path / f"{split}.json").write_text(json.dumps(row) + "\n", "utf-8")
    seen: dict[str, list[int]] = {}
    collate, generate = SizingCollator.__call__, Generator.generate

    def watch_batch(self: SizingCollator, items: list[dict]) -> dict:
        seen["train"] = items[0]["input_ids"].tolist()
        return collate(self, items)

    def watch_prompts(self: Generator, prompts: list[list[int]], *args: object, **kwargs: object) -> object:
        seen["evaluation"] = list(prompts[0])
        return generate(self, prompts, *args, **kwargs)

    with (
        mock.patch.object(SizingCollator, "__call__", watch_batch),
        mock.patch.object(Generator, "generate", watch_prompts),
    ):
        options = ["--do_train", "--max_steps", 1, "--do_eval", "--eval_with_do_generation", "--eval_max_new_tokens", 2]
        run = tiny.run(
            tmp_path / "out",
            *options,
            "--dataset_name_or_path",
            tmp_path,
            "--lora",
            "--max_length",
            256,
            "--src_length",
            200,
        )
    question = next(iter(read_rows(tmp_path / "dev.json"))).question
    predicted, cut = prepare(str(tiny.model), device="cpu", lora_path=str(run.output)).encode(question, 200)
    assert not cut and seen["evaluation"] == predicted
    assert seen["train"][: len(predicted)] == predicted and len(seen["train"]) > len(predicted)


# --- arithmetic of batches -------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 9))
def test_micro_batches_hold_every_example_once(examples: int, batch_size: int, parts: int) -> None:
    sizes = batch_sizes(examples, batch_size, parts)
    assert sum(sizes) == examples and min(sizes) >= 0 and max(sizes) <= batch_size
    steps = [sum(sizes[first : first + parts]) for first in range(0, len(sizes), parts)]
    assert len(sizes) == parts * len(steps) and len(steps) == epoch_steps(examples, batch_size * parts)
    assert set(steps[:-1]) <= {batch_size * parts} and steps[-1] >= 1  # whatever the parts


@pytest.mark.parametrize(
    ("epochs", "max_steps", "examples", "steps"),
    [(3.0, -1, 10, 30), (0.7, -1, 10, 7), (0.01, -1, 10, 1), (3.0, 4, 10, 4), (3.0, 4, None, 4), (1.5, -1, 5, 7)],
)
def test_steps_of_a_run(epochs: float, max_steps: int, examples: int | None, steps: int) -> None:
    args = mock.Mock(num_train_epochs=epochs, max_steps=max_steps)
    args.per_device_train_batch_size = args.gradient_accumulation_steps = 1
    assert run_steps(args, Layout(), examples) == steps


def test_evaluation_before_the_first_step_is_on_the_curve(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    options = ["--do_train", "--do_eval", "--lora", "--eval_on_start", "--max_steps", "2", "--save_strategy", "no"]
    found = tiny.run(tmp_path / "out", *options)
    losses = [(int(row["step"]), float(row["eval_loss"])) for row in found.curve if row["eval_loss"]]
    assert [step for step, _ in losses] == [0, 2]
    # the picture is drawn again with the evaluation of the result
    times = [(found.output / name).stat().st_mtime for name in ("train_results.json", "loss_curve.png")]
    assert times[0] < times[1]
    assert losses[1][1] < losses[0][1]
    # an untrained adapter changes nothing: the first value is that of the base
    base = tiny.run(tmp_path / "base", "--do_eval")
    assert losses[0][1] == pytest.approx(base.json("eval_results.json")["eval_loss"], abs=1e-5)
