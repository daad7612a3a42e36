"""Calls of functions: forms are learned from templates, answers are read in any pieces, grammars force calls."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from dice import dice, generator_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, write_bpe
from tool_templates import HERMES, TEMPLATES, tool, write_marked

from utils.data.template import JinjaTemplate, Message, PlainTemplate
from utils.families.tokenizers import Tokenizer, load_tokenizer
from utils.inference.constraint import check
from utils.inference.generator import Completion
from utils.inference.grammar import Grammar
from utils.inference.sampling import SamplingOptions
from utils.serving.tools import CallForm, CallReader, Visible, form_of, read_answer

TOOLS = [
    tool(
        "weather",
        {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        ("city",),
    ),
    tool("now"),
    {"type": "function", "function": {"name": "bare-1"}},
]
NAMES = [str(one["function"]["name"]) for one in TOOLS]
MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<calls>", "<sep>")


@pytest.fixture(scope="module", params=["text", "added", "special"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Marks are mere text, tokens, or special tokens."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "text":
        return load_tokenizer(folder, write_bpe(folder))
    return write_marked(folder, *MARKS, special=request.param == "special")


@pytest.fixture(scope="module", params=list(TEMPLATES))
def template(request: pytest.FixtureRequest) -> JinjaTemplate:
    return TEMPLATES[request.param]


@pytest.fixture(scope="module")
def form(template: JinjaTemplate, tokenizer: Tokenizer) -> CallForm:
    found = form_of(template, tokenizer)
    assert found is not None
    return found


def answer_of(
    template: JinjaTemplate, tokenizer: Tokenizer, calls: list[tuple[str, Any]], content: str = ""
) -> list[int]:
    """The tokens that a template writes for an answer that calls functions, without its end."""
    written: list[Any] = [
        {
            "id": f"call{place:05}",
            "type": "function",
            "function": {"name": name, "arguments": arguments if place else json.dumps(arguments)},
        }
        for place, (name, arguments) in enumerate(calls)
    ]
    messages: list[Message] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": content, "tool_calls": written},
    ]
    rounds, _ = template.rounds(tokenizer, messages, TOOLS)
    return rounds[-1].answer[:-1]


def pairs(calls: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    assert all(call["type"] == "function" and call["id"] for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def joined(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls that the deltas of a stream make."""
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if delta["index"] == len(calls):
            calls.append({**delta, "function": dict(delta["function"])})
        else:
            assert delta["index"] == len(calls) - 1 and delta.keys() == {"index", "function"}
            calls[-1]["function"]["arguments"] += delta["function"]["arguments"]
    return calls


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8"), max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text("abc}]\"'{ü\n", max_size=4), VALUES, max_size=3))


@settings(max_examples=40, deadline=None)
@given(calls=st.lists(CALLS, min_size=1, max_size=3), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_calls_that_a_template_writes_are_read_again(
    template: JinjaTemplate, tokenizer: Tokenizer, form: CallForm, calls: list[tuple[str, Any]], sizes: list[int]
) -> None:
    calls = calls if form.between is not None else calls[:1]
    tokens = answer_of(template, tokenizer, calls)
    text = Visible(form, tokenizer).push(tokens, last=True)
    content, found = read_answer(form, TOOLS, text)
    assert content == "" and pairs(found) == calls
    marks, reader, deltas = Visible(form, tokenizer), CallReader(form, TOOLS), list[dict[str, Any]]()
    done = 0
    while done < len(tokens):
        size = sizes[done % len(sizes)]
        said = reader.push(marks.push(tokens[done : done + size]))
        assert not said.content
        deltas += said.calls
        done += size
    said = reader.push(marks.push([], last=True), last=True)
    assert not said.content and reader.called
    assert pairs(joined(deltas + said.calls)) == calls


def test_marks_that_are_special_tokens_are_known(template: JinjaTemplate, tokenizer: Tokenizer, form: CallForm) -> None:
    hidden = tokenizer.special_ids
    assert set(form.special) == {
        mark for mark in MARKS if mark in form.before + form.after and tokenizer.token_id(mark) in hidden
    }


def test_templates_without_calls_have_no_form(tokenizer: Tokenizer) -> None:
    assert form_of(PlainTemplate(), tokenizer) is None
    assert form_of(JinjaTemplate(CHATML, "test"), tokenizer) is None
    odd = HERMES.replace("tool_call.arguments | tojson", "tool_call.arguments | length")
    assert form_of(JinjaTemplate(odd, "test"), tokenizer) is None


def test_a_thought_before_a_call_is_no_part_of_the_form(tokenizer: Tokenizer) -> None:
    thinking = HERMES.replace("{{- '\\n<tool_call>", "{{- '\\n<think>\\n\\n</think>\\n\\n<tool_call>", 1)
    found = form_of(JinjaTemplate(thinking, "test"), tokenizer)
    assert found is not None and found.before.startswith("<tool_call>")


# --- texts as models write them -------------------------------------------------------------------------


def marked(text: str) -> str:
    return f"<tool_call>{text}</tool_call>"


NOW = '{"name": "now", "arguments": {}}'
BARE = '{"name": "now", "parameters": {"a": 1}}'
NAMED = "<calls><call>function<sep>{}\n```json\n{{}}\n```</call></calls>"
UNKNOWN = NOW.replace("now", "x")
# what a model writes, in which form, and what is read: the text, and the arguments of each call of `now`
READ: dict[str, tuple[str, str, str, list[Any]]] = {
    "text": ("Just text. ", "hermes", "Just text. ", []),
    "text before": ("I look.\n" + marked(NOW), "hermes", "I look.", [{}]),
    "text behind": (marked(NOW) + "\nDone.", "hermes", "\nDone.", [{}]),
    "no blanks": (marked('{"name":"now","arguments":{}}'), "hermes", "", [{}]),
    "other order": (marked('{"arguments": {"a": [1]}, "name": "now"}'), "hermes", "", [{"a": [1]}]),
    "other key": (marked(BARE), "hermes", "", [{"a": 1}]),
    "arguments as text": (marked(r'{"name": "now", "arguments": "{\"a\": 1}"}'), "hermes", "", [{"a": 1}]),
    "line end in a text": (marked(BARE.replace("1", '"b\nc"')), "hermes", "", [{"a": "b\nc"}]),
    "no end mark": ("<tool_call>\n" + BARE.replace("1", '"}"'), "hermes", "", [{"a": "}"}]),
    "a brace too few": (marked(NOW[:-1]) + marked(NOW), "hermes", "", [{}, {}]),
    "several": (marked(NOW) + marked(BARE) + "\n" + marked(NOW), "hermes", "", [{}, {"a": 1}, {}]),
    "unknown function": (marked(UNKNOWN), "hermes", marked(UNKNOWN), []),
    "broken": (marked(BARE.replace(": 1", " 1")) + " b", "hermes", marked(BARE.replace(": 1", " 1")) + " b", []),
    "no JSON": (marked("now()"), "hermes", marked("now()"), []),
    "no JSON, then a call": (marked("now()") + marked(NOW), "hermes", marked("now()"), [{}]),
    "half a mark": ("a <tool_c", "hermes", "a <tool_c", []),
    "cut before the name": ('a <tool_call>{"na', "hermes", 'a <tool_call>{"na', []),
    "bare": (BARE, "bare", "", [{"a": 1}]),
    "bare with blanks": (' \n{ "name" : "now" , "arguments":{} } ', "bare", "", [{}]),
    "bare with a type": ('{"type": "function", ' + BARE[1:], "bare", "", [{"a": 1}]),
    "bare within a function": (f'{{"type": "function", "function": {BARE}}}', "bare", "", [{"a": 1}]),
    "bare, several": (f"{BARE}; {NOW}\n{NOW}", "bare", "", [{"a": 1}, {}, {}]),
    "bare list": (f"[{BARE}, {NOW}]", "bare", "", [{"a": 1}, {}]),
    "other JSON": ('{"answer": 4}', "bare", '{"answer": 4}', []),
    "JSON later": (f"See {BARE}", "bare", f"See {BARE}", []),
    "a list of other things": ("[1] says so", "bare", "[1] says so", []),
    "list": (f'[TOOL_CALLS] [{NOW}, {BARE[:-1]}, "id": "123456789"}}]', "list", "", [{}, {"a": 1}]),
    "list of one without a list": (f"[TOOL_CALLS]{NOW}", "list", "", [{}]),
    "list of an unknown function": (f"[TOOL_CALLS] [{UNKNOWN}]", "list", f"[TOOL_CALLS] [{UNKNOWN}]", []),
    "named": ("Well." + NAMED.format("now"), "named", "Well.", [{}]),
    "named, several": (NAMED.format("now") * 2, "named", "", [{}, {}]),
    "named, unknown": (NAMED.format("x"), "named", NAMED.format("x"), []),
}


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CallForm]:
    folder = tmp_path_factory.mktemp("plain")
    tokenizer = load_tokenizer(folder, write_bpe(folder))
    return {name: form for name, one in TEMPLATES.items() if (form := form_of(one, tokenizer)) is not None}


@pytest.mark.parametrize("case", READ)
@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_answers_as_models_write_them(forms: dict[str, CallForm], case: str, size: int) -> None:
    text, name, content, calls = READ[case]
    whole, found = read_answer(forms[name], TOOLS, text)
    assert (whole, pairs(found)) == (content, [("now", arguments) for arguments in calls])
    reader = CallReader(forms[name], TOOLS)
    said = [reader.push(text[start : start + size]) for start in range(0, len(text), size)]
    said.append(reader.push("", last=True))
    deltas = [delta for one in said for delta in one.calls]
    if case != "broken":  # a stream cannot take back what it has told
        assert "".join(one.content for one in said) == content
        assert pairs(joined(deltas)) == pairs(found)
        assert reader.called == bool(calls)


def test_a_call_that_is_cut_is_a_call_without_an_end(forms: dict[str, CallForm]) -> None:
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Os'
    content, (call,) = read_answer(forms["hermes"], TOOLS, text)
    assert content == "" and call["function"] == {"name": "weather", "arguments": '{"city": "Os'}


def test_arguments_come_as_they_are_written(forms: dict[str, CallForm]) -> None:
    reader = CallReader(forms["hermes"], TOOLS)
    (begun,) = reader.push('<tool_call>\n{"name": "weather", "arguments": {').calls[:1]
    assert begun["function"] == {"name": "weather", "arguments": ""} and begun["index"] == 0
    assert [delta["function"] for delta in reader.push('"city": "Oslo').calls] == [{"arguments": '"city": "Oslo'}]


def test_only_the_first_call_where_one_is_asked_for(forms: dict[str, CallForm]) -> None:
    text = marked(NOW) + marked(NOW) + " and more"
    content, calls = read_answer(forms["hermes"], TOOLS, text, parallel=False)
    assert (content, len(calls)) == ("", 1)


def test_ids_have_the_length_that_a_template_insists_on(forms: dict[str, CallForm]) -> None:
    (call,) = read_answer(forms["list"], TOOLS, READ["list"][0], parallel=False)[1]
    assert re.fullmatch("[a-zA-Z0-9]{9}", call["id"])


def test_stop_words_end_visible_text_as_they_end_others(tmp_path: Path) -> None:
    tokenizer = write_marked(tmp_path, "[TOOL_CALLS]")
    form = form_of(TEMPLATES["list"], tokenizer)
    assert form is not None
    tokens = [tokenizer.token_id("[TOOL_CALLS]"), *tokenizer.encode_text("one two three"), tokenizer.eos_id]
    marks = Visible(form, tokenizer, ["tw"], [tokenizer.eos_id])
    assert "".join(marks.push([token]) for token in tokens if token is not None) == "[TOOL_CALLS]one "
    assert marks.push([], last=True) == ""


# --- answers that must call -----------------------------------------------------------------------------


def generate(tokenizer: Tokenizer, grammars: list[Grammar], seed: int) -> list[Completion]:
    options = SamplingOptions(max_new_tokens=300, top_k=0, temperature=1.2, seed=seed)
    generator = generator_of(tokenizer, dice(tokenizer, seed))
    return generator.generate([[5]] * len(grammars), [replace(options, grammar=grammar) for grammar in grammars])


def test_answers_that_must_call_a_function(tokenizer: Tokenizer, form: CallForm) -> None:
    grammars = [
        *[form.grammar(TOOLS)] * 6,
        *[form.grammar(TOOLS, "weather")] * 3,
        *[form.grammar(TOOLS, parallel=False)] * 3,
    ]
    check(grammars[0])
    schemas = {one["function"]["name"]: one["function"].get("parameters", True) for one in TOOLS}
    for place, found in enumerate(generate(tokenizer, grammars, 3)):
        text = Visible(form, tokenizer, (), tokenizer.eos_ids).push(found.tokens, last=True)
        content, calls = read_answer(form, TOOLS, text)
        assert found.finish_reason == "stop" or place < 6  # dice may call on and on
        calls = calls if found.finish_reason == "stop" else calls[:-1]
        assert content == "" or found.finish_reason == "length"
        assert calls, text
        for name, arguments in pairs(calls):
            assert jsonschema_rs.validator_for(schemas[name]).is_valid(arguments), (name, arguments)
        if place in range(6, 9):
            assert [call["function"]["name"] for call in calls] == ["weather"]
        if place > 8:
            assert len(calls) == 1
