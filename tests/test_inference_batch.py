"""Loading with adapters, answering files, the journal, and chats, in this process on a tiny model."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_cases import hidden_logits, plain_engine
from saved import save_lora, save_prefix
from tiny_models import write_tiny_llama

from utils.adapters.lora import add_lora
from utils.adapters.prefix import PrefixTuning
from utils.checkpoints.load import load_model
from utils.errors import UserError
from utils.inference.batch import answer_file
from utils.inference.chat import Chat, chat_in_terminal
from utils.inference.engine import Engine
from utils.inference.generator import Completion, Generator
from utils.inference.journal import Journal
from utils.inference.loading import Prepared, load, prepare
from utils.inference.sampling import SamplingOptions
from utils.parallel.process_group import ProcessGroup

OPTIONS = SamplingOptions(max_new_tokens=10)
ROWS = [{"src": f"Question {'very ' * (n % 4)}number {n}?", "tgt": f"answer {n}"} for n in range(9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def prepared(folder: Path) -> Prepared:
    return prepare(str(folder), device="cpu")


@pytest.fixture(scope="module")
def generator(prepared: Prepared) -> Generator:
    return load(prepared, "cpu")


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def answer(prepared: Prepared, generator: Generator, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Answers rows as the predictor does and returns what was written."""

    def run(rows: list[Any], options: SamplingOptions = OPTIONS, **changes: Any) -> list[dict[str, Any]]:
        settings: dict[str, Any] = {"src_length": 200, "batch_size": 4, "resume": True, **changes}
        engine = settings.pop("load", lambda: generator)
        data = write_rows(tmp_path / "data.json", rows)
        answer_file(data, tmp_path / "output.json", prepared, engine, options, **settings)
        assert not (tmp_path / "output.json.partial").exists()
        return read(tmp_path / "output.json")

    return run


# --- loading -----------------------------------------------------------------------------------------


def first_logits(engine: Engine, prompt: list[int]) -> np.ndarray:
    slots, logits = engine.open([prompt])
    engine.free(slots)
    return logits.numpy()[0]


def test_lora_is_loaded_as_trained(folder: Path, prepared: Prepared, tmp_path: Path) -> None:
    """Adapted logits equal those of W + alpha / r * A B, computed here with numpy."""
    checkpoint = prepared.checkpoint
    adapted = add_lora(load_model(checkpoint, "float32"), rank=4, alpha=12, dropout=0.5)
    random = np.random.default_rng(0)
    for name, parameter in adapted.model.named_parameters():
        if "lora_" in name:
            parameter.set_value(random.normal(0, 0.1, parameter.shape).astype(np.float32))
    save_lora(tmp_path, adapted, checkpoint)
    merged = load_model(checkpoint, "float32")
    weights, parts = dict(merged.named_parameters()), dict(adapted.model.named_parameters())
    for name in [name for name in parts if name.endswith("lora_A")]:
        target = weights[name.replace("lora_A", "weight")]
        delta = parts[name].numpy() @ parts[name.replace("lora_A", "lora_B")].numpy() * 3.0
        target.set_value(target.numpy() + delta)
    prompt = list(range(5, 25))
    wanted = first_logits(plain_engine(checkpoint, merged), prompt)
    loaded = load(prepare(str(folder), device="cpu", lora_path=str(tmp_path)), "cpu")
    np.testing.assert_allclose(first_logits(loaded.engine, prompt), wanted, atol=1e-4)
    plain = first_logits(plain_engine(checkpoint, load_model(checkpoint, "float32")), prompt)
    assert np.abs(plain - wanted).max() > 0.1


def test_prefix_is_loaded_as_trained(folder: Path, prepared: Prepared, tmp_path: Path) -> None:
    """A prefix made of the keys and values of real tokens acts as they do where positions do not count."""
    checkpoint = prepared.checkpoint
    model = load_model(checkpoint, "float32")
    prefix = PrefixTuning(checkpoint.family, checkpoint.family.shape(checkpoint.config), 6)
    prefix.start_from_text(plain_engine(checkpoint, model), [11, 12, 13])
    save_prefix(tmp_path, prefix, checkpoint)
    prompt = list(range(5, 25))
    loaded = load(prepare(str(folder), device="cpu", prefix_path=str(tmp_path)), "cpu")
    engine = plain_engine(checkpoint, model, prefix)
    np.testing.assert_allclose(first_logits(loaded.engine, prompt), first_logits(engine, prompt), atol=1e-5)
    text, positions = np.array([[11, 12, 13, 11, 12, 13, *prompt]]), [*range(6), *range(20)]
    by_hand = hidden_logits(checkpoint.family, model, text, positions=positions)
    np.testing.assert_allclose(first_logits(loaded.engine, prompt), by_hand[0, -1], atol=1e-4)


def test_adapter_of_another_base_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    adapted = add_lora(load_model(prepared.checkpoint, "float32"), rank=2)
    (tmp_path / "adapter").mkdir()
    save_lora(tmp_path / "adapter", adapted, prepared.checkpoint)
    other = write_tiny_llama(tmp_path / "other", seed=8)
    with pytest.raises(UserError, match="another base"):
        prepare(str(other), device="cpu", lora_path=str(tmp_path / "adapter"))


def test_the_adapters_own_template_is_used(folder: Path, prepared: Prepared, tmp_path: Path) -> None:
    adapted = add_lora(load_model(prepared.checkpoint, "float32"), rank=2)
    save_lora(tmp_path, adapted, prepared.checkpoint)
    same = prepare(str(folder), device="cpu", lora_path=str(tmp_path))
    assert same.template.fingerprint() == prepared.template.fingerprint()
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    own = prepare(str(folder), device="cpu", lora_path=str(tmp_path))
    messages: Any = [{"role": "user", "content": "hi"}]
    assert own.template.encode_prompt(own.tokenizer, messages) == own.tokenizer.encode("hi!")
    (tmp_path / "mine.jinja").write_text("{{ messages[0]['content'] }}?")
    mine = prepare(str(folder), device="cpu", lora_path=str(tmp_path), chat_template=str(tmp_path / "mine.jinja"))
    assert mine.template.encode_prompt(mine.tokenizer, messages) == mine.tokenizer.encode("hi?")


# --- files -------------------------------------------------------------------------------------------


def test_rows_come_back_in_order_with_their_fields(answer: Callable[..., Any], generator: Generator) -> None:
    rows = answer(ROWS)
    assert [(row["src"], row["tgt"]) for row in rows] == [(row["src"], row["tgt"]) for row in ROWS]
    assert len({row["output"] for row in rows}) > 3
    assert rows == answer(ROWS, batch_size=1) == answer(ROWS, batch_size=9)


def test_every_shape_of_row_and_every_fault(answer: Callable[..., Any], tmp_path: Path) -> None:
    data = [
        {"src": "plain"},
        '{"src": "broken',
        {"src": ["a", "b"], "tgt": ["c", "d"]},
        {"src": ["a", "b"], "tgt": ["c"]},
        {"messages": [{"role": "user", "content": "from messages"}]},
        {"instruction": "do", "input": "this", "output": "known"},
        {"src": "   ", "tgt": "x"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        [1, 2],
        {"src": 3},
    ]
    rows = answer(data)
    assert [row["src"] for row in rows] == [
        "plain", None, ["a", "b"], ["a", "b"], "from messages", "do\nthis", "   ", "hi", None, 3,
    ]  # fmt: skip
    assert [row["tgt"] for row in rows] == [
        None, None, ["c", "d"], ["c"], None, "known", "x", "ho", None, None,
    ]  # fmt: skip
    broken = [number for number, row in enumerate(rows) if row["output"] is None]
    assert broken == [1, 6, 8, 9]
    assert all(f"data.json line {number + 1}: " in rows[number]["error"] for number in broken)
    assert all("error" not in rows[number] for number in range(10) if number not in broken)
    # the answer that is known is not part of what the model is asked
    assert rows[2]["output"] == rows[3]["output"]


def test_strange_rows_stand_beside_the_answers(
    answer: Callable[..., Any], prepared: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Halves of surrogate pairs, numbers that Python does not read, NaN, and a tokenizer that raises."""
    encode = prepared.tokenizer.encode

    def raising(text: str, **options: Any) -> list[int]:
        if "boom" in text:
            raise ValueError("Max stack size exceeded for backtracking")
        return encode(text, **options)

    monkeypatch.setattr(prepared.tokenizer, "encode", raising)
    data = [
        {"src": "good"},
        '{"src": "x", "id": ' + "1" * 5000 + "}",
        '{"src": "a\\ud83d", "tgt": "b"}',
        '{"src": "good", "tgt": "\\udc00", "note\\ud83d": "\\ud83d"}',
        '{"src": NaN, "tgt": [1e999]}',
        {"src": "boom"},
        '{"question\\ud83d": "x"}',
        {"src": "good"},
    ]
    rows = answer(data)
    broken = [number for number, row in enumerate(rows) if row["output"] is None]
    assert broken == [1, 2, 3, 4, 5, 6]
    assert all(f"data.json line {number + 1}: " in rows[number]["error"] for number in broken)
    said = {1: "4,300 digits", 2: "surrogate", 3: "surrogate", 5: "Max stack size", 6: 'no "src"'}
    assert all(words in rows[number]["error"] for number, words in said.items())
    assert [rows[number]["src"] for number in (2, 4, 5)] == ["a\ud83d", None, "boom"]
    assert rows[0] == rows[7] and rows[0]["output"] is not None
    (tmp_path / "output.json").read_text("utf-8")


def test_a_file_without_any_good_row_is_an_error(answer: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        answer([{"x": 1}] * 7)
    assert len(caught.value.faults) == 6 and "line 1" in caught.value.faults[0]
    with pytest.raises(UserError, match="empty"):
        answer([])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json"]


def test_a_run_without_any_answer_is_an_error(answer: Callable[..., Any], tmp_path: Path) -> None:
    """Its file is written all the same, with what is wrong with each row."""
    with pytest.raises(UserError, match="none of 3 rows could be answered; their errors stand in "):
        answer([{"src": "1 " * 900}, {"src": "2 " * 900}, {"x": 1}], src_length=5000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "output.json"]
    rows = read(tmp_path / "output.json")
    assert [row["output"] for row in rows] == [None] * 3
    assert ["512 positions" in row["error"] for row in rows] == [True, True, False]


def test_long_prompts_are_cut_and_counted(answer: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    rows = answer([{"src": "short"}, {"src": "long " * 300}], src_length=80)
    assert all(row["output"] for row in rows)
    assert [row.get("note") for row in rows] == [None, "the prompt was cut to src_length 80 tokens"]
    assert "1 of 2 prompts were cut to src_length 80 tokens" in capsys.readouterr().err


def test_too_few_positions_are_reported(answer: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    rows = answer(
        [{"src": "short"}, {"src": "1 " * 220}, {"src": "1 " * 900}],
        replace(OPTIONS, max_new_tokens=60, min_new_tokens=60),
        src_length=2000,
    )
    assert rows[0]["output"] and rows[1]["output"]
    assert rows[2]["output"] is None and "line 3" in rows[2]["error"] and "512 positions" in rows[2]["error"]
    assert "line 2: the answer was cut at" in capsys.readouterr().err
    assert "note" not in rows[0] and rows[1]["note"].startswith("the answer was cut at ")


def test_notes_outlive_an_interrupted_run(answer: Callable[..., Any], generator: Generator) -> None:
    """Of prompts (from the rows) and of answers (from the journal), also where a row has both."""
    rows = [{"src": "1 " * 300} for _ in range(3)]
    options = replace(OPTIONS, max_new_tokens=200, min_new_tokens=200)
    with pytest.raises(KeyboardInterrupt):
        answer(rows, options, load=lambda: Interrupting(generator, 1), src_length=400)
    written = answer(rows, options, src_length=400)
    for row in written:
        assert row["note"].startswith("the prompt was cut to src_length 400 tokens; the answer was cut at 112 tokens")


# --- interrupted runs ----------------------------------------------------------------------------------


class Interrupting:
    """A generator that is interrupted after some answers, and counts what it is asked."""

    def __init__(self, generator: Generator, after: int) -> None:
        self.asked = 0
        self.speed = generator.speed
        self._generator = generator
        self._after = after

    def generate(self, prompts: Any, options: Any, batch_size: int, on_row: Any, numbers: Any) -> None:
        self.asked = len(prompts)

        def counted(index: int, completion: Completion) -> None:
            on_row(index, completion)
            self._after -= 1
            if self._after == 0:
                raise KeyboardInterrupt

        self._generator.generate(prompts, options, batch_size, counted, numbers)


@pytest.mark.parametrize(
    "options", [OPTIONS, replace(OPTIONS, top_k=0, temperature=2.0), replace(OPTIONS, top_k=0, seed=5)]
)
def test_an_interrupted_run_goes_on(
    answer: Callable[..., Any], generator: Generator, tmp_path: Path, options: SamplingOptions
) -> None:
    first, second = Interrupting(generator, 4), Interrupting(generator, -1)
    rows = [*ROWS, "broken", *ROWS]  # the same questions twice: only the row number tells them apart
    with pytest.raises(KeyboardInterrupt):
        answer(rows, options, load=lambda: first)
    assert not (tmp_path / "output.json").exists()
    header, *done = read(tmp_path / "output.json.partial")
    assert first.asked == 18 and len(done) == 4
    written = answer(rows, options, load=lambda: second, batch_size=3)
    assert second.asked == 14
    whole = answer(rows, replace(options, seed=header["facts"]["seed"]))
    assert written == whole


def test_other_arguments_start_anew(
    answer: Callable[..., Any], generator: Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        answer(ROWS, load=lambda: Interrupting(generator, 4))
    second = Interrupting(generator, -1)
    answer(ROWS, replace(OPTIONS, max_new_tokens=9), load=lambda: second)
    assert second.asked == 9 and "starting anew" in capsys.readouterr().err


def test_no_resume_when_not_wanted(answer: Callable[..., Any], generator: Generator) -> None:
    with pytest.raises(KeyboardInterrupt):
        answer(ROWS, load=lambda: Interrupting(generator, 4))
    second = Interrupting(generator, -1)
    answer(ROWS, load=lambda: second, resume=False)
    assert second.asked == 9


def test_a_model_that_does_not_load_leaves_the_journal_as_it_was(
    answer: Callable[..., Any], generator: Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing without answers, and those of another run, which are of use again."""

    def fails() -> Generator:
        raise UserError("damaged")

    with pytest.raises(UserError, match="damaged"):
        answer(ROWS, load=fails)
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]
    with pytest.raises(KeyboardInterrupt):
        answer(ROWS, load=lambda: Interrupting(generator, 4))
    kept = (tmp_path / "output.json.partial").read_bytes()
    for rows, changes in ((ROWS[1:], {}), (ROWS, {"resume": False})):
        with pytest.raises(UserError, match="damaged"):
            answer(rows, load=fails, **changes)
        assert (tmp_path / "output.json.partial").read_bytes() == kept
    second = Interrupting(generator, -1)
    answer(ROWS, load=lambda: second)
    assert second.asked == len(ROWS) - (kept.count(b"\n") - 1) < len(ROWS)
    (tmp_path / "output.json.partial").write_text('{"key": "k", "facts": {}}\n')  # of a run that was killed early
    capsys.readouterr()
    answer(ROWS)
    assert "other inputs" not in capsys.readouterr().err


def test_the_journal_is_beside_what_a_link_names(
    answer: Callable[..., Any], generator: Generator, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "output.json").symlink_to("disk/answers.json")
    with pytest.raises(KeyboardInterrupt):
        answer(ROWS, load=lambda: Interrupting(generator, 4))
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["answers.json.partial"]
    with pytest.raises(UserError, match="another run is writing"):
        held = Journal(tmp_path / "disk" / "answers.json", "key", {}, resume=True)
        Journal(tmp_path / "output.json", "key", {}, resume=True)
    held.close(remove=True)
    assert len(answer(ROWS)) == len(ROWS)
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["answers.json"]
    assert (tmp_path / "output.json").is_symlink()


def test_nothing_is_kept_beside_a_pipe(prepared: Prepared, generator: Generator, tmp_path: Path) -> None:
    data, pipe = write_rows(tmp_path / "data.json", ROWS), tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for resume in (True, False):
        answer_file(data, pipe, prepared, lambda: generator, OPTIONS, src_length=200, batch_size=4, resume=resume)
        rows = [json.loads(line) for line in os.read(reader, 1 << 16).splitlines()]
        assert [row["src"] for row in rows] == [row["src"] for row in ROWS] and all(row["output"] for row in rows)
    os.close(reader)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "pipe"]


@pytest.mark.parametrize("mine", ["my notes\n", '{"src": "a"}\n', "\0" * 50])
def test_somebodys_file_in_the_place_of_the_journal_stays(
    answer: Callable[..., Any], mine: str, tmp_path: Path
) -> None:
    (tmp_path / "output.json.partial").write_text(mine)
    for resume in (True, False):
        with pytest.raises(UserError, match="holds something else, where answers are kept"):
            answer(ROWS, resume=resume)
    assert (tmp_path / "output.json.partial").read_text() == mine and not (tmp_path / "output.json").exists()


def test_a_folder_that_is_removed_meanwhile_is_made_again(
    prepared: Prepared, generator: Generator, tmp_path: Path
) -> None:
    data, output = write_rows(tmp_path / "data.json", ROWS), tmp_path / "deep" / "output.json"
    output.parent.mkdir()

    def removing() -> Generator:
        shutil.rmtree(output.parent)
        return generator

    answer_file(data, output, prepared, removing, OPTIONS, src_length=200, batch_size=4, resume=True)
    assert len(read(output)) == len(ROWS) and os.listdir(output.parent) == ["output.json"]


# --- chat ----------------------------------------------------------------------------------------------


def test_chat_remembers_streams_and_forgets_the_oldest(
    prepared: Prepared, generator: Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(prepared, generator, replace(OPTIONS, max_new_tokens=6, min_new_tokens=6), src_length=110)
    pieces: list[str] = []
    first = chat.say("Hello", pieces.append)
    assert "".join(pieces) == first.text and first.text
    second = chat.say("And now?", pieces.append)
    asked: Any = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And now?"},
    ]
    assert second.prompt_tokens == len(prepared.template.encode_prompt(prepared.tokenizer, asked))
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    chat.say("A question that is a bit longer than those before it were", pieces.append)
    assert len(chat.messages) < 6 and chat.messages[0]["content"] != "Hello"
    assert "oldest rounds no longer fit" in capsys.readouterr().err
    chat.reset()
    assert chat.say("Hello", pieces.append).text == first.text


def test_chat_survives_ctrl_c_in_an_answer(prepared: Prepared, generator: Generator) -> None:
    options = replace(OPTIONS, max_new_tokens=50, min_new_tokens=50)
    chat = Chat(prepared, generator, options, src_length=200)
    pieces: list[str] = []

    def write(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    chat.say("Hello", write)
    assert chat.messages[1] == {"role": "assistant", "content": "".join(pieces)}
    assert chat.say("Again", lambda piece: None).text


def test_chat_asks_again_for_what_is_no_text(
    prepared: Prepared, generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken byte, on a terminal or in a pipe that is read ahead, and half of a surrogate pair."""
    lines = [b"Hello", b"caf\xe9", "\ud83d".encode("utf-8", "surrogatepass"), b"\xff" * 9000, "né".encode(), b"/exit"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines)), encoding="utf-8"))
    chat = Chat(prepared, generator, replace(OPTIONS, max_new_tokens=6, min_new_tokens=6), src_length=200)
    chat_in_terminal(chat, ProcessGroup())
    assert [message["content"] for message in chat.messages if message["role"] == "user"] == ["Hello", "né"]
    assert capsys.readouterr().err.count("this message is no utf-8 text; type it again") == 3


def test_chat_goes_on_after_a_message_that_cannot_be_read(
    prepared: Prepared, generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = prepared.tokenizer.encode

    def fails(text: str, *args: Any, **options: Any) -> list[int]:
        if "boom" in text:
            raise ValueError("too strange")
        return encode(text, *args, **options)

    monkeypatch.setattr(prepared.tokenizer, "encode", fails)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nboom\nAgain\n"))
    chat = Chat(prepared, generator, replace(OPTIONS, max_new_tokens=6, min_new_tokens=6), src_length=200)
    chat_in_terminal(chat, ProcessGroup())
    assert [message["content"] for message in chat.messages if message["role"] == "user"] == ["Hello", "Again"]
    assert "too strange" in capsys.readouterr().err
