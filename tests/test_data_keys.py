"""What rows say beside their texts: system messages, what is learned, tools, reasoning, and keys that nobody reads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import Tiny, run_main, tiny  # noqa: F401
from tiny_tokenizers import CHATML, write_bpe

from utils.data.dataset import load_rows
from utils.data.encode import DataReport, Dropped, Example, encode_row, encode_source
from utils.data.lines import Line, RowFault
from utils.data.rows import Row, parse_row, to_row
from utils.data.template import ChatTemplate, JinjaTemplate, PlainTemplate
from utils.errors import UserError
from utils.families.tokenizers import Tokenizer, load_tokenizer

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"place": "Ulm <|im_end|>"}}}]
KNOWING = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' ~ tools | tojson ~ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' ~ m.reasoning_content ~ '</think>' }}{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '<|endoftext|>' ~ call.function.name ~ call.function.arguments | tojson ~ '<|endoftext|>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bpe")
    return load_tokenizer(folder, write_bpe(folder))


def row(raw: dict[str, Any]) -> Row:
    return to_row(Line(7, raw), Path("train.json"))


def encoded(
    tokenizer: Tokenizer, raw: dict[str, Any], template: ChatTemplate | None = None
) -> tuple[str, str, DataReport]:
    """All of a row as text, what is learned of it, and the report."""
    report = DataReport()
    example = encode_row(row(raw), tokenizer, template or JinjaTemplate(CHATML, "test"), 256, 512, report)
    assert isinstance(example, Example)
    learned = [int(label) for label in example.labels if label != -100]
    show = [tokenizer.decode(ids, skip_special=False) for ids in (example.input_ids.tolist(), learned)]
    return show[0], show[1], report


PAIRS = {"src": ["one", "three"], "tgt": ["two", "four"]}
ALPACA = {"instruction": "one", "output": "two"}
OPENAI = {
    "messages": [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
}
SHAREGPT = {
    "conversations": [
        {"from": "gpt" if turn["role"] == "assistant" else "human", "value": turn["content"]}
        for turn in OPENAI["messages"]
    ]
}
ROWS = {"pairs": PAIRS, "alpaca": ALPACA, "openai": OPENAI, "sharegpt": SHAREGPT}


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize(
    "said",
    [
        {"system": "Be kind."},
        {"system_message": "Be kind."},
        {"system_prompt": "Be kind."},
        {"context": {"system": "Be kind."}},
        {"system": "Be kind.", "context": {"system": "Be kind."}},
    ],
)
def test_every_format_knows_every_name_of_a_system_message(
    form: str, said: dict[str, Any], tokenizer: Tokenizer
) -> None:
    text, _, report = encoded(tokenizer, {**ROWS[form], **said})
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\none") and not report.counts


def test_system_messages_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(RowFault, match=r"system and context\.system say different things"):
        parse_row({**PAIRS, "system": "a", "context": {"system": "b"}})
    talk = {"messages": [{"role": "system", "content": "a"}, *OPENAI["messages"]]}
    assert [message["content"] for message in parse_row({**talk, "system": "a"})][:2] == ["a", "one"]
    with pytest.raises(RowFault, match="turn 1 must be the user's, found the system's"):
        parse_row({**talk, "system_prompt": "b"})


@pytest.mark.parametrize("form", ["openai", "sharegpt"])
@pytest.mark.parametrize("said", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"loss": 0}])
def test_answers_that_are_not_to_be_learned(form: str, said: dict[str, Any], tokenizer: Tokenizer) -> None:
    (key, turns), *_ = ROWS[form].items()
    first = [turns[0], {**turns[1], **said}, *turns[2:]]
    text, learned, report = encoded(tokenizer, {key: first})
    assert "two<|im_end|>" in text and learned == "four<|im_end|>" and not report.counts
    last = [*turns[:3], {**turns[3], **said}]
    assert encoded(tokenizer, {key: last})[1] == "two<|im_end|>"
    told = [*turns[:3], {**turns[3], **dict.fromkeys(said, 1)}]
    assert encoded(tokenizer, {key: told})[1] == "two<|im_end|>four<|im_end|>"


def test_labels_of_pairs_and_weights_of_rows(tokenizer: Tokenizer) -> None:
    assert encoded(tokenizer, {**PAIRS, "label": [0, 1]})[1] == "four<|im_end|>"
    for said in ({"weight": 0}, {"train": False}, {"loss": False}, {"label": [0, 0]}):
        report = DataReport()
        dropped = encode_row(row({**PAIRS, **said}), tokenizer, PlainTemplate(), 256, 512, report)
        assert isinstance(dropped, Dropped) and list(report.counts) == [
            "dropped, nothing to learn (its train, weight or loss says so)"
        ]
    assert encoded(tokenizer, {**PAIRS, "loss": 2.5})[2].counts == {'"loss" ignored': 1}
    assert encoded(tokenizer, {**PAIRS, "weight": 0.5})[2].counts == {'"weight" other than 0 and 1 counts as 1': 1}


@pytest.mark.parametrize("value", ["no", -1, float("nan"), [], {"a": 1}])
def test_a_weight_that_means_nothing_is_refused(value: Any) -> None:
    turns = [OPENAI["messages"][0], {**OPENAI["messages"][1], "weight": value}]
    with pytest.raises(RowFault, match=r'"messages\[1\].weight" must be true, false, 0 or 1'):
        parse_row({"messages": turns})


def test_tools_calls_and_reasoning_reach_a_template_that_writes_them(tokenizer: Tokenizer) -> None:
    answer = {"role": "assistant", "content": "two", "tool_calls": CALLS, "reasoning_content": "hm"}
    raw = {"messages": [OPENAI["messages"][0], answer], "tools": TOOLS}
    text, learned, report = encoded(tokenizer, raw, JinjaTemplate(KNOWING, "test"))
    assert not report.counts
    assert json.loads(text.split("Tools: ")[1].split("<|im_end|>")[0]) == TOOLS
    call = '<|endoftext|>weather{"place": "Ulm <|im_end|>"}<|endoftext|>'
    assert learned == f"<think>hm</think>two{call}<|im_end|>"
    example = encode_row(row(raw), tokenizer, JinjaTemplate(KNOWING, "test"), 256, 512)
    assert isinstance(example, Example)
    assert [int(i) for i in example.labels].count(tokenizer.eos_id) == 1  # the one in the call is text
    as_text = encoded(tokenizer, {**raw, "tools": json.dumps(TOOLS)}, JinjaTemplate(KNOWING, "test"))
    assert as_text[0] == text
    prompt, cut = encode_source(row(raw).question, tokenizer, JinjaTemplate(KNOWING, "test"), 256, TOOLS)
    assert example.input_ids[: len(prompt)].tolist() == prompt and not cut


@pytest.mark.parametrize("content", ["", None, " \n"])
def test_an_answer_may_only_call_functions_where_the_template_writes_calls(
    tokenizer: Tokenizer, content: str | None
) -> None:
    answer = {"role": "assistant", "content": content, "tool_calls": CALLS}
    raw = {"messages": [OPENAI["messages"][0], answer, {"role": "user", "content": "three"}, OPENAI["messages"][1]]}
    _, learned, report = encoded(tokenizer, raw, JinjaTemplate(KNOWING, "test"))
    call = '<|endoftext|>weather{"place": "Ulm <|im_end|>"}<|endoftext|>'
    assert learned == f"{content or ''}{call}<|im_end|>two<|im_end|>" and not report.counts
    for template in (JinjaTemplate(CHATML, "test"), PlainTemplate()):
        with pytest.raises(UserError, match="line 7: an answer is blank but for tool_calls, which the chat template"):
            encoded(tokenizer, raw, template)
    for calls in ([], None):
        with pytest.raises(RowFault, match=r'blank|content" must be a string'):
            parse_row({"messages": [OPENAI["messages"][0], {**answer, "tool_calls": calls}]})


def test_what_a_template_does_not_write_is_counted(tokenizer: Tokenizer) -> None:
    answer = {"role": "assistant", "content": "two", "tool_calls": CALLS, "reasoning_content": "hm"}
    raw = {"messages": [OPENAI["messages"][0], answer], "tools": TOOLS}
    for template in (JinjaTemplate(CHATML, "test"), PlainTemplate()):
        text, _, report = encoded(tokenizer, raw, template)
        assert "weather" not in text and "hm" not in text
        assert report.counts == {
            f'"{key}" ignored: the chat template does not write it': 1
            for key in ("reasoning_content", "tool_calls", "tools")
        }
        assert "train.json line 7" in report.summary()


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        ({**PAIRS, "images": ["a.png"], "id": 7, "source": "web", "category": "qa"}, ["images"]),
        ({**PAIRS, "images": [], "knowledge": None, "label": ""}, []),
        ({**PAIRS, "context": {"system": "s", "knowledge": "k"}}, ["context.knowledge"]),
        ({**PAIRS, "context": "The text."}, ["context"]),
        ({**PAIRS, "label": "good"}, ["label"]),
        ({**PAIRS, "tools": {"name": "weather"}}, ["tools"]),
        ({**PAIRS, "tools": "weather"}, ["tools"]),
        ({**PAIRS, "output": "x"}, ["output"]),
        ({**ALPACA, "chosen": "x"}, ["chosen"]),
        ({"messages": [{**OPENAI["messages"][0], "images": ["a"]}, OPENAI["messages"][1]]}, ["messages.images"]),
        (
            {"conversations": [{**SHAREGPT["conversations"][0], "tool_calls": CALLS}, SHAREGPT["conversations"][1]]},
            ["conversations.tool_calls"],
        ),
        (
            {"messages": [OPENAI["messages"][0], {**OPENAI["messages"][1], "function_call": {"name": "f"}}]},
            ["messages.function_call"],
        ),
    ],
)
def test_keys_that_nobody_reads_are_named(raw: dict[str, Any], names: list[str], tokenizer: Tokenizer) -> None:
    assert encoded(tokenizer, raw)[2].counts == {f'"{name}" ignored': 1 for name in names}


def test_a_question_with_a_flag_is_not_learned_and_named(tokenizer: Tokenizer) -> None:
    turns = [{**OPENAI["messages"][0], "train": True, "weight": 1}, OPENAI["messages"][1]]
    _, learned, report = encoded(tokenizer, {"messages": turns})
    assert learned == "two<|im_end|>"
    assert report.counts == {'"messages.train" ignored: only answers are learned': 1}


def test_half_a_character_and_deep_tools_are_refused() -> None:
    deep: Any = "a"
    for _ in range(100):
        deep = [deep]
    with pytest.raises(RowFault, match='"tools" is nested too deeply'):
        row({**PAIRS, "tools": deep})
    with pytest.raises(RowFault, match='"tools" holds half of a surrogate pair'):
        row({**PAIRS, "tools": [{"name": "a\ud800"}]})


def test_training_and_prediction_name_what_they_ignore(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    data = tmp_path / "data"
    data.mkdir()
    answers = [{"role": "assistant", "content": "red", "weight": 0}, {"role": "assistant", "content": "blue"}]
    talk = [OPENAI["messages"][0], answers[0], OPENAI["messages"][2], answers[1]]
    (data / "train.json").write_text(json.dumps({"messages": talk, "tools": TOOLS, "images": ["a"]}) + "\n")
    run = tiny.run(tmp_path / "out", "--do_train", "--dry_run", "--dataset_name_or_path", data)
    assert "⟦blue<|im_end|>⟧" in run.out and "⟦red" not in run.out
    said = ['1 row: "images" ignored', '1 row: "tools" ignored: the chat template does not write it']
    assert all(line in run.out for line in said), run.out
    words = ["--model_name_or_path", tiny.model, "--data_file", data / "train.json", "--device", "cpu"]
    words += ["--output_file", tmp_path / "answers.json", "--max_length", 64, "--src_length", 60]
    answered = run_main("predictor", [str(word) for word in words], tiny.environment, tmp_path, 0)
    assert all(line in answered.err for line in said), answered.err


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.floats() | st.sampled_from(["", "a", "<|im_end|>", "a\ud800"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["system", "a"]), inner, max_size=2),
    max_leaves=6,
)
BESIDE = (
    *("system", "system_prompt", "context", "weight", "train", "loss", "label", "tools", "images", "id"),
    *("tool_calls", "reasoning_content", "output", "history", "input"),
)
EXTRA = st.dictionaries(st.sampled_from(BESIDE), JSON, max_size=3)


@pytest.mark.parametrize("form", ROWS)
@settings(deadline=None, max_examples=150)
@given(extra=EXTRA, of_turn=EXTRA)
def test_whatever_a_row_says_is_read_or_refused(
    form: str, extra: dict[str, Any], of_turn: dict[str, Any], tokenizer: Tokenizer
) -> None:
    raw = {**ROWS[form], **extra}
    if form in ("openai", "sharegpt"):
        (key, turns), *_ = ROWS[form].items()
        raw[key] = [turns[0], {**turns[1], **of_turn}, {**turns[2], **of_turn}, turns[3]]
    try:
        read = row(raw)
    except RowFault as fault:
        assert str(fault)
    else:
        report = DataReport()
        try:
            found = encode_row(read, tokenizer, JinjaTemplate(KNOWING, "test"), 256, 512, report)
        except UserError as error:  # a call without a name, say
            assert str(error).startswith("train.json line 7: test: the chat template refuses this conversation")
        else:
            assert isinstance(found, Example) or report.counts


def test_answers_that_are_not_to_be_learned_are_no_references(tmp_path: Path) -> None:
    args: Any = SimpleNamespace(
        dataset_name_or_path=str(tmp_path), task_name=None, max_train_samples=None, max_eval_samples=None
    )
    rows = [{**PAIRS, "label": [1, 0]}, PAIRS]
    (tmp_path / "dev.json").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert [one.line for one in load_rows(args, "dev")] == [2]
    (tmp_path / "dev.json").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match="no row's last answer is to be learned"):
        load_rows(args, "dev")


def test_keys_of_any_kind_and_number_can_be_reported(tokenizer: Tokenizer) -> None:
    report = DataReport()
    for number in range(200):
        keys = {f"key {number}": 1, "half\ud83d": 1, "line\nend": 1, "k" * 1000: 1}
        encode_row(row({**PAIRS, **keys}), tokenizer, PlainTemplate(), 256, 512, report)
    assert len(report.counts) <= 51 and report.counts["other keys ignored"] >= 100
    assert report.counts['"half\\ud83d" ignored'] == report.counts['"line end" ignored'] == 200
    json.dumps(report.to_json(), ensure_ascii=False).encode()
    assert max(map(len, report.remarks())) < 300
