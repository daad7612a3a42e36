"""POST /v1/embeddings: the mean of the last hidden state over all tokens of a text, brought to length 1."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from flask import Blueprint, Response, g, jsonify

from utils.inference.loading import Prepared
from utils.serving import limits
from utils.serving.bodies import read
from utils.serving.context import serving
from utils.serving.errors import ApiError
from utils.serving.openai.prompts import check_ids, check_length, encode_text, kept, positions
from utils.serving.openai.schema import EmbeddingRequest
from utils.serving.openapi import described

routes = Blueprint("embeddings", __name__)


@routes.post("/v1/embeddings")
@described(body=EmbeddingRequest)
def embed() -> Response:
    """A vector for each text."""
    request = read(EmbeddingRequest)
    served = serving()
    name, prepared = served.model(request.model)
    limit = positions(served, prepared) + 1  # no answer needs room
    cut_to = kept(request.truncate_prompt_tokens, limit)
    prompts = [ids if cut_to is None else ids[-cut_to:] for ids in _inputs(request, prepared)]
    for number, ids in enumerate(prompts):
        check_length(ids, limit, "input" if len(prompts) == 1 else f"input.{number}")
    g.record.facts |= {"model": name, "n": len(prompts)}
    vectors = served.client.embed(name, prompts, served.settings.request_timeout)
    tokens = sum(map(len, prompts))
    g.record.facts["prompt_tokens"] = tokens
    served.metrics.prompt_tokens.labels(name).inc(tokens)
    form = _base64 if request.encoding_format == "base64" else list
    data = [
        {"object": "embedding", "index": index, "embedding": form(unit(vector))} for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return jsonify({"object": "list", "data": data, "model": name, "usage": usage})


def unit(vector: list[float]) -> list[float]:
    """The vector at length 1, in single precision."""
    values = np.array(vector, dtype=np.float64)
    length = float(np.linalg.norm(values))
    return (values / (length or 1.0)).astype(np.float32).tolist()


def _base64(vector: list[float]) -> str:
    return base64.b64encode(np.array(vector, dtype="<f4").tobytes()).decode()


def _inputs(request: EmbeddingRequest, prepared: Prepared) -> list[list[int]]:
    """
    Raises:
        ApiError: 400, no text, too many, or ids that the model does not know.
    """
    given: Any = request.input
    single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    inputs = [given] if single else given
    if not 1 <= len(inputs) <= limits.INPUTS:
        raise ApiError(400, f"input: expected 1 to {limits.INPUTS} texts, found {len(inputs)}", param="input")
    found = []
    for number, one in enumerate(inputs):
        field = "input" if single else f"input.{number}"
        if isinstance(one, str):
            found.append(encode_text(prepared, one, field, special=None, begin=None))
        else:
            check_ids(one, prepared, field)
            found.append(one)
    return found
