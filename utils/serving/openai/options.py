"""From the fields of a request to the options of the scheduler."""

from __future__ import annotations

import json
from typing import Any

from utils.errors import UserError
from utils.inference.constraint import check
from utils.inference.grammar import Grammar
from utils.inference.loading import Prepared
from utils.inference.sampling import SamplingOptions
from utils.serving.errors import ApiError
from utils.serving.openai.prompts import check_ids, vocabulary
from utils.serving.openai.schema import Generation, ResponseFormat

ANSWER_TOKENS = 16  # of /v1/completions, as OpenAI's API has it


def sampling_options(
    request: Generation, prepared: Prepared, *, budget: int, grammar: Grammar | None, **more: Any
) -> SamplingOptions:
    """How to answer.

    Args:
        budget: most tokens of the answer.
        grammar: the form of the answer.
        more: options about log-probabilities.

    Raises:
        ApiError: 400, fields that contradict each other or the model.
    """
    shortest = request.min_tokens or 0
    if request.best_of not in (None, request.answers):
        raise ApiError(400, f"best_of: expected the same as n ({request.answers}), or nothing", param="best_of")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options: only with stream", param="stream_options")
    check_ids(request.stop_token_ids or (), prepared, "stop_token_ids")
    stop = request.stop or ()
    return SamplingOptions(
        max_new_tokens=budget,
        min_new_tokens=min(shortest, budget),
        temperature=_given(request.temperature, 1.0),
        top_k=max(request.top_k or 0, 0),
        top_p=_given(request.top_p, 1.0),
        min_p=request.min_p or 0.0,
        repetition_penalty=_given(request.repetition_penalty, 1.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        seed=None if request.seed is None else request.seed % 2**64,
        logit_bias=_biases(request, prepared),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        grammar=grammar,
        **more,
    )


def answer_budget(asked: int | None, field: str, default: int, left: int, request: Generation) -> int:
    """Most tokens of an answer: what was asked for, as far as there is room.

    Args:
        asked: None takes the default.
        field: the name of what was asked.
        left: tokens that there is room for.

    Raises:
        ApiError: 400, min_tokens is above it.
    """
    budget = default if asked is None else asked
    if request.min_tokens is not None and request.min_tokens > budget:
        text = f"min_tokens: expected at most {field} ({budget}), found {request.min_tokens}"
        raise ApiError(400, text, param="min_tokens")
    return min(budget, left)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _biases(request: Generation, prepared: Prepared) -> tuple[tuple[int, float], ...]:
    known = vocabulary(prepared)
    found = []
    for name, bias in (request.logit_bias or {}).items():
        if not (name.isascii() and name.isdigit() and len(name) < 12 and int(name) < known):
            text = f"logit_bias: expected ids of the model's {known} tokens, found {name!r:.60}"
            raise ApiError(400, text, param="logit_bias")
        found.append((int(name), float(bias)))
    return tuple(found)


def grammar_of(request: Generation, prepared: Prepared) -> Grammar | None:
    """The form that the answer must have; None is free.

    Raises:
        ApiError: 400, several forms, or one that cannot be followed.
    """
    forms: dict[str, Grammar] = {}
    if request.response_format is not None and (form := _of_format(request.response_format)) is not None:
        forms["response_format"] = form
    forms |= _guided(
        "guided_", request.guided_json, request.guided_regex, request.guided_choice, request.guided_grammar
    )
    if (asked := request.structured_outputs) is not None:
        forms |= _guided("structured_outputs.", asked.json_, asked.regex, asked.choice, asked.grammar)
        if asked.json_object:
            forms["structured_outputs.json_object"] = Grammar("json_object")
    if len(forms) > 1:
        *_, last = forms
        raise ApiError(400, f"{', '.join(forms)}: an answer can have one form only", param=last)
    for field, form in forms.items():
        try:
            check(form, vocabulary(prepared))
        except UserError as error:
            raise ApiError(400, f"{field}: {error}", param=field) from None
        return form
    return None


def _guided(
    prefix: str, schema: dict[str, Any] | str | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> dict[str, Grammar]:
    """The forms that vLLM's fields ask for, by field."""
    forms = {}
    if schema is not None:
        text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
        forms[f"{prefix}json"] = Grammar("json_schema", text)
    if regex is not None:
        forms[f"{prefix}regex"] = Grammar("regex", regex)
    if choice is not None:
        forms[f"{prefix}choice"] = Grammar("choice", json.dumps(choice, ensure_ascii=False))
    if grammar is not None:
        forms[f"{prefix}grammar"] = Grammar("lark", grammar)
    return forms


def _of_format(asked: ResponseFormat) -> Grammar | None:
    if asked.type == "text":
        return None
    if asked.type == "json_object":
        if asked.schema_ is None:
            return Grammar("json_object")
        return Grammar("json_schema", json.dumps(asked.schema_, ensure_ascii=False))
    if asked.json_schema is None:
        text = "response_format.json_schema: is missing"
        raise ApiError(400, text, param="response_format.json_schema")
    schema = {} if asked.json_schema.schema_ is None else asked.json_schema.schema_
    return Grammar("json_schema", json.dumps(schema, ensure_ascii=False))
