"""The HTTP application: routes, who may ask, one form of errors per API, one log line per request."""

from __future__ import annotations

from typing import Any

from flask import Flask, Response, g, jsonify, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from utils.serving import limits, operations, own
from utils.serving.context import Served, attach
from utils.serving.errors import ApiError, openai_body
from utils.serving.guard import Guard
from utils.serving.openai import chat, completions, embeddings, models, tokens
from utils.serving.record import Record, failure, request_id

AT_ONCE = {operations.routes.name, models.routes.name}  # what they answer is there already
BLUEPRINTS = (
    own.routes,
    operations.routes,
    chat.routes,
    completions.routes,
    embeddings.routes,
    models.routes,
    tokens.routes,
)


def create_app(served: Served) -> Flask:
    """The application that serves a model."""
    app = Flask("serving", static_folder=None)
    app.json.ensure_ascii = False  # type: ignore[attr-defined]
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.config["MAX_CONTENT_LENGTH"] = limits.BODY_BYTES
    app.url_map.strict_slashes = False
    attach(app, served)
    guard = Guard(served.settings)

    @app.before_request
    def begin() -> None:
        g.record = Record(request_id(request.headers.get("X-Request-Id")), request.path)
        guard.check(request)
        if request.blueprint is not None and request.blueprint not in AT_ONCE:
            g.has_place = served.places.acquire(blocking=False)
            if not g.has_place:
                raise ApiError(429, "too many requests at a time", kind="rate_limit_error", code="busy", retry_after=1)

    @app.after_request
    def end(response: Response) -> Response:
        record: Record = g.record
        record.status = response.status_code
        response.headers["X-Request-Id"] = record.id
        response.headers["X-Content-Type-Options"] = "nosniff"
        guard.allow(request, response)
        route = request.url_rule.rule if request.url_rule is not None else "unknown"
        quiet = route in operations.QUIET and response.status_code != 500
        has_place = g.get("has_place", False)

        @response.call_on_close
        def close() -> None:
            if has_place:
                served.places.release()
            served.metrics.responses.labels(route, str(record.status)).inc()
            if not quiet:
                record.write()

        return response

    @app.errorhandler(Exception)
    def fail(error: Exception) -> Response:
        said = _of_http(error) if isinstance(error, HTTPException) else failure(error, g.record.id)
        g.record.note(said, text=served.settings.log_requests)
        response = jsonify(error_body(said, request.path))
        response.status_code = said.status
        if said.retry_after is not None:
            response.headers["Retry-After"] = str(said.retry_after)
        if isinstance(error, MethodNotAllowed) and error.valid_methods:
            response.headers["Allow"] = ", ".join(sorted(error.valid_methods))
        if said.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        return response

    for routes in BLUEPRINTS:
        app.register_blueprint(routes)
    return app


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """An error in the form of the API that the path belongs to."""
    if path.startswith("/api/"):
        return own.error_body(error)
    return openai_body(error)


def _of_http(error: HTTPException) -> ApiError:
    """What Flask itself has found wrong."""
    status = error.code or 500
    if status == 404:
        return ApiError(
            404, f"there is nothing at {request.path:.200}; GET /docs lists what there is", code="not_found"
        )
    if status == 405:
        return ApiError(405, f"{request.path:.200} does not take {request.method}", code="method_not_allowed")
    if status == 413:
        return ApiError(413, f"the body is larger than {limits.BODY_BYTES:,} bytes", code="body_too_large")
    return ApiError(status, f"the request is not understood: {error.name}")
