"""POST /v1/embeddings: the mean of the last hidden state over all tokens of a text, brought to length 1."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from flask import Blueprint, Response, jsonify
from numpy.typing import NDArray

from utils.inference.commands import EmbedJob
from utils.inference.loading import Prepared
from utils.serving import limits
from utils.serving.answering import answer, collect
from utils.serving.bodies import read
from utils.serving.context import serving
from utils.serving.errors import ApiError
from utils.serving.openai.prompts import check_ids, check_length, encode_text, kept
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
    limit = served.longest(prepared)
    cut_to = kept(request.truncate_prompt_tokens, limit + 1)  # no answer needs room
    prompts = [ids if cut_to is None else ids[-cut_to:] for ids in _inputs(request, prepared)]
    for number, ids in enumerate(prompts):
        check_length(ids, limit, "input" if len(prompts) == 1 else f"input.{number}", answered=False)
    answers = answer(served, [EmbedJob(name, prompts)])
    (done,) = collect(answers)
    assert done.vectors is not None  # as it is complete
    tokens = answers.usage.prompt_tokens
    form = _base64 if request.encoding_format == "base64" else list
    data = [
        {"object": "embedding", "index": index, "embedding": form(unit(vector))}
        for index, vector in enumerate(done.vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return jsonify({"object": "list", "data": data, "model": name, "usage": usage})


def unit(vector: NDArray[np.float32]) -> list[float]:
    """The vector at length 1, in single precision."""
    values = vector.astype(np.float64)
    length = float(np.linalg.norm(values))
    found: list[float] = (values / (length or 1.0)).astype(np.float32).tolist()
    return found


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
