"""What a route answers when it cannot do what was asked."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that is answered with an error; each API writes it in its own form.

    Attributes:
        status: HTTP status, 400 and above.
        message: for the client; one sentence or two, without paths of this machine.
        kind: OpenAI's "type": invalid_request_error, authentication_error, rate_limit_error, server_error, ...
        param: the field that is at fault, if one is.
        code: OpenAI's "code", such as context_length_exceeded.
        retry_after: seconds after which it is worth trying again, for the header of that name.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry_after = param, code, retry_after


def openai_body(error: ApiError) -> dict[str, Any]:
    """An error in the form of OpenAI's API."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}
