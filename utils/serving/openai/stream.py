"""Answers as server-sent events, and what both forms of answers have in common."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

from flask import Response, g

from utils.serving.answering import Answers, Usage, streamed
from utils.serving.errors import openai_body
from utils.serving.openai.schema import Generation

DONE = "data: [DONE]\n\n"


class Head:
    """What every object of an answer begins with. Its id stands in the log line of the request."""

    def __init__(self, prefix: str, kind: str, model: str) -> None:
        answer_id = f"{prefix}-{secrets.token_hex(12)}"
        g.record.facts["answer_id"] = answer_id
        self._fields = {
            "id": answer_id,
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def __call__(self, **fields: Any) -> dict[str, Any]:
        return {**self._fields, **fields}


def usage_of(usage: Usage) -> dict[str, Any]:
    """Tokens of a request; those of an answer include its end token."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def event_stream(answers: Answers, head: Head, choices: Iterator[dict[str, Any]], request: Generation) -> Response:
    """The response of a request with `stream`.

    Args:
        choices: each makes one chunk.

    Raises:
        ApiError: as `streamed`.
    """
    options = request.stream_options
    at_end = options is not None and bool(options.include_usage)
    each = options is not None and bool(options.continuous_usage_stats)

    def usage() -> dict[str, Any]:
        if each:
            return {"usage": usage_of(answers.usage)}
        return {"usage": None} if at_end else {}

    def events() -> Iterator[str]:
        for choice in choices:
            yield event(head(choices=[choice], **usage()))
        if at_end:
            yield event(head(choices=[], usage=usage_of(answers.usage)))
        yield DONE

    return streamed(answers, events(), "text/event-stream", lambda error: event(openai_body(error)))


def event(value: Mapping[str, Any]) -> str:
    """A value as one server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
