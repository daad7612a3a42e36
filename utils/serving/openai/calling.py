"""The functions that a chat may call, as its request says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from utils.data.template import ChatTemplate, Tools
from utils.errors import UserError
from utils.families.tokenizers import Tokenizer
from utils.inference.constraint import check
from utils.inference.grammar import Grammar
from utils.serving.errors import ApiError
from utils.serving.openai.schema import NO_TOOLS, ChatRequest, NamedTool, tools_of
from utils.serving.tools import CallForm, arguments_schema, form_of
from utils.settings import shown

form_of_calls = lru_cache(maxsize=64)(form_of)  # it renders examples


@dataclass(frozen=True)
class Calling:
    """Functions that an answer may call.

    Attributes:
        form: how the model writes calls.
        tools: as the chat template gets them.
        parallel: whether an answer may have several calls.
        grammar: of an answer that must call; None leaves it to the model.
    """

    form: CallForm
    tools: Tools
    parallel: bool
    grammar: Grammar | None


def calling_of(request: ChatRequest, template: ChatTemplate, tokenizer: Tokenizer) -> Calling | None:
    """None if there is nothing to call.

    Raises:
        ApiError: 400, the model's template knows no calls, or what must be called is not there.
    """
    tools, choice = tools_of(request), request.tool_choice
    if choice == "none" or (tools is None and choice in (None, "auto")):
        return None
    if tools is None:
        raise ApiError(400, "tool_choice: there are no tools to call", param="tool_choice")
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "tools: two functions have the same name", param="tools")
    form = form_of_calls(template, tokenizer)
    if form is None:
        raise ApiError(400, NO_TOOLS, param="tools")
    if request.response_format is not None and request.response_format.type != "text":
        text = 'response_format: not together with tools, unless tool_choice is "none"'
        raise ApiError(400, text, param="response_format")
    parallel = request.parallel_tool_calls is not False
    name = choice.function.name if isinstance(choice, NamedTool) else None
    if name is not None and name not in names:
        raise ApiError(400, f"tool_choice: there is no function {name!r:.80} among tools", param="tool_choice")
    grammar = None
    if name is not None or choice == "required":
        grammar = form.grammar(tools, name, parallel=parallel)
        _check_parameters(tools, name, grammar)
    return Calling(form, tools, parallel, grammar)


def _check_parameters(tools: Tools, name: str | None, grammar: Grammar) -> None:
    """
    Args:
        name: of the only function that may be called; None is any.
        grammar: of the calls.

    Raises:
        ApiError: 400, arguments that are no object, or that cannot be made.
    """
    fault = _fault(grammar)
    for place, tool in enumerate(tools):
        function = tool["function"]
        if name not in (None, function["name"]):
            continue
        schema = arguments_schema(function)
        found = None
        if schema["type"] != "object":
            found = f'the type of arguments must be "object", not {shown(schema["type"])}'
        elif fault is not None:
            found = _fault(Grammar("json_schema", json.dumps(schema)))
        if found is not None:
            field = f"tools.{place}.function.parameters"
            raise ApiError(400, f"{field}: {function['name']} cannot be called: {found}", param=field)
    if fault is not None:
        raise ApiError(400, f"tools: {fault}", param="tools")


def _fault(grammar: Grammar) -> str | None:
    """Why a form cannot be followed."""
    try:
        check(grammar)
    except UserError as error:
        return str(error)
    return None


def joined(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One delta for each call, since clients take those of one chunk for different calls."""
    found: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        known = found.setdefault(delta["index"], delta)
        if known is not delta:
            known["function"]["arguments"] = known["function"].get("arguments", "") + delta["function"]["arguments"]
    return list(found.values())
