"""What those who run the server ask it: is it well, what has it done, and how is it used."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, current_app, jsonify, redirect
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from werkzeug.wrappers import Response as AnyResponse

from utils.serving import openapi
from utils.serving.context import serving

routes = Blueprint("operations", __name__)
QUIET = {"/health", "/metrics"}  # asked every few seconds: only what fails stands in the log
NOTHING_ELSE = "default-src 'none'; style-src 'unsafe-inline'"  # a page that loads nothing and runs nothing
RETRY_SECONDS = 5


class Health(BaseModel):
    """How the server is: ok, or why it takes no requests (loading, restarting, stalled, stopping, failed)."""

    status: str


@routes.get("/health")
@openapi.described(answer=Health, error=None)
def health() -> Response:
    """Whether requests are taken. 503 while the model is loaded or restarted, while it does not get on, and while the
    server stops.
    """
    name = serving().client.state.name
    response = jsonify({"status": "ok" if name == "ready" else name})
    if name != "ready":
        response.status_code = 503
        response.headers["Retry-After"] = str(RETRY_SECONDS)
    return response


@routes.get("/metrics")
@openapi.described(media="text/plain")
def metrics() -> Response:
    """All counters in the text form of Prometheus."""
    return Response(serving().metrics.text(), content_type=CONTENT_TYPE_LATEST)


@routes.get("/openapi.json")
@openapi.described()
def description() -> Response:
    """This description, as OpenAPI 3.1."""
    return jsonify(_document())


@routes.get("/docs")
@openapi.described(media="text/html")
def documentation() -> Response:
    """This description, as a page."""
    response = Response(openapi.page(_document()), mimetype="text/html")
    response.headers["Content-Security-Policy"] = NOTHING_ELSE
    return response


@routes.get("/")
def root() -> AnyResponse:
    """Leads to the documentation."""
    return redirect("docs")


def _document() -> dict[str, Any]:
    return openapi.document(current_app, key=bool(serving().settings.api_key))
