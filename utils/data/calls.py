"""Calls of functions on their way into a chat template: some want their arguments as JSON text, most as objects."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from utils.data.keys import checked
from utils.data.lines import RowFault
from utils.errors import UserError

# What nobody else writes, so that it is found again in what a template makes of it.
NAMES = ("zqfirstqz", "zqsecondqz")
KEY, VALUE = "zqkeyqz", "zqvalueqz"
IDS = ("zq7first9", "zq7secnd9")  # nine letters and digits, as some templates insist
_ARGUMENTS = re.compile(rf'\{{\s*"{KEY}"\s*:\s*"{VALUE}"\s*\}}')


def example_tools() -> list[dict[str, Any]]:
    """Descriptions of two functions."""
    parameters = {"type": "object", "properties": {KEY: {"type": "string"}}, "required": [KEY]}
    functions = [{"name": name, "description": "a", "parameters": parameters} for name in NAMES]
    return [{"type": "function", "function": function} for function in functions]


def example_calls(count: int) -> list[dict[str, Any]]:
    """So many calls of them, with arguments as JSON text."""
    text = json.dumps({KEY: VALUE})
    return [
        {"id": IDS[place], "type": "function", "function": {"name": NAMES[place], "arguments": text}}
        for place in range(count)
    ]


def takes_text(compiled: Any, origin: str) -> bool:
    """Whether a template writes the arguments of calls as the JSON text that they are; others make that of objects."""
    from utils.data.jinja import render_jinja

    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": example_calls(1)},
    ]
    values = {
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), ""),
        "messages": messages,
        "tools": example_tools(),
        "documents": None,
        "add_generation_prompt": False,
    }
    try:
        written = render_jinja(compiled, origin, values)
    except UserError:  # such as one that goes through the arguments
        return False
    return _ARGUMENTS.search(written) is not None


def with_arguments(calls: Sequence[Any], *, as_text: bool) -> list[Any]:
    """Calls of a message with their arguments as the template takes them; what is no JSON, or too deep, stays text."""
    return [_with_arguments(call, as_text) for call in calls]


def _with_arguments(call: Any, as_text: bool) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"], as_text)}
    arguments = call.get("arguments")
    if isinstance(arguments, str) and not as_text:
        with suppress(ValueError, RecursionError, RowFault):
            return {**call, "arguments": checked(json.loads(arguments or "{}"), "arguments")}
    elif isinstance(arguments, Mapping) and as_text:
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return call
