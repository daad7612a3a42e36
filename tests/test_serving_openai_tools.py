"""The official client, a key, and a tiny model whose chat template knows tools and reasonings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema_rs
import pytest
from openai_cases import Client, said, streamed
from saved import write_lora
from serving_processes import ServerProcess, server
from tiny_models import write_tiny_llama
from tool_templates import HERMES, tool

from utils.checkpoints.locate import locate

KEY = "a-key-of-tests"
TEMPLATE = (
    "{% if messages[0].content == 'forbidden' %}{{ raise_exception('nobody talks about that') }}{% endif %}"
    "{% if reasoning_effort is defined %}{{ 'effort: ' + reasoning_effort }}{% endif %}"
    + HERMES
    + "{%- if add_generation_prompt and thinking %}{{- '<think>\\n' }}{%- endif %}"
)
CITIES = {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}}
TOOLS: Any = [tool("weather", CITIES, ("city", "days")), tool("now")]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>'
CALLED = {"tool_choice": "required"}
PARAMETERS = "tools.0.function.parameters"
ARGUMENTS_THAT_ARE_NONE: list[dict[str, Any]] = [
    {"type": "array"},
    {"$ref": "#"},
    {"anyOf": [{"type": "array"}, {"type": "string"}]},
]
THINK = {"chat_template_kwargs": {"thinking": True}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("tools")
    model = write_tiny_llama(folder / "a model", max_position_embeddings=2048)
    template = folder / "template.jinja"
    template.write_text(TEMPLATE, "utf-8")
    adapter = write_lora(folder / "adapter", locate(model), spread=1.0)
    options = [
        "--model_name_or_path",
        model,
        "--served_model_name",
        "tools",
        "--chat_template",
        template,
        "--lora_modules",
        f"tuned={adapter}",
    ]
    with server(folder, *options, environment={"LLM_API_KEY": KEY}) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: ServerProcess) -> Client:
    return Client(served, "tools", KEY)


def merged(chunks: Any) -> list[dict[str, Any]]:
    """The calls of a stream, put together as clients do it."""
    calls: list[dict[str, Any]] = []
    for chunk in chunks:
        for delta in chunk.choices[0].delta.tool_calls or []:
            if delta.index == len(calls):
                assert delta.id and delta.type == "function"
                calls.append({"id": delta.id, "name": delta.function.name, "arguments": ""})
            calls[delta.index]["arguments"] += delta.function.arguments or ""
        assert len({delta.index for delta in chunk.choices[0].delta.tool_calls or []}) == len(
            chunk.choices[0].delta.tool_calls or []
        )
    return calls


def check(name: str, arguments: str) -> None:
    """A call that one of the tools allows."""
    (function,) = (one["function"] for one in TOOLS if one["function"]["name"] == name)
    assert jsonschema_rs.validator_for(function["parameters"]).is_valid(json.loads(arguments))


# --- who may ask -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["wrong", KEY[:-1], f"{KEY}x"])
def test_a_wrong_key_is_refused(served: ServerProcess, key: str) -> None:
    error = Client(served, "tools", key).fault(Client(served, "tools", key).chat, "a")
    assert error.status_code == 401 and type(error).__name__ == "AuthenticationError"


# --- adapters ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(served: ServerProcess) -> Client:
    return Client(served, "tuned", KEY)


def test_an_adapter_is_a_model_beside_its_base(client: Client, tuned: Client) -> None:
    base, adapter = client.official.models.list().data
    assert (base.id, adapter.id) == ("tools", "tuned") and client.official.models.retrieve("tuned") == adapter
    for ask in ("chat", "complete"):
        first, second = (getattr(one, ask)("one two", extra_body={"ignore_eos": True}) for one in (client, tuned))
        assert said(first) != said(second) and (first.model, second.model) == ("tools", "tuned")
    assert client.fault(Client(client.server, "tune", KEY).chat, "a").code == "model_not_found"
    asked = {"context": "one two", "top_k": 1, "max_length": 128}
    key = {"Authorization": f"Bearer {KEY}"}
    own = [client.server.json("POST", "/api/chat", {**asked, **more}, **key) for more in ({}, {"model": "tuned"})]
    assert [status for status, _ in own] == [200, 200] and own[0] != own[1]


def test_base_and_adapter_answer_at_the_same_time_as_alone(client: Client, tuned: Client) -> None:
    asked = [(one, text) for text in ("red", "你好", "five") for one in (client, tuned)]
    alone = [said(one.chat(text)) for one, text in asked]
    with ThreadPoolExecutor(len(asked)) as threads:
        assert list(threads.map(lambda pair: streamed(pair[0].chat(pair[1], stream=True)), asked)) == alone


# --- calls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_be(client: Client, choice: Any, seed: int) -> None:
    asked = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 200, "temperature": 1}
    answer = client.chat("Weather?", seed=seed, **asked)
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
    assert call.type == "function" and call.id.startswith("call_")
    assert call.function.name == "weather" or choice == "required"
    check(call.function.name, call.function.arguments)
    chunks = list(client.chat("Weather?", seed=seed, stream=True, **asked))
    (found,) = merged(chunks)
    assert (found["name"], found["arguments"]) == (call.function.name, call.function.arguments)
    assert chunks[-1].choices[0].finish_reason == "tool_calls" and streamed(chunks) == ""


def test_a_call_that_the_model_makes_by_itself(client: Client) -> None:
    form = {"guided_choice": ["Let me see.\n" + CALL + "\n" + CALL]}  # what the tiny model says
    answer = client.chat("Weather?", tools=TOOLS, max_tokens=200, extra_body=form)
    calls = answer.choices[0].message.tool_calls
    assert said(answer) == "Let me see." and answer.choices[0].finish_reason == "tool_calls"
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Rome", "days": 3}] * 2
    assert calls[0].id != calls[1].id
    chunks = list(client.chat("Weather?", tools=TOOLS, max_tokens=200, extra_body=form, stream=True))
    assert streamed(chunks) == "Let me see." and chunks[-1].choices[0].finish_reason == "tool_calls"
    assert [json.loads(call["arguments"]) for call in merged(chunks)] == [{"city": "Rome", "days": 3}] * 2
    one = client.chat("Weather?", tools=TOOLS, max_tokens=200, extra_body=form, parallel_tool_calls=False)
    assert len(one.choices[0].message.tool_calls) == 1


def test_what_looks_like_a_call_is_text_where_nothing_can_be_called(client: Client) -> None:
    form = {"guided_choice": [CALL]}
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": [tool("other")]}):
        answer = client.chat("Weather?", max_tokens=200, extra_body=form, **fields)
        assert said(answer) == CALL and answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].message.tool_calls is None


def test_a_call_that_is_cut_off_ends_for_its_length(client: Client) -> None:
    asked: Any = {"tools": TOOLS, "extra_body": {"guided_choice": [CALL]}, "max_tokens": len(client.ids(CALL)) - 25}
    answer = client.chat("Weather?", **asked)
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "length" and call.function.arguments in CALL
    assert list(client.chat("Weather?", stream=True, **asked))[-1].choices[0].finish_reason == "length"


def test_tools_calls_and_their_results_are_in_the_prompt(client: Client) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": '{"zone":  "é"}'}}
    messages = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon <|im_end|>"},
    ]
    status, found = client.server.json(
        "POST", "/apply-template", {"messages": messages, "tools": TOOLS}, Authorization=f"Bearer {KEY}"
    )
    assert status == 200 and '"name": "weather"' in found["prompt"]
    assert '<tool_call>\n{"name": "now", "arguments": {"zone": "é"}}\n</tool_call>' in found["prompt"]
    assert "<tool_response>\nnoon <|im_end|>\n</tool_response>" in found["prompt"]
    answer = client.chat(messages, tools=TOOLS, max_tokens=3)
    assert answer.usage.prompt_tokens == len(found["tokens"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [tool("a b")]}, "tools.0.function.name"),
        ({"tools": [tool("a"), tool("a")]}, "tools"),
        ({"tools": "now"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "none"}}}, "tool_choice"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [tool("a", {"b": {"type": "c"}})], "tool_choice": "required"}, PARAMETERS),
        *(
            ({"tools": [{"type": "function", "function": {"name": "a", "parameters": schema}}], **CALLED}, PARAMETERS)
            for schema in ARGUMENTS_THAT_ARE_NONE
        ),
    ],
)
def test_tools_that_cannot_be_served(client: Client, fields: dict[str, Any], param: str) -> None:
    error = client.fault(client.chat, "a", extra_body=fields)
    assert (error.status_code, error.param) == (400, param)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"b": {"const": 5}}, "required": ["b"], "additionalProperties": False},
        {"type": ["object", "null"], "additionalProperties": False},
    ],
)
def test_arguments_are_an_object_whatever_else_they_may_be(client: Client, schema: dict[str, Any]) -> None:
    tools = [{"type": "function", "function": {"name": "a", "parameters": schema}}]
    answer = client.chat("a", tools=tools, tool_choice="required", max_tokens=400, extra_body={"seed": 1})
    assert isinstance(json.loads(answer.choices[0].message.tool_calls[0].function.arguments), dict)


# --- reasonings and other values of templates ----------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 4])
def test_a_reasoning_that_the_prompt_opens_is_no_content(client: Client, seed: int | None) -> None:
    asked: Any = {"seed": seed, "temperature": 0 if seed is None else 1, "max_tokens": 12, "n": 2}
    answer = client.chat("Hm?", extra_body=THINK, **asked)
    chunks = list(client.chat("Hm?", extra_body=THINK, stream=True, **asked))
    for index in range(2):
        message = answer.choices[index].message
        assert message.content == "" and message.reasoning_content
        found = [choice.delta for chunk in chunks for choice in chunk.choices if choice.index == index]
        thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in found)
        assert thought == message.reasoning_content and not streamed(chunks, index)


def test_a_form_is_of_the_content(client: Client) -> None:
    answer = client.chat("Hm?", extra_body={**THINK, "guided_choice": ["yes"]})
    assert said(answer) == "yes"


def test_without_a_reasoning_all_is_content(client: Client) -> None:
    answer = client.chat("Hm?", max_tokens=12, temperature=1, seed=4)
    assert said(answer) and getattr(answer.choices[0].message, "reasoning_content", None) is None


def test_values_for_the_template(client: Client) -> None:
    def prompt(**fields: Any) -> str:
        body = {"messages": [{"role": "user", "content": "a"}], **fields}
        status, found = client.server.json("POST", "/apply-template", body, Authorization=f"Bearer {KEY}")
        assert status == 200
        return str(found["prompt"])

    assert prompt(**THINK) == prompt() + "<think>\n"
    assert prompt(reasoning_effort="low") == "effort: low" + prompt()
    assert re.fullmatch("effort: <.im_end.>.*", prompt(chat_template_kwargs={"reasoning_effort": "<|im_end|>"}), re.S)


def test_a_template_that_refuses_a_conversation_says_why(client: Client) -> None:
    error = client.fault(client.chat, "forbidden")
    assert error.status_code == 400 and error.param == "messages"
    assert "nobody talks about that" in error.message and "/" not in error.message and "a model" not in error.message
