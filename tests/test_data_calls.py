"""Conversations with calls of functions and what these give: trained on as they are asked with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import CHATML, write_bpe
from tool_templates import HERMES, NAMED, tool

from utils.data.encode import DataReport, Example, encode_row, encode_source
from utils.data.lines import Line, RowFault
from utils.data.rows import Row, parse_row, to_row
from utils.data.template import JinjaTemplate
from utils.errors import UserError
from utils.families.tokenizers import Tokenizer, load_tokenizer

ARGUMENTS = {"city": "Oslo", "days": [1, "ü"]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bpe")
    return load_tokenizer(folder, write_bpe(folder))


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def conversation(arguments: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "Will it rain?"},
            {"role": "assistant", "content": None, "tool_calls": [call(arguments), call({})]},
            {"role": "tool", "content": "yes", "tool_call_id": "call12345", "name": "weather"},
            {"role": "tool", "content": "no"},
            {"role": "assistant", "content": "It may."},
            {"role": "user", "content": "Thanks."},
            {"role": "assistant", "content": "Welcome."},
        ],
        "tools": [tool("weather")],
    }


def row_of(raw: dict[str, Any]) -> Row:
    return to_row(Line(1, raw, None), Path("train.json"))


@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS)], ids=["object", "text"])
@pytest.mark.parametrize("text", [HERMES, NAMED], ids=["takes objects", "takes text"])
def test_calls_are_learned_and_results_are_not(tokenizer: Tokenizer, text: str, arguments: Any) -> None:
    template, row = JinjaTemplate(text, "test"), row_of(conversation(arguments))
    assert row.ignored == ()
    example = encode_row(row, tokenizer, template, 900, 1000, DataReport())
    assert isinstance(example, Example)
    ids, supervised = template.encode_conversation(tokenizer, row.messages, row.tools)
    learned = tokenizer.decode([token for token, flag in zip(ids, supervised, strict=True) if flag])
    assert json.dumps(ARGUMENTS, ensure_ascii=False) in learned or json.dumps(ARGUMENTS) in learned
    assert learned.endswith("It may.Welcome.") and "yes" not in learned
    asked = template.encode_prompt(tokenizer, row.messages[:4], row.tools)
    assert ids[: len(asked)] == asked and "yes" in tokenizer.decode(asked)


def test_results_need_a_template_that_knows_tools(tokenizer: Tokenizer) -> None:
    raw = conversation({})
    raw["messages"][1]["content"] = "I look."
    with pytest.raises(UserError, match="line 1: a turn of a tool, which the chat template does not write"):
        encode_row(row_of(raw), tokenizer, JinjaTemplate(CHATML, "test"), 900, 1000)


def test_a_row_may_not_end_with_a_result_or_begin_with_one() -> None:
    messages = conversation({})["messages"]
    for turns in (messages[:3], messages[2:], [messages[0], messages[2], messages[4]]):
        with pytest.raises(RowFault, match=r"last turn has no answer|must be the"):
            parse_row({"messages": turns})
    assert len(parse_row({"messages": messages[:3]}, require_answer=False)) == 3


def test_the_oldest_round_goes_with_its_calls_and_results(tokenizer: Tokenizer) -> None:
    template, row = JinjaTemplate(HERMES, "test"), row_of(conversation(ARGUMENTS))
    asked = row.messages[:6]
    whole = template.encode_prompt(tokenizer, asked)
    last = template.encode_prompt(tokenizer, asked[5:])
    ids, was_cut = encode_source(asked, tokenizer, template, len(last))
    assert was_cut and ids == last and len(last) < len(whole)
