"""Every family trains, resumes, merges and answers, through the real scripts on its tiny model.

One case per family, see `family_cases`; a new family needs nothing here.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paddle
import pytest
from family_cases import FIXTURES, NAMES, WITH_TOKENIZER, case, hidden_logits, plain
from interrupted import interrupt, same_run
from tiny_runs import Result, Tiny, run_main, write_rows

from utils.checkpoints import locate
from utils.checkpoints.load import load_model
from utils.data.collate import Collator
from utils.data.encode import Example, encode_row, encode_source
from utils.data.rows import read_rows
from utils.families import FAMILIES
from utils.inference.loading import Prepared, prepare

METHODS: dict[str, list[object]] = {
    "sft": ["--learning_rate", 3e-3],
    "lora": ["--lora"],
    "prefix": ["--prefix_tuning", "--num_prefix_tokens", 8, "--learning_rate", 0.3],
}
COMMON: list[object] = ["--do_train", "--do_eval", "--num_train_epochs", 4, "--lr_scheduler_type", "constant"]
SAVING: list[object] = ["--save_strategy", "steps", "--save_steps", 14]


class Workshop:
    """A copy of one case's model, data for it, and the runs that were made with it so far."""

    def __init__(self, name: str, home: Path) -> None:
        self.case, self.home, self.tiny = case(name), home, Tiny(home)
        shutil.copytree(FIXTURES / name, self.tiny.model)
        for seed, (split, count) in enumerate({"train": 50, "dev": 10}.items()):
            write_rows(self.tiny.data / f"{split}.json", count, seed=seed)

    @functools.cached_property
    def prepared(self) -> Prepared:
        return prepare(str(self.tiny.model), device="cpu", dtype="float32")

    @functools.lru_cache  # noqa: B019 - as long as the module
    def run(self, method: str) -> Result:
        return self.tiny.run(self.home / method, *COMMON, *SAVING, *METHODS[method])

    def examples(self) -> list[Example]:
        rows = read_rows(self.tiny.data / "dev.json")
        found = [encode_row(row, self.prepared.tokenizer, self.prepared.template, 64, 128) for row in rows]
        assert all(isinstance(example, Example) for example in found)
        return found  # type: ignore[return-value]

    def script(self, name: str, *options: object) -> None:
        """The main of a script in this process; it must succeed."""
        run_main(name, [str(option) for option in options], self.tiny.environment, self.home, 0)


@pytest.fixture(scope="module", params=WITH_TOKENIZER)
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    yield Workshop(request.param, tmp_path_factory.mktemp(request.param))
    Workshop.run.cache_clear()


def test_every_family_is_here() -> None:
    assert {case(name).checkpoint.family.name for name in WITH_TOKENIZER} == set(FAMILIES)
    assert set(WITH_TOKENIZER) <= set(NAMES)


# --- training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls(shop: Workshop, method: str) -> None:
    run = shop.run(method)
    assert len(run.losses) == 4 * 7
    assert run.losses[-7:].mean() < 0.9 * run.losses[:7].mean()
    assert run.json("eval_results.json")["eval_loss"] < run.losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_what_was_saved_is_what_was_trained(shop: Workshop, method: str) -> None:
    """The result loads again and is evaluated to the same loss."""
    run = shop.run(method)
    source: list[object] = {
        "sft": ["--model_name_or_path", run.output],
        "lora": ["--lora", "--lora_path", run.output],
        "prefix": ["--prefix_tuning", "--prefix_path", run.output],
    }[method]
    again = shop.tiny.run(shop.home / f"{method}_again", "--do_eval", *source)
    wanted = run.json("eval_results.json")["eval_loss"]
    assert again.json("eval_results.json")["eval_loss"] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_recomputation_changes_no_loss(shop: Workshop, method: str) -> None:
    """The files of every family switch it on; a gradient lost on the way would show in the second loss."""
    options = [*COMMON, *METHODS[method], "--max_steps", 3, "--recompute"]
    again = shop.tiny.run(shop.home / f"{method}_recomputed", *options)
    np.testing.assert_allclose(again.losses, shop.run(method).losses[:3], atol=1e-5, rtol=0)


def test_an_interrupted_run_ends_as_the_whole_one(shop: Workshop) -> None:
    options = [*COMMON, *SAVING, *METHODS["lora"]]
    interrupt(shop.tiny, shop.home / "resumed", 14, options)
    same_run(shop.tiny.run(shop.home / "resumed", *options), shop.run("lora"))


def test_a_merged_adapter_answers_as_base_and_adapter(shop: Workshop) -> None:
    from utils.adapters.lora import load_lora
    from utils.adapters.lora_files import read_lora

    adapter, merged = shop.run("lora").output, shop.home / "merged"
    shop.script(
        "merge_lora_params",
        *("--model_name_or_path", shop.tiny.model, "--lora_path", adapter),
        *("--merge_model_path", merged, "--dtype", "float32", "--export_format", "hf"),
    )
    base = locate(shop.tiny.model)
    adapted = load_lora(load_model(base, "float32"), read_lora(adapter, base))
    adapted.model.eval()
    whole = locate(merged)
    alone = load_model(whole, "float32")
    for example in shop.examples()[:3]:
        together = hidden_logits(base.family, adapted.model, example.input_ids[None])
        untouched = hidden_logits(base.family, shop.case.model, example.input_ids[None])
        assert np.abs(together - untouched).max() > 1e-2
        found = hidden_logits(whole.family, alone, example.input_ids[None])
        assert np.abs(found - together).max() < 1e-5 * max(1.0, np.abs(together).max())


@pytest.mark.parametrize("prefix", [False, True])
def test_packed_rows_have_the_loss_of_rows_alone(shop: Workshop, prefix: bool) -> None:
    from utils.adapters.prefix import load_prefix
    from utils.training.model import TrainingModel

    base = locate(shop.tiny.model)
    model = load_model(base, "float32")
    encoder = load_prefix(model, base.family, shop.run("prefix").output, base) if prefix else None
    training = TrainingModel(base.family, model, prefix=encoder)
    training.eval()
    items = [{"input_ids": one.input_ids, "labels": one.labels} for one in shop.examples()[:5]]
    joined = {name: np.concatenate([item[name] for item in items[:3]]) for name in items[0]}
    packed = [{**joined, "lengths": [len(item["input_ids"]) for item in items[:3]]}]
    packed += [{**item, "lengths": [len(item["input_ids"])]} for item in items[3:]]
    collate = Collator(shop.prepared.tokenizer.pad_id)

    def score(rows: list[dict[str, np.ndarray]]) -> list[float]:
        return training.score(**{name: paddle.to_tensor(values) for name, values in collate(rows).items()}).tolist()

    alone = [score([item]) for item in items]
    loss, hits, targets = (sum(values) for values in zip(*alone, strict=True))
    for found in (score(items), score(packed)):
        assert found[0] == pytest.approx(loss, rel=1e-5) and found[1:] == [hits, targets]


# --- prediction ---------------------------------------------------------------------------------------


def test_training_and_prediction_see_the_same_prompt(shop: Workshop) -> None:
    """Also with a second round: what was trained after an answer is what a chat continues with."""
    tokenizer, template = shop.prepared.tokenizer, shop.prepared.template
    rows = list(read_rows(shop.tiny.data / "dev.json"))
    for row, example in zip(rows, shop.examples(), strict=True):
        prompt, cut = encode_source(row.question, tokenizer, template, 64)
        assert not cut and prompt == shop.prepared.encode(row.question, 64)[0]
        assert example.input_ids[: len(prompt)].tolist() == prompt
        supervised = np.flatnonzero(example.labels >= 0)
        assert supervised[0] == len(prompt) - 1  # the last token of the prompt predicts the first of the answer
        assert example.labels[supervised[-1]] in template.stop_ids(tokenizer)


@pytest.mark.parametrize("adapter", ["none", "lora", "prefix"])
def test_answers_do_not_depend_on_the_batch(shop: Workshop, adapter: str) -> None:
    """Greedy answers to prompts of many lengths, 8 at a time and one by one: texts, ids and probabilities."""
    from utils.inference.loading import load
    from utils.inference.sampling import SamplingOptions

    path = {} if adapter == "none" else {f"{adapter}_path": str(shop.run(adapter).output)}
    prepared = prepare(str(shop.tiny.model), device="cpu", dtype="float32", **path)
    generator = load(prepared, "cpu")
    texts = [" ".join(["Say", *["red", "blue", "tree"][: n % 4], "one " * (n // 3)]) for n in range(10)]
    prompts = [prepared.encode([{"role": "user", "content": text}], 64)[0] for text in texts]
    assert len({len(prompt) for prompt in prompts}) > 3
    options = SamplingOptions(max_new_tokens=12, min_new_tokens=4, logprobs=True)
    together, alone = (generator.generate(prompts, options, size) for size in (8, 1))
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    assert len({round(one.logprobs[-1], 3) for one in alone}) > 3  # the prompts matter


@pytest.mark.parametrize("adapter", ["none", "lora", "prefix"])
def test_exported_models_give_the_answers_of_the_model(shop: Workshop, adapter: str) -> None:
    """Dynamic, the inference model, and the programs of both: one text for each prompt, in batches of 1 and 8."""
    from utils.inference.export import export
    from utils.inference.loading import load
    from utils.inference.sampling import SamplingOptions

    path = {} if adapter == "none" else {f"{adapter}_path": str(shop.run(adapter).output)}
    options = SamplingOptions(max_new_tokens=8, min_new_tokens=3)
    texts = [" ".join(["Say", *["red", "blue", "tree"][: n % 4], "one " * (n // 2)]) for n in range(8)]
    answers = {}
    for inference_model in (False, True):
        model = prepare(str(shop.tiny.model), device="cpu", dtype="float32", inference_model=inference_model, **path)
        folder = shop.home / f"exported_{adapter}_{inference_model}"
        export(model, folder, device="cpu", verify=lambda *_: None)
        program = prepare(str(folder), device="cpu", mode="static", inference_model=inference_model)
        for prepared in (model, program):
            prompts = [prepared.encode([{"role": "user", "content": text}], 64)[0] for text in texts]
            generator = load(prepared, "cpu")
            for batch in (8, 1):
                found = generator.generate(prompts, options, batch)
                answers[inference_model, prepared is program, batch] = [(one.tokens, one.text) for one in found]
    wanted = answers.pop((False, False, 1))
    assert all(tokens for tokens, _ in wanted)
    for engine, found in answers.items():
        assert found == wanted, engine


def test_predictor_answers_a_file(shop: Workshop) -> None:
    """The script itself, in order, with what full finetuning made of the model."""
    from utils.inference.loading import load
    from utils.inference.sampling import SamplingOptions

    output = shop.home / "answers.json"
    shop.script(
        "predictor",
        *("--model_name_or_path", shop.run("sft").output, "--dtype", "float32"),
        *("--data_file", shop.tiny.data / "dev.json", "--output_file", output, "--device", "cpu"),
        *("--src_length", 64, "--max_new_tokens", 8, "--batch_size", 4),
    )
    asked = [json.loads(line) for line in (shop.tiny.data / "dev.json").read_text("utf-8").splitlines()]
    answered = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [(row["src"], row["tgt"]) for row in answered] == [(row["src"], row["tgt"]) for row in asked]
    trained = prepare(str(shop.run("sft").output), device="cpu", dtype="float32")
    prompts = [trained.encode([{"role": "user", "content": row["src"]}], 64)[0] for row in asked]
    wanted = load(trained, "cpu").generate(prompts, SamplingOptions(max_new_tokens=8), 4)
    assert [row["output"] for row in answered] == [one.text for one in wanted]


def test_cached_decoding_is_greedy(shop: Workshop) -> None:
    """Each token of an answer is the likeliest after a prefill of all that comes before it."""
    from utils.inference.loading import load
    from utils.inference.sampling import SamplingOptions

    generator = load(shop.prepared, "cpu")
    prompts = [shop.prepared.encode(row.question, 64)[0] for row in list(read_rows(shop.tiny.data / "dev.json"))[:3]]
    answers = generator.generate(prompts, SamplingOptions(max_new_tokens=8), 3)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens
        ids = [*prompt, *answer.tokens]
        lengths = range(len(prompt), len(ids))
        logits = plain(shop.case).open([ids[:length] for length in lengths])[1].numpy()
        for row, length in zip(logits, lengths, strict=True):
            assert row[ids[length]] > row.max() - 1e-4
