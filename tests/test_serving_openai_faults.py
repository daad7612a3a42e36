"""The official client against a tiny model: what cannot be served is refused and named."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai_cases import HELLO, Client
from serving_processes import ServerProcess


@pytest.fixture(scope="module")
def tiny(tiny_server: ServerProcess) -> Client:
    return Client(tiny_server, "tiny")


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": ""}, "model"),
        ({"model": 5}, "model"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "tool", "content": "5", "tool_call_id": "1"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [USER, {"role": "assistant", "content": "a"}]}, "messages"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"9999999": 1}}, "logit_bias"),
        ({"stop_token_ids": [9999999]}, "stop_token_ids"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"n": 65}, "n"),
        ({"stop": ["x", "x" * 257]}, "stop"),
        ({"logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "logit_bias"),
        ({"stop_token_ids": [5] * 1025}, "stop_token_ids"),
        ({"repetition_penalty": 1e-9}, "repetition_penalty"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "response_format"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_grammar": "start: <[999999]>"}, "guided_grammar"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"messages": [{"role": "user", "content": "one " * 2000}]}, "messages"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_served_is_named(tiny: Client, fields: dict[str, Any], param: str, stream: bool) -> None:
    error = tiny.fault(tiny.chat, [USER], stream=stream, extra_body=fields)
    assert error.status_code in (400, 404) and str(error.param).startswith(param)
    assert error.type == "invalid_request_error" and isinstance(error, openai.APIStatusError)
    assert "Traceback" not in error.message and "/" not in error.message


def test_too_many_answers_to_all_prompts(tiny: Client) -> None:
    error = tiny.fault(tiny.complete, ["a"] * 40, n=2)
    assert error.status_code == 400 and error.param == "n"
    error = tiny.fault(tiny.complete, ["a"] * 80)
    assert error.status_code == 400 and error.param == "prompt"


def test_usage_of_a_stream_that_is_none(tiny: Client) -> None:
    error = tiny.fault(tiny.chat, HELLO, stream_options={"include_usage": True})
    assert error.status_code == 400 and error.param == "stream_options"
