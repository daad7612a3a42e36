"""The embedded model says the same to a hundred real prompts, whatever computes it and in which batches."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from utils.checkpoints import embedded
from utils.data.rows import read_rows
from utils.data.template import Message
from utils.inference.export import export
from utils.inference.loading import load, prepare
from utils.inference.sampling import SamplingOptions

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, NEW_TOKENS, LONGEST = 100, 8, 160
Answers = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Questions of the sample data through the chat template, behind none to four answered ones."""
    prepared = prepare(embedded.NAME, device="cpu", dtype="float32")
    rows = list(read_rows(ROOT / "data" / "dev.json"))
    found = []
    for number in range(PROMPTS):
        *known, last = rows[number : number + 1 + number % 5]
        told = [f"{row.question[-1]['content']} {row.answer}\n" for row in known]
        text = "".join([*told, last.question[-1]["content"]])
        found.append(prepared.encode([{"role": "user", "content": text}], LONGEST)[0])
    assert len(found) == PROMPTS and len({len(prompt) for prompt in found}) > 10
    return found


def answers(
    name: str | Path, prompts: list[list[int]], batch_sizes: tuple[int, ...], **engine: object
) -> list[Answers]:
    """Greedy answers of one engine at each batch size."""
    prepared = prepare(str(name), device="cpu", dtype="float32", **engine)  # type: ignore[arg-type]
    generator = load(prepared, "cpu")
    options = SamplingOptions(max_new_tokens=NEW_TOKENS)
    found = [[one.tokens for one in generator.generate(prompts, options, size)] for size in batch_sizes]
    del generator
    gc.collect()
    return found


@pytest.fixture(scope="module")
def wanted(prompts: list[list[int]]) -> Answers:
    """Of the library's own model, eight prompts at a time."""
    (found,) = answers(embedded.NAME, prompts, (8,))
    assert len(set(found)) > PROMPTS // 2
    return found


def test_inference_model_in_any_batch(prompts: list[list[int]], wanted: Answers) -> None:
    for found in answers(embedded.NAME, prompts, (8, 3, 1), inference_model=True):
        assert found == wanted


@pytest.mark.parametrize("inference_model", [False, True], ids=["plain", "inference model"])
def test_static(inference_model: bool, prompts: list[list[int]], wanted: Answers, folder: Path) -> None:
    prepared = prepare(embedded.NAME, device="cpu", dtype="float32", inference_model=inference_model)
    export(prepared, folder, device="cpu", verify=lambda *_: None)  # comparing is what this test does
    (found,) = answers(folder, prompts, (8,), mode="static", inference_model=inference_model)
    assert found == wanted


def test_the_next_turn_of_a_chat_reads_its_new_tokens() -> None:
    """Through the model's own template, which ends an answer as the model has ended it."""
    prepared = prepare(embedded.NAME, device="cpu", dtype="float32", inference_model=True)
    generator, options = load(prepared, "cpu"), SamplingOptions(max_new_tokens=24)
    chat: list[Message] = [{"role": "system", "content": "Answer in one short sentence."}]
    kept: list[int] = []
    with closing(generator.scheduler(2, 512, 2**26)) as scheduler:
        for question in ("What is the capital of France?", "And of Italy?", "Which of them is larger?"):
            chat.append({"role": "user", "content": question})
            prompt, _ = prepared.encode(chat, 1000)
            scheduler.submit(prompt, options)
            answer = None
            while answer is None:
                answer = next((event.completion for event in scheduler.step() if event.completion), None)
            assert answer.finish_reason == "stop" and answer.tokens == generator.generate([prompt], options)[0].tokens
            assert prompt[: len(kept)] == kept and answer.cached_tokens == len(kept)
            kept = [*prompt, *answer.tokens[:-1]]
            chat.append({"role": "assistant", "content": answer.text})


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """For half a gigabyte of weights, which do not stay."""
    import shutil

    yield tmp_path / "export"
    shutil.rmtree(tmp_path / "export", ignore_errors=True)
