"""The description of all routes: as OpenAPI 3.1 for programs, and as one page for people."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from typing import Any, TypeVar

from flask import Flask
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

REFERENCE = "#/components/schemas/{model}"
FAR = 2**31 - 1  # bounds beyond it tell people nothing
TITLE = "LLM server"
_PARAMETER = re.compile(r"<(?:\w+:)?(\w+)>")
View = TypeVar("View", bound=Callable[..., Any])


@dataclass(frozen=True)
class Described:
    """What is said of a route beside the docstring of its function.

    Attributes:
        body: what it takes.
        answer: what it returns, as JSON.
        error: what it returns instead if something is wrong.
        media: type of the answer if that is no JSON.
        stream: type of the answer in pieces, if there is one.
    """

    body: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    error: type[BaseModel] | None = None
    media: str = "application/json"
    stream: str | None = None


class Problem(BaseModel):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    code: str | None


class Failure(BaseModel):
    """The form of errors of every route but /api/chat."""

    error: Problem


def described(
    *,
    body: type[BaseModel] | None = None,
    answer: type[BaseModel] | None = None,
    error: type[BaseModel] | None = Failure,
    media: str = "application/json",
    stream: str | None = None,
) -> Callable[[View], View]:
    """A decorator that says what a route takes and returns, see `Described`."""

    def mark(view: View) -> View:
        view.described = Described(body, answer, error, media, stream)  # type: ignore[attr-defined]
        return view

    return mark


def _routes(app: Flask) -> Iterator[tuple[str, str, str, Described]]:
    """(path, method, what its docstring says, description) of each route that is described."""
    for rule in app.url_map.iter_rules():
        view = app.view_functions[rule.endpoint]
        known = getattr(view, "described", None)
        if known is not None:
            for method in sorted((rule.methods or set()) & {"GET", "POST"}):
                text = " ".join((view.__doc__ or "").split())
                yield _PARAMETER.sub(r"{\1}", rule.rule), method.lower(), text, known


def document(app: Flask, *, key: bool) -> dict[str, Any]:
    """The description of an application.

    Args:
        key: whether it wants an API key.
    """
    routes = list(_routes(app))
    kinds = [kind for *_, known in routes for kind in (known.body, known.answer, known.error) if kind is not None]
    _, schemas = models_json_schema([(kind, "validation") for kind in dict.fromkeys(kinds)], ref_template=REFERENCE)
    paths: dict[str, Any] = {}
    for path, method, text, known in routes:
        paths.setdefault(path, {})[method] = _operation(path, text, known)
    components: dict[str, Any] = {"schemas": schemas.get("$defs", {})}
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": TITLE, "version": "1", "description": "Answers of a language model over HTTP."},
        "paths": dict(sorted(paths.items())),
        "components": components,
    }
    if key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found


def _operation(path: str, text: str, known: Described) -> dict[str, Any]:
    def content(kind: type[BaseModel] | None, media: str) -> dict[str, Any]:
        schema = {} if kind is None else {"$ref": REFERENCE.format(model=kind.__name__)}
        return {media: {"schema": schema}}

    good = content(known.answer, known.media)
    if known.stream is not None:
        good[known.stream] = {"schema": {"type": "string"}}
    operation: dict[str, Any] = {
        "summary": text.split(". ")[0].rstrip("."),
        "description": text,
        "operationId": re.sub(r"\W+", "_", path).strip("_") or "root",
        "responses": {
            "200": {"description": "as asked", "content": good},
            "default": {"description": "what is wrong", "content": content(known.error, "application/json")},
        },
    }
    names = re.findall(r"{(\w+)}", path)
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if known.body is not None:
        operation["requestBody"] = {"required": True, "content": content(known.body, "application/json")}
    return operation


# --- the page ----------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code { font-family: ui-monospace, monospace; }
td code { white-space: nowrap; }
h2 { border-top: 1px solid #8884; padding-top: 1rem; font-size: 1.1rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #8882; }
"""


def page(api: dict[str, Any]) -> str:
    """The description as a page of HTML that needs nothing else."""
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>{escape(api['info']['title'])}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(api['info']['title'])}</h1>",
        "<p>The same for programs: <a href='openapi.json'>openapi.json</a>.</p>",
    ]
    schemas = api["components"]["schemas"]
    bodies = set()
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation['description'])}</p>")
            if "requestBody" in operation:
                body = _name(operation["requestBody"]["content"]["application/json"]["schema"])
                bodies.add(body)
                parts.append(_table(schemas[body]))
    parts.append("<h1>Parts</h1>")
    for name, schema in schemas.items():
        if name not in bodies:
            parts.append(f"<h2 id='{name}'>{name}</h2><p>{escape(schema.get('description', ''))}</p>{_table(schema)}")
    return "".join([*parts, "</body></html>"])


def _name(reference: dict[str, Any]) -> str:
    return str(reference["$ref"]).rsplit("/", 1)[1]


def _table(schema: dict[str, Any]) -> str:
    needed = set(schema.get("required", []))
    rows = [
        f"<tr><td><code>{escape(name)}</code></td><td>{_kind(field)}{', needed' if name in needed else ''}</td>"
        f"<td>{escape(field.get('description', ''))}</td></tr>"
        for name, field in schema.get("properties", {}).items()
    ]
    return f"<div class=table><table><tr><th>field</th><th>type</th><th></th></tr>{''.join(rows)}</table></div>"


def _kind(field: dict[str, Any]) -> str:
    """A type in words, as HTML."""
    if "$ref" in field:
        return f"<a href='#{_name(field)}'>{_name(field)}</a>"
    if "anyOf" in field:
        kinds = [_kind(one) for one in field["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in field:
        return " or ".join(escape(json.dumps(one)) for one in field["enum"])
    if "const" in field:
        return escape(json.dumps(field["const"]))
    kind = str(field.get("type", "any"))
    if kind == "array":
        return f"list of {_kind(field.get('items', {}))}"
    signs = {"minimum": "≥", "exclusiveMinimum": "&gt;", "maximum": "≤", "exclusiveMaximum": "&lt;"}
    bounds = [f"{sign} {field[name]:g}" for name, sign in signs.items() if abs(field.get(name, FAR)) < FAR]
    return f"{kind} {', '.join(bounds)}".strip()
