"""The API of earlier toolchains: POST /api/chat.

One object in, one object out; or a stream of such objects, one a line, each with the next piece of the answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from flask import Blueprint, Response, jsonify
from pydantic import BaseModel, BeforeValidator, Field

from utils.data.encode import forgotten_rounds
from utils.data.template import Message
from utils.inference.commands import Job
from utils.inference.loading import Prepared
from utils.inference.sampling import SamplingOptions
from utils.serving import limits
from utils.serving.answering import Answers, answer, collect, streamed
from utils.serving.bodies import Body, load_json, read
from utils.serving.context import reading, serving
from utils.serving.errors import ApiError
from utils.serving.openapi import described

if TYPE_CHECKING:
    from utils.arguments import ServeArguments

routes = Blueprint("own", __name__)
ROLES = {"user": "user", "human": "user", "bot": "assistant", "assistant": "assistant", "system": "system"}
SAMPLING = ("top_k", "top_p", "temperature", "repetition_penalty")
CUT_HEADER = "X-Prompt-Cut"
NDJSON = "application/x-ndjson"


class Turn(Body):
    """One utterance of a conversation."""

    role: str = Field(description="user or bot (also human, assistant); the first one may be system")
    utterance: str


def _history(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return load_json(value, "history") if value.strip() else None


class ChatBody(Body):
    """What POST /api/chat takes. Only `context` is needed; the server's own arguments are the other defaults."""

    context: str = Field(min_length=1, description="what the user says now")
    history: Annotated[list[Turn] | None, BeforeValidator(_history, json_schema_input_type=list[Turn] | str | None)] = (
        Field(
            None,
            max_length=limits.MESSAGES,
            description='earlier utterances in turn, {"role": "user" or "bot", "utterance": TEXT}; also as a JSON text',
        )
    )
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(None, description="1 is greedy, 0 is off")
    top_p: float | None = Field(None, ge=0, le=1)
    temperature: float | None = Field(None, ge=0, le=100, description="0 is greedy")
    repetition_penalty: float | None = Field(None, ge=1e-6, le=1e6, description="1 is off")
    max_length: Annotated[int, Field(ge=2, le=2**31 - 1)] | None = Field(
        None, description="most tokens of prompt and answer together; never more than the server takes"
    )
    src_length: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(
        None, description="most tokens of the prompt; of a longer one the oldest rounds go first, then its end"
    )
    stream: bool | None = Field(None, description="answer in pieces, one object a line")
    model: str | None = Field(None, description="a name of /v1/models; the first of them if left out")


class Utterance(BaseModel):
    """What the bot says."""

    role: Literal["bot"]
    utterance: str


class Result(BaseModel):
    """Of a request that was answered."""

    response: Utterance


class ChatAnswer(BaseModel):
    """The answer, or as a line of a stream the next piece of it."""

    error_code: Literal[0]
    error_msg: str
    result: Result


class ChatError(BaseModel):
    """Instead of an answer, or as the last line of a stream that broke off. The code is the HTTP status."""

    error_code: int
    error_msg: str
    result: None


@routes.post("/api/chat")
@described(body=ChatBody, answer=ChatAnswer, error=ChatError, stream=NDJSON)
def chat() -> Response:
    """Answers what a user says, after what was said before. With "stream": true one object a line, each with the next
    piece of the answer. A header X-Prompt-Cut says that the prompt was longer than src_length.
    """
    served, body = serving(), read(ChatBody)
    name, prepared = served.model(body.model)
    messages = _messages(body)
    limit = served.longest(prepared)
    with reading("history" if body.history else "context"):
        prompt, cut = _prompt(messages, prepared, body.src_length or served.settings.src_length, limit)
    job = Job(name, prompt, _options(body, served.settings, len(prompt), limit), stream=bool(body.stream))
    answers = answer(served, [job])
    if job.stream:
        response = streamed(answers, _lines(answers), NDJSON, lambda error: _line(error_body(error)))
    else:
        response = jsonify(_said(collect(answers)[0].text))
    if cut:
        response.headers[CUT_HEADER] = "true"
    return response


def error_body(error: ApiError) -> dict[str, Any]:
    """An error in the form of this API; its code is the HTTP status."""
    return {"error_code": error.status, "error_msg": error.message, "result": None}


def _said(text: str) -> dict[str, Any]:
    return {"error_code": 0, "error_msg": "Success", "result": {"response": {"role": "bot", "utterance": text}}}


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


def _lines(answers: Answers) -> Iterator[str]:
    """One line for each piece of the answer; an empty answer is one empty piece."""
    silent = True
    for _, update in answers:
        if update.text:
            silent = False
            yield _line(_said(update.text))
    if silent:
        yield _line(_said(""))


def _messages(body: ChatBody) -> list[Message]:
    """The conversation with what the user says now.

    Raises:
        ApiError: 400; a role that is none, or users and bots who do not take turns.
    """
    messages: list[Message] = []
    for number, turn in enumerate(body.history or []):
        role = ROLES.get(turn.role)
        expected = "assistant" if messages and messages[-1]["role"] == "user" else "user"
        if role != expected and not (role == "system" and number == 0):
            raise ApiError(
                400,
                f"history.{number}.role: is {turn.role!r:.60}; expected {'bot' if expected == 'assistant' else 'user'} "
                "(user and bot take turns, the first of all may be system)",
                param=f"history.{number}.role",
            )
        messages.append({"role": role, "content": turn.utterance})
    if messages and messages[-1]["role"] == "user":
        raise ApiError(400, "history: its last utterance must be the bot's, as context is the user's", param="history")
    messages.append({"role": "user", "content": body.context})
    return messages


def _prompt(messages: list[Message], prepared: Prepared, src_length: int, limit: int) -> tuple[list[int], bool]:
    """(prompt, whether anything was left out of it), as a chat in the terminal makes it.

    Args:
        limit: most tokens of prompt and answer together.
    """
    if src_length >= limit:
        src_length = limit // 2
    forgotten = forgotten_rounds(messages, prepared.tokenizer, prepared.template, src_length)
    first = 1 if messages[0]["role"] == "system" else 0
    del messages[first : first + 2 * forgotten]
    ids, was_cut = prepared.encode(messages, src_length)
    return ids, was_cut or forgotten > 0


def _options(body: ChatBody, settings: ServeArguments, prompt_tokens: int, limit: int) -> SamplingOptions:
    """How to answer: what the request says, and for the rest what the server was started with.

    Args:
        limit: most tokens of prompt and answer together.

    Raises:
        ApiError: 400; the prompt leaves an answer no room.
    """
    longest = min(body.max_length or settings.max_length, limit)
    if prompt_tokens >= longest:
        raise ApiError(
            400,
            f"max_length {longest} leaves no room for an answer: the prompt alone has {prompt_tokens} tokens",
            param="max_length",
        )
    given = {name: getattr(body, name) for name in SAMPLING}
    chosen = {name: getattr(settings, name) if value is None else value for name, value in given.items()}
    return SamplingOptions(max_new_tokens=longest - prompt_tokens, **chosen)
