"""Rows become ids and labels: what is cut, what stays, what is supervised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, LLAMA2, write_bpe, write_sentencepiece

from utils.data.encode import DataReport, Dropped, Example, encode_row, encode_source
from utils.data.rows import Row
from utils.data.template import ChatTemplate, JinjaTemplate, Message, PlainTemplate
from utils.errors import UserError
from utils.families.tokenizers import Tokenizer, load_tokenizer

Kit = tuple[Tokenizer, ChatTemplate]
LONG = "one two three four five six seven eight nine ten " * 20


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kit]:
    bpe, pieces = tmp_path_factory.mktemp("bpe"), tmp_path_factory.mktemp("pieces")
    chat = load_tokenizer(bpe, write_bpe(bpe))
    llama = load_tokenizer(pieces, write_sentencepiece(pieces))
    return {
        "chatml": (chat, JinjaTemplate(CHATML, "test")),
        "llama2": (llama, JinjaTemplate(LLAMA2, "test")),
        "plain": (llama, PlainTemplate()),
    }


def row(*texts: str, system: str | None = None) -> Row:
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for number, text in enumerate(texts):
        messages.append({"role": "assistant" if number % 2 else "user", "content": text})
    return Row(tuple(messages), Path("train.json"), 7, {})


def learned(example: Example) -> list[int]:
    return [int(label) for label in example.labels if label != -100]


def test_labels_are_the_next_ids_of_the_answer(kits: dict[str, Kit]) -> None:
    tokenizer, template = kits["chatml"]
    example = encode_row(row("one", "two three"), tokenizer, template, 64, 128)
    assert isinstance(example, Example)
    prompt = template.encode_prompt(tokenizer, row("one").messages)
    answer = [*tokenizer.encode("two three"), tokenizer.eos_id]
    assert example.input_ids.tolist() == [*prompt, *answer[:-1]]
    assert example.labels.tolist() == [-100] * (len(prompt) - 1) + answer
    assert example.input_ids.dtype == example.labels.dtype == np.int32


def test_history_that_a_template_rewrites_is_prompt_and_counted(kits: dict[str, Kit]) -> None:
    tokenizer, _ = kits["chatml"]
    template = JinjaTemplate(
        "{% for m in messages %}{{ m.content }}{% if not loop.last %}{{ '|' }}{% endif %}"
        "{% if m.role == 'assistant' and loop.last %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '|' }}{% endif %}",
        "test",
    )
    report = DataReport()
    example = encode_row(row("one", "two", "three", "four"), tokenizer, template, 64, 128, report)
    assert isinstance(example, Example)
    assert learned(example) == [*tokenizer.encode("four"), tokenizer.eos_id]
    assert tokenizer.decode(example.input_ids) == "one|two|three|four"
    assert [what for what in report.counts if "only the last answer" in what]
    cut = encode_row(row("one", "two", LONG, "four"), tokenizer, template, 32, 128, DataReport())
    assert isinstance(cut, Example)
    prompt, _ = encode_source(row("one", "two", LONG).messages, tokenizer, template, 32)
    assert cut.input_ids[: len(prompt)].tolist() == prompt
    assert learned(cut) == learned(example)


@pytest.mark.parametrize("name", ["chatml", "llama2", "plain"])
def test_a_long_question_keeps_its_head_and_what_the_template_closes_it_with(name: str, kits: dict[str, Kit]) -> None:
    tokenizer, template = kits[name]
    messages = row("What is the capital? " + LONG).messages
    full = template.encode_prompt(tokenizer, messages)
    ids, cut = encode_source(messages, tokenizer, template, 64)
    assert cut and 60 <= len(ids) <= 64
    closing = {"chatml": "<|im_end|>\n<|im_start|>assistant\n", "llama2": " [/INST]", "plain": ""}[name]
    assert tokenizer.decode(ids, skip_special=False).endswith(closing)
    assert ids[:30] == full[:30]
    assert encode_source(messages, tokenizer, template, len(full)) == (full, False)


def test_training_and_prediction_cut_a_question_alike(kits: dict[str, Kit]) -> None:
    tokenizer, template = kits["chatml"]
    report = DataReport()
    example = encode_row(row(LONG, "two"), tokenizer, template, 64, 128, report)
    assert isinstance(example, Example)
    prompt, _ = encode_source(row(LONG).messages, tokenizer, template, 64)
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert learned(example) == [*tokenizer.encode("two"), tokenizer.eos_id]
    assert report.counts == {"question cut to 64 tokens": 1}
    assert "train.json line 7" in report.summary()


def test_a_long_answer_keeps_its_end_token(kits: dict[str, Kit]) -> None:
    tokenizer, template = kits["chatml"]
    report = DataReport()
    example = encode_row(row("one", LONG), tokenizer, template, 64, 100, report)
    assert isinstance(example, Example)
    assert len(example.input_ids) == 99
    assert learned(example)[-1] == tokenizer.eos_id
    assert learned(example)[:-1] == tokenizer.encode(LONG)[: len(learned(example)) - 1]
    assert report.counts == {"answer cut, over 100 tokens": 1}


def test_every_round_is_supervised_and_leading_rounds_stay(kits: dict[str, Kit]) -> None:
    tokenizer, template = kits["chatml"]
    texts = ["one", "two", "three", "four", "five", "six " * 40]
    example = encode_row(row(*texts), tokenizer, template, 64, 4096)
    assert isinstance(example, Example)
    assert tokenizer.decode(learned(example)) == "twofour" + "six " * 40
    ids, _ = template.encode_conversation(tokenizer, row(*texts[:4]).messages)
    report = DataReport()
    short = encode_row(row(*texts), tokenizer, template, 64, len(ids) + 3, report)
    assert isinstance(short, Example)
    assert short.input_ids.tolist() == ids[:-1]
    assert "later rounds left out" in report.summary()
    report = DataReport()
    room = len(template.encode_prompt(tokenizer, row(*texts[:5]).messages)) + 20
    cut = encode_row(row(*texts), tokenizer, template, 64, room, report)
    assert isinstance(cut, Example)
    assert len(cut.input_ids) == room - 1 and learned(cut)[-1] == tokenizer.eos_id
    assert "answer cut" in report.summary()


def test_the_oldest_rounds_go_first_when_history_is_too_long(kits: dict[str, Kit]) -> None:
    tokenizer, template = kits["chatml"]
    messages = row("one", LONG, "three", "four", "five", system="eight").messages
    ids, cut = encode_source(messages, tokenizer, template, 100)
    kept = row("three", "four", "five", system="eight").messages
    assert cut and ids == template.encode_prompt(tokenizer, kept)


def test_a_long_system_text_is_cut_before_nothing_is_left(kits: dict[str, Kit]) -> None:
    tokenizer, template = kits["chatml"]
    ids, cut = encode_source(row("one", system=LONG).messages, tokenizer, template, 80)
    assert cut and len(ids) <= 80
    assert tokenizer.decode(ids, skip_special=False).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_no_room_for_the_template_is_a_user_error(kits: dict[str, Kit]) -> None:
    tokenizer, template = kits["chatml"]
    with pytest.raises(UserError, match="src_length 8 is too short: the chat template alone takes"):
        encode_source(row("one two three").messages, tokenizer, template, 8)


def test_a_refused_conversation_names_its_row(kits: dict[str, Kit]) -> None:
    tokenizer, template = kits["llama2"]
    with pytest.raises(UserError, match=r"train\.json line 7: .*no system here"):
        encode_row(row("one", "two", system="s"), tokenizer, template, 64, 128)


@pytest.mark.parametrize("name", ["chatml", "llama2", "plain"])
@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.sampled_from(["one", "你好，世界 ", "two three ", "x" * 50]), min_size=2, max_size=10),
    repeat=st.integers(1, 12),
    src_length=st.integers(60, 90),
    extra=st.integers(1, 60),
)
def test_limits_always_hold(
    name: str, texts: list[str], repeat: int, src_length: int, extra: int, kits: dict[str, Kit]
) -> None:
    tokenizer, template = kits[name]
    texts = [text * repeat for text in texts[: len(texts) // 2 * 2]]
    report = DataReport()
    example = encode_row(row(*texts), tokenizer, template, src_length, src_length + extra, report)
    assert not isinstance(example, Dropped)
    assert len(example.input_ids) == len(example.labels) <= src_length + extra - 1
    assert learned(example)[-1] == example.labels[-1] == tokenizer.eos_id
    first = int(np.argmax(example.labels != -100)) + 1
    assert first <= src_length
    moved = np.where(example.labels[:-1] != -100, example.input_ids[1:], -100)
    assert moved.tolist() == example.labels[:-1].tolist()
    untouched = not report.counts
    ids, _ = template.encode_conversation(tokenizer, row(*texts).messages)
    assert untouched == (example.input_ids.tolist() == ids[:-1])


def test_report_survives_json() -> None:
    report = DataReport()
    for line in range(8):
        report.note("answer cut", f"a.json line {line}")
    report.add(Example(np.zeros(3, np.int32), np.array([-100, 1, 2], np.int32)))
    again = DataReport.from_json(report.to_json())
    assert again == report
    assert "8 rows: answer cut (a.json line 0; " in again.summary() and again.summary().endswith("...)")
    assert "1 examples, 3 tokens, 67% of them supervised" in again.summary()
