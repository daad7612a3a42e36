"""The sandbox in which chat templates run: no access to Python, and what published templates call."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}`: marks the assistant's text; renders as its content."""

    tags = {"generation"}  # noqa: RUF012 - the attribute's type is jinja2's

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


@cache
def environment(keep_trailing_newline: bool) -> jinja2.Environment:
    """The environment, with the whitespace rules and functions of Hugging Face chat templates."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=keep_trailing_newline,
        extensions=["jinja2.ext.loopcontrols", GenerationBlock],
    )
    functions: dict[str, Callable[..., Any]] = {"raise_exception": _raise_exception, "strftime_now": _now}
    made.globals.update(functions)
    made.filters["tojson"] = _to_json  # jinja2's own escapes HTML, which is wrong in a prompt
    return made
