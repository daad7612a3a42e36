"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Response, jsonify

from utils.families.tokenizers import Tokenizer
from utils.inference.sampling import Alternatives
from utils.serving.answering import Answer, Answers, answer, collect
from utils.serving.bodies import read
from utils.serving.context import serving
from utils.serving.errors import ApiError
from utils.serving.openai.logprobs import chat_entries
from utils.serving.openai.options import answer_budget, grammar_of, sampling_options
from utils.serving.openai.prompts import Asked, check_length, end_ids, kept, positions
from utils.serving.openai.schema import ChatRequest, tools_of
from utils.serving.openai.stream import Head, event_stream, usage_of
from utils.serving.openai.thoughts import Thoughts
from utils.serving.openapi import described
from utils.serving.protocol import Job

routes = Blueprint("chat completions", __name__)


@dataclass(frozen=True)
class Plan:
    """What is known of a chat before its answers come.

    Attributes:
        end_ids: tokens that end an answer, which are no part of it.
        logprobs: whether they are told.
        thinks: whether an answer may begin with a reasoning.
        opened_tag: the tag that the prompt has opened for it.
    """

    tokenizer: Tokenizer
    end_ids: frozenset[int]
    logprobs: bool = False
    thinks: bool = False
    opened_tag: str | None = None


class Choice:
    """One answer on its way to the client."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._thoughts = Thoughts(plan.opened_tag) if plan.thinks else None
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._tops: list[Alternatives] = []

    def push(self, text: str, *, last: bool = False) -> dict[str, Any]:
        """What new text adds to the message; nothing if nothing is certain yet."""
        if self._thoughts is None:
            return {"content": text} if text else {}
        said = self._thoughts.push(text, last=last)
        delta = {"reasoning_content": said.reasoning, "content": said.content}
        return {name: part for name, part in delta.items() if part}

    def note(self, tokens: Sequence[int], logprobs: Sequence[float], tops: Sequence[Alternatives]) -> None:
        """Remembers new tokens until `logprobs` tells of them."""
        for token, logprob, top in zip(tokens, logprobs, tops, strict=self._plan.logprobs):
            if token not in self._plan.end_ids:
                self._tokens.append(token)
                self._logprobs.append(logprob)
                self._tops.append(top)

    def logprobs(self) -> dict[str, Any] | None:
        """Those of the tokens since the last call."""
        if not self._plan.logprobs:
            return None
        content = chat_entries(self._plan.tokenizer, self._tokens, self._logprobs, self._tops)
        self._tokens, self._logprobs, self._tops = [], [], []
        return {"content": content, "refusal": None}

    def finish_reason(self, said: str) -> str:
        """How it ended, in the words of this API."""
        return said


@routes.post("/v1/chat/completions")
@described(body=ChatRequest, stream="text/event-stream")
def complete_chat() -> Response:
    """Answers a conversation."""
    request = read(ChatRequest)
    served = serving()
    name, prepared = served.model(request.model)
    tools = None if request.tool_choice == "none" else tools_of(request)
    asked = Asked(prepared, request, request.messages, tools)
    limit = positions(served, prepared)
    ids = asked.ids(kept(request.truncate_prompt_tokens, limit))
    check_length(ids, limit, "messages")
    grammar = grammar_of(request)
    top = request.top_logprobs or 0
    if top and not request.logprobs:
        raise ApiError(400, "top_logprobs: only with logprobs", param="top_logprobs")
    options = sampling_options(
        request,
        prepared,
        budget=_budget(request, limit - len(ids), served.settings.max_length),
        grammar=grammar,
        logprobs=bool(request.logprobs),
        top_logprobs=top,
    )
    plan = Plan(
        prepared.tokenizer,
        end_ids(prepared, request),
        logprobs=options.logprobs,
        thinks=grammar is None and "reasoning_content" in asked.template.known_keys(prepared.tokenizer),
        opened_tag=asked.opened_tag(ids),
    )
    stream = bool(request.stream)
    answers = answer(served, [Job(name, ids, options, number, stream) for number in range(request.answers)])
    if stream:
        head = Head("chatcmpl", "chat.completion.chunk", name)
        return event_stream(answers, head, _chunks(answers, plan), request)
    choices = [_choice(plan, index, one) for index, one in enumerate(collect(answers))]
    head = Head("chatcmpl", "chat.completion", name)
    return jsonify(head(choices=choices, usage=usage_of(answers.usage)))


def _budget(request: ChatRequest, left: int, default: int) -> int:
    """
    Args:
        left: tokens that the model has room for.
        default: most tokens of an answer for which the request says nothing.
    """
    if request.max_completion_tokens is not None:
        return answer_budget(request.max_completion_tokens, "max_completion_tokens", default, left, request)
    return answer_budget(request.max_tokens, "max_tokens", default, left, request)


def _choice(plan: Plan, index: int, answer: Answer) -> dict[str, Any]:
    """A complete answer."""
    choice = Choice(plan)
    message = {"role": "assistant", "content": None, "refusal": None, **choice.push(answer.text, last=True)}
    if message["content"] is None and "tool_calls" not in message:
        message["content"] = ""
    choice.note(answer.tokens, answer.logprobs, answer.top_logprobs)
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
        choice.note(update.tokens, update.logprobs, update.top_logprobs)
        if delta := choice.push(update.text, last=update.ending is not None):
            yield _delta(index, delta, choice.logprobs())
        if update.ending is not None:
            yield _delta(index, {}, choice.logprobs(), choice.finish_reason(update.ending.finish_reason))


def _delta(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    if logprobs is not None and not logprobs["content"]:
        logprobs = None
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
