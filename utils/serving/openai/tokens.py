"""POST /tokenize, /detokenize and /apply-template, with the fields of llama.cpp's server and of vLLM's.

Special tokens that are written in a text are text, unless `parse_special` is true.
"""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, jsonify

from utils.inference.loading import Prepared
from utils.serving.bodies import read
from utils.serving.context import serving
from utils.serving.errors import ApiError
from utils.serving.openai.logprobs import bytes_of, shown
from utils.serving.openai.prompts import Asked, check_ids, encode_text
from utils.serving.openai.schema import DetokenizeRequest, TemplateRequest, TokenizeRequest, tools_of
from utils.serving.openapi import described

routes = Blueprint("tokens", __name__)


@routes.post("/tokenize")
@described(body=TokenizeRequest)
def tokenize() -> Response:
    """The ids of a text, or of a conversation as the model is asked with it."""
    request = read(TokenizeRequest)
    served = serving()
    _, prepared = served.model(request.model)
    ids = _ids(request, prepared)
    tokens: list[Any] = [_piece(prepared, token) for token in ids] if request.with_pieces else ids
    found = {"tokens": tokens, "count": len(ids), "max_model_len": served.longest(prepared)}
    if request.return_token_strs:
        found["token_strs"] = [shown(bytes_of(prepared.tokenizer, token)) for token in ids]
    return jsonify(found)


def _ids(request: TokenizeRequest, prepared: Prepared) -> list[int]:
    """
    Raises:
        ApiError: 400, there is not one text, or one conversation.
    """
    given = {name: getattr(request, name) for name in ("content", "prompt", "messages")}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ApiError(400, "expected one of content, prompt and messages", param="content")
    if request.messages is not None:
        return Asked(prepared, request, request.messages, tools_of(request)).ids(None)
    ((field, text),) = given.items()
    begin = request.add_special if request.add_special is not None else request.add_special_tokens
    if begin is None:
        begin = field == "prompt" and prepared.tokenizer.adds_bos
    return encode_text(prepared, text, field, special=request.parse_special, begin=begin)


def _piece(prepared: Prepared, token: int) -> dict[str, Any]:
    """A token as llama.cpp shows it: its text, or its bytes if they are no text."""
    data = bytes_of(prepared.tokenizer, token)
    try:
        return {"id": token, "piece": data.decode()}
    except UnicodeDecodeError:
        return {"id": token, "piece": list(data)}


@routes.post("/detokenize")
@described(body=DetokenizeRequest)
def detokenize() -> Response:
    """The text of ids, special tokens included."""
    request = read(DetokenizeRequest)
    _, prepared = serving().model(request.model)
    check_ids(request.tokens, prepared, "tokens")
    text = prepared.tokenizer.decode(request.tokens, skip_special=False)
    return jsonify({"content": text, "prompt": text})


@routes.post("/apply-template")
@described(body=TemplateRequest)
def apply_template() -> Response:
    """What the model is asked with, as text."""
    request = read(TemplateRequest)
    _, prepared = serving().model(request.model)
    ids = Asked(prepared, request, request.messages, tools_of(request)).ids(None)
    return jsonify({"prompt": prepared.tokenizer.decode(ids, skip_special=False), "tokens": ids})
