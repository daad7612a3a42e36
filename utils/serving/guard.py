"""Who may ask: the key, and which pages of a browser."""

from __future__ import annotations

import hmac
from hashlib import sha256
from typing import TYPE_CHECKING

from flask import Request, Response

from utils.arguments.serve_checks import is_own
from utils.serving.errors import ApiError
from utils.serving.sockets import is_loopback, split

if TYPE_CHECKING:
    from utils.arguments import ServeArguments

OPEN = {"/", "/health", "/docs", "/openapi.json"}  # they tell nothing about the model or its users


class Guard:
    """Checks every request before its route.

    Args:
        settings: api_key, host, cors_origins.
    """

    def __init__(self, settings: ServeArguments) -> None:
        self._key = None if not settings.api_key else _digest(settings.api_key.encode())
        self._origins = set(settings.cors_origins)
        self._host, self._is_own = settings.host.lower(), is_own(settings.host)

    def check(self, asked: Request) -> None:
        """Raises:
        ApiError: 401, no or another key; 403, a page elsewhere asks.
        """
        if asked.method == "OPTIONS":
            return
        if self._key is not None:
            if asked.path not in OPEN and not hmac.compare_digest(_digest(_key_of(asked)), self._key):
                raise ApiError(
                    401,
                    "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                    kind="authentication_error",
                    code="invalid_api_key",
                )
            return
        self._check_page(asked)

    def allow(self, asked: Request, response: Response) -> None:
        """Adds what tells a browser that a page of one of `cors_origins` may read the response."""
        origin = asked.headers.get("Origin")
        if origin is None or not self._origins:
            return
        response.vary.add("Origin")
        if not self._knows(origin):
            return
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"
        if asked.method == "OPTIONS":
            response.headers["Access-Control-Allow-Methods"] = "GET, POST, OPTIONS"
            response.headers["Access-Control-Allow-Headers"] = asked.headers.get(
                "Access-Control-Request-Headers", "Authorization, Content-Type"
            )
            response.headers["Access-Control-Max-Age"] = "600"

    def _knows(self, origin: str) -> bool:
        return "*" in self._origins or origin in self._origins

    def _check_page(self, asked: Request) -> None:
        """Without a key, whoever reaches the port may ask; but a page of another site in a browser here may not.

        Such a page may also have its own name lead to this machine; the browser then takes it for the same site.
        """
        host = asked.headers.get("Host", "")
        name = split(f"//{host}").hostname or ""
        if self._is_own and host and not (is_loopback(name) or name == self._host):
            raise ApiError(
                403,
                "this server answers to localhost only; to use another name, give it an --api_key, "
                "or let the proxy send Host: localhost",
                kind="permission_error",
            )
        origin = asked.headers.get("Origin")
        if origin is not None and not self._knows(origin) and split(origin).netloc != host:
            raise ApiError(
                403,
                "pages of other sites may not ask this server; name them with --cors_origins",
                kind="permission_error",
            )


def _digest(key: bytes) -> bytes:
    """Of one length whatever the key is, so that a comparison takes the same time."""
    return sha256(key).digest()


def _key_of(asked: Request) -> bytes:
    kind, _, key = asked.headers.get("Authorization", "").partition(" ")
    found = key.strip() if kind.lower() == "bearer" else asked.headers.get("x-api-key", "")
    return found.encode("latin-1")  # as WSGI reads headers
