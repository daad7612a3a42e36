"""The page's side of the OpenAI API."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx

from utils.serving.errors import ApiError

CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Piece:
    """News of an answer: text, why it has ended, its token counts so far."""

    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Api:
    """An HTTP API that this page talks to.

    Args:
        url: its address, without a path.
        key: goes along with each request, if there is one.
    """

    def __init__(self, url: str, key: str) -> None:
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,  # a proxy knows nothing of this machine
        )

    async def models(self) -> list[str]:
        """Names of the models that are served.

        Raises:
            ApiError: the API says that it cannot answer.
            httpx.HTTPError: nobody answers.
        """
        answer = await self._client.get("/v1/models", timeout=CONNECT_SECONDS)
        if answer.status_code != httpx.codes.OK:
            raise _error_of(answer)
        return [model["id"] for model in answer.json()["data"]]

    async def chat(self, request: dict[str, Any]) -> AsyncIterator[Piece]:
        """Streams an answer; closing the iterator closes the connection, which ends the work on it.

        Args:
            request: body of the request, but for the fields that make it a stream.

        Raises:
            ApiError: the API says that it cannot answer, or has to break off.
            httpx.HTTPError: nobody answers, or the connection has broken.
        """
        body = {**request, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                await answer.aread()
                raise _error_of(answer)
            async for line in answer.aiter_lines():
                data = line.removeprefix("data:").strip()
                if line.startswith("data:") and data != "[DONE]":
                    yield _piece_of(json.loads(data))


def _piece_of(chunk: dict[str, Any]) -> Piece:
    if "error" in chunk:
        raise ApiError(500, str(chunk["error"].get("message")), kind="server_error")
    usage = chunk.get("usage") or {}
    choice = chunk["choices"][0] if chunk.get("choices") else {}
    return Piece(
        text=choice.get("delta", {}).get("content") or "",
        finish_reason=choice.get("finish_reason"),
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
    )


def _error_of(answer: httpx.Response) -> ApiError:
    """What the API says in place of an answer, in its own words if they can be read."""
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"{answer.status_code} {answer.reason_phrase}"
    after = answer.headers.get("retry-after", "")
    return ApiError(answer.status_code, message, retry_after=int(after) if after.isdecimal() else None)
