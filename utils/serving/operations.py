"""What those who run the server ask it: is it well, what has it done, and how is it used."""

from __future__ import annotations

from flask import Blueprint, Response, jsonify
from prometheus_client import CONTENT_TYPE_LATEST

from utils.serving.context import serving

routes = Blueprint("operations", __name__)
QUIET = {"/health", "/metrics"}  # asked every few seconds: only what fails stands in the log


@routes.get("/health")
def health() -> Response:
    """200 if requests are taken, else 503 with what the model's process does."""
    name = serving().client.state.name
    response = jsonify({"status": "ok" if name == "ready" else name})
    if name != "ready":
        response.status_code = 503
        response.headers["Retry-After"] = "5"
    return response


@routes.get("/metrics")
def metrics() -> Response:
    """All counters in the text form of Prometheus."""
    return Response(serving().metrics.text(), content_type=CONTENT_TYPE_LATEST)
