"""One line of JSON on standard error for each request: never its text, unless the server was asked to log it."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
import traceback
import uuid
from contextlib import suppress
from typing import Any

from utils.serving.errors import ApiError

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_lock = threading.Lock()


def request_id(given: str | None) -> str:
    """The id that a client has given its request, if it can stand in a log, else a new one."""
    return given if given is not None and _SANE_ID.fullmatch(given) else uuid.uuid4().hex


def log_line(**facts: Any) -> None:
    """Writes one line of JSON to standard error."""
    line = json.dumps({"time": round(time.time(), 3), **facts}, ensure_ascii=False, default=str)
    line = line.encode("utf-8", "backslashreplace").decode()
    with _lock, suppress(OSError, ValueError):  # whoever read the log has gone
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


class Record:
    """What is known of one request.

    Attributes:
        id: in the log line and in the response's header.
        status: of the response; 499 if the client had gone before it was complete.
        facts: what else the line says.
    """

    def __init__(self, id: str, route: str) -> None:
        self.id, self.route = id, route
        self.status = 0
        self.facts: dict[str, Any] = {}
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.perf_counter() - self._started

    def note(self, error: ApiError, *, text: bool) -> None:
        """Adds what went wrong. What a client did wrong is told without its words, unless `text` says so."""
        self.facts["error"] = error.message if text or error.status >= 500 else error.code or error.kind
        if error.param is not None:
            self.facts["param"] = error.param

    def write(self) -> None:
        """Writes the log line."""
        log_line(id=self.id, route=self.route, status=self.status, total_s=round(self.seconds, 4), **self.facts)


def failure(error: Exception, id: str) -> ApiError:
    """What a client is told of an error: a bug only by the request's id, under which the log has it."""
    if isinstance(error, ApiError):
        return error
    log_line(id=id, error="".join(traceback.format_exception(error)))
    return ApiError(500, f"the server has failed; its log says more about request {id}", kind="server_error")
