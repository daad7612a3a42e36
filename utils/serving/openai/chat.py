"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flask import Blueprint, Response, jsonify

from utils.inference.commands import Job
from utils.serving.answering import Answer, Answers, answer, collect
from utils.serving.bodies import read
from utils.serving.context import serving
from utils.serving.errors import ApiError
from utils.serving.openai.calling import calling_of
from utils.serving.openai.choice import Choice, Plan
from utils.serving.openai.options import answer_budget, grammar_of, sampling_options
from utils.serving.openai.prompts import Asked, check_length, end_ids, kept
from utils.serving.openai.schema import ChatRequest
from utils.serving.openai.stream import Head, event_stream, usage_of
from utils.serving.openapi import described
from utils.serving.protocol import Update

routes = Blueprint("chat completions", __name__)


@routes.post("/v1/chat/completions")
@described(body=ChatRequest, stream="text/event-stream")
def complete_chat() -> Response:
    """Answers a conversation."""
    request = read(ChatRequest)
    served = serving()
    name, prepared = served.model(request.model)
    calling = calling_of(request, prepared.template, prepared.tokenizer)
    asked = Asked(prepared, request, request.messages, None if calling is None else calling.tools)
    limit = served.longest(prepared)
    ids = asked.ids(kept(request.truncate_prompt_tokens, limit))
    check_length(ids, limit, "messages")
    grammar = grammar_of(request, prepared) if calling is None or calling.grammar is None else calling.grammar
    top = request.top_logprobs or 0
    if top and not request.logprobs:
        raise ApiError(400, "top_logprobs: only with logprobs", param="top_logprobs")
    options = sampling_options(
        request,
        prepared,
        budget=_budget(request, limit - len(ids)),
        grammar=grammar,
        logprobs=bool(request.logprobs),
        top_logprobs=top,
    )
    stream = bool(request.stream)
    plan = Plan(
        prepared.tokenizer,
        end_ids(prepared, request),
        options.stop,
        logprobs=options.logprobs,
        thinks=grammar is None and "reasoning_content" in asked.template.known_keys(prepared.tokenizer),
        opened_tag=asked.opened_tag(ids),
        calling=calling,
        stream=stream,
    )
    answers = answer(served, [Job(name, ids, options, number, stream) for number in range(request.answers)])
    if stream:
        head = Head("chatcmpl", "chat.completion.chunk", name)
        return event_stream(answers, head, _chunks(answers, plan), request)
    choices = [_choice(plan, index, one) for index, one in enumerate(collect(answers))]
    head = Head("chatcmpl", "chat.completion", name)
    return jsonify(head(choices=choices, usage=usage_of(answers.usage)))


def _budget(request: ChatRequest, left: int) -> int:
    """Most tokens of an answer; all that there is room for, if the request says nothing.

    Args:
        left: tokens that there is room for.
    """
    if request.max_completion_tokens is not None:
        return answer_budget(request.max_completion_tokens, "max_completion_tokens", left, left, request)
    return answer_budget(request.max_tokens, "max_tokens", left, left, request)


def _choice(plan: Plan, index: int, answer: Answer) -> dict[str, Any]:
    """A complete answer."""
    choice = Choice(plan)
    whole = Update(
        text=answer.text,
        tokens=tuple(answer.tokens),
        logprobs=tuple(answer.logprobs),
        top_logprobs=tuple(answer.top_logprobs),
        ending=answer.ending,
    )
    message = {"role": "assistant", "content": None, "refusal": None, **choice.push(whole)}
    if "tool_calls" in message:
        message["tool_calls"] = [
            {name: part for name, part in call.items() if name != "index"} for call in message["tool_calls"]
        ]
    elif message["content"] is None:
        message["content"] = ""
    return {
        "index": index,
        "message": message,
        "logprobs": choice.logprobs(),
        "finish_reason": choice.finish_reason(answer.finish_reason),
    }


def _chunks(answers: Answers, plan: Plan) -> Iterator[dict[str, Any]]:
    """The choices of a stream: first a role, then what is new, in the end how it ended."""
    choices: dict[int, Choice] = {}
    for index, update in answers:
        if index not in choices:
            choices[index] = Choice(plan)
            yield _delta(index, {"role": "assistant", "content": ""})
        choice = choices[index]
        if delta := choice.push(update):
            yield _delta(index, delta, choice.logprobs())
        if update.ending is not None:
            yield _delta(index, {}, choice.logprobs(), choice.finish_reason(update.ending.finish_reason))


def _delta(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    if logprobs is not None and not logprobs["content"]:
        logprobs = None
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
