"""GET /v1/models and /v1/models/NAME."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, jsonify

from utils.serving.context import Served, serving
from utils.serving.openapi import described

routes = Blueprint("models", __name__)


@routes.get("/v1/models")
@described()
def list_models() -> Response:
    """The models that are served: the base first, then its adapters."""
    served = serving()
    return jsonify({"object": "list", "data": [_model(served, name) for name in served.models]})


@routes.get("/v1/models/<path:name>")
@described()
def show_model(name: str) -> Response:
    """One of them."""
    served = serving()
    served.model(name)
    return jsonify(_model(served, name))


def _model(served: Served, name: str) -> dict[str, Any]:
    base = next(iter(served.models))
    return {
        "id": name,
        "object": "model",
        "created": int(served.started),
        "owned_by": "paddle_llm",
        "max_model_len": served.longest(served.models[name]),
        "parent": None if name == base else base,
    }
