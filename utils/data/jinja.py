"""The sandbox in which chat templates run: no access to Python, no end of the machine's patience, and what
published templates call.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, wraps
from math import prod
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from utils.errors import UserError

# Of one rendering. A conversation of a thousand turns needs a thousandth of each.
MOST_STEPS = 300_000  # rounds of loops and calls of macros
MOST_CHARACTERS = 20_000_000  # of one value on the way to the text
MOST_ITEMS = 1_000_000  # of a list
MOST_IN_ALL = 500_000_000  # characters of all values and of the text
MOST_BITS = 10_000  # of a whole number
WIDENING = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "tojson", "batch", "slice"}  # take a width
STEP, SIZE = "count_step", "check_size"  # filters that are put into every template


class GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}`: marks the assistant's text; renders as its content."""

    tags = {"generation"}  # noqa: RUF012 - the attribute's type is jinja2's

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Endless(jinja2.TemplateError):
    """A template that takes more steps or more memory than any conversation needs."""


@dataclass
class Spent:
    """What a rendering has taken so far."""

    steps: int = 0
    characters: int = 0


_spent: ContextVar[Spent | None] = ContextVar("spent", default=None)


@jinja2.pass_context  # which keeps it from being worked out when the template is compiled
def _count_step(_: Context, characters: int) -> None:
    """Counts one step that writes so many characters of the template's own.

    Raises:
        Endless: the rendering has taken too many.
    """
    spent = _spent.get()
    if spent is not None:
        spent.steps += 1
        if spent.steps > MOST_STEPS:
            raise Endless(f"it takes more than {MOST_STEPS:,} steps")
        _count(characters)


def _count(characters: int) -> None:
    spent = _spent.get()
    if spent is not None:
        spent.characters += characters
        if spent.characters > MOST_IN_ALL:
            raise Endless(f"it makes texts of more than {MOST_IN_ALL:,} characters")


def _size(value: Any) -> int:
    """Of a text its characters, of a list as much as makes MOST_ITEMS the limit."""
    if isinstance(value, (str, bytes)):
        return len(value)
    return len(value) * (MOST_CHARACTERS // MOST_ITEMS) if isinstance(value, (list, tuple, dict)) else 0


def _check(size: int) -> None:
    if size > MOST_CHARACTERS:
        raise Endless(f"it makes a value of more than {MOST_CHARACTERS:,} characters or {MOST_ITEMS:,} items")


def _check_size(value: Any) -> Any:
    """The value, if it is not too large and all together are not.

    Raises:
        Endless: it is, or they are.
    """
    size = _size(value)
    _check(size)
    _count(size)
    return value


def _check_call(name: str, args: Sequence[Any]) -> None:
    """Before a filter or a method: whether what it makes of its arguments would be too large.

    Raises:
        Endless: it would.
    """
    texts = [value for value in args if isinstance(value, str)]
    if name in WIDENING or (name == "%" and "*" in texts[0]):
        _check(max((abs(value) for value in args if isinstance(value, int)), default=0))
    if name in ("format", "format_map", "%"):
        for number in re.findall(r"\d+", texts[0] if texts else ""):
            _check(int(number[:18]))
    if name == "replace" and len(texts) > 2:
        text, old, new = texts[:3]
        _check((text.count(old) if old else len(text) + 1) * len(new))
    if name in ("join", "indent", "wordwrap"):
        sizes = sorted(len(value) for value in args if isinstance(value, (str, list, tuple, dict)))
        _check(prod(sizes[-2:]) if len(sizes) > 1 else 0)


def _guarded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A filter that makes nothing too large."""

    @wraps(function)  # also keeps what jinja2 notes on it
    def call(*args: Any, **options: Any) -> Any:
        _check_call(name, (*args, *options.values()))
        return _check_size(function(*args, **options))

    return call


def _written(value: Any) -> Any:
    """Counts what goes into the text, or into a part of it that the template keeps."""
    _count(_size(value))
    return value


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with a limit to steps and sizes."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        repeated: list[Any] = list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)))
        for part in repeated:
            own = sum(len(text.data) for node in part.body for text in node.find_all(nodes.TemplateData))
            step = nodes.Filter(nodes.Const(own), STEP, [], [], None, None)
            part.body.insert(0, nodes.ExprStmt(step).set_lineno(part.lineno))
        _check_joined(tree)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = {"**": left.bit_length() * right, "*": left.bit_length() + right.bit_length()}.get(operator, 0)
            if bits > MOST_BITS:
                raise Endless("it computes a number of thousands of digits")
        elif operator == "*":
            for value, count in ((left, right), (right, left)):
                _check(_size(value) * count if isinstance(count, int) else 0)
        elif operator == "%" and isinstance(left, str):
            _check_call(operator, [left, *(right if isinstance(right, tuple) else [right])])
        return _check_size(super().call_binop(context, operator, left, right))

    def call(*args: Any, **options: Any) -> Any:  # the arguments' own names must stay free, as in jinja2
        function = args[2]
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # jinja2 wraps str.format
        if isinstance(owner, (str, bytes, list, tuple, dict)):
            _check_call(getattr(function, "__name__", ""), (owner, *args[3:], *options.values()))
        return _check_size(ImmutableSandboxedEnvironment.call(*args, **options))


def _check_joined(node: nodes.Node) -> None:
    """Has the size of every `a ~ b` below a node checked; of other operators `call_binop` does it."""
    for field, value in node.iter_fields():
        parts = value if isinstance(value, list) else [value]
        for place, part in enumerate(parts):
            if not isinstance(part, nodes.Node):
                continue
            _check_joined(part)
            if isinstance(part, nodes.Concat):
                checked = nodes.Filter(part, SIZE, [], [], None, None).set_lineno(part.lineno)
                if isinstance(value, list):
                    value[place] = checked
                else:
                    setattr(node, field, checked)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


@cache
def environment(keep_trailing_newline: bool) -> jinja2.Environment:
    """The environment, with the whitespace rules and functions of Hugging Face chat templates."""
    made = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=keep_trailing_newline,
        finalize=_written,
        extensions=["jinja2.ext.loopcontrols", GenerationBlock],
    )
    functions: dict[str, Callable[..., Any]] = {"raise_exception": _raise_exception, "strftime_now": _now}
    made.globals.update(functions)
    made.globals.pop("lipsum")
    made.filters["tojson"] = _to_json  # jinja2's own escapes HTML, which is wrong in a prompt
    for name, function in made.filters.items():
        made.filters[name] = _guarded(function, name)
    made.filters.update({STEP: _count_step, SIZE: _check_size})
    return made


def compile_jinja(text: str, origin: str, *, keep_trailing_newline: bool = False) -> jinja2.Template:
    """Compiles a template for the sandbox, with the functions that published chat templates use.

    A newline that ends the text of a Hugging Face template is not part of it; in PaddleNLP's it is.

    Raises:
        UserError: a syntax error, with the template's line.
    """
    try:
        return environment(keep_trailing_newline).from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{origin}: chat template, line {error.lineno}: {error.message}") from None
    except (RecursionError, SyntaxError, MemoryError):  # of Python, which compiles what jinja2 made of it
        raise UserError(f"{origin}: the chat template cannot be compiled: it is nested too deeply") from None


def names_in(text: str) -> frozenset[str]:
    """Every variable, attribute and text in a valid template: what it may look for in a conversation."""
    tree = environment(False).parse(text)
    names = {node.name for node in tree.find_all(nodes.Name)}
    names |= {node.attr for node in tree.find_all(nodes.Getattr)}
    return frozenset(names | {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)})


def render_jinja(template: jinja2.Template, origin: str, values: Mapping[str, Any]) -> str:
    """The text of a compiled template.

    Raises:
        UserError: what the template itself says is wrong, a fault in it, or that it does not come to an end.
    """
    before = _spent.set(Spent())
    try:
        return template.render(values)
    except (Endless, RecursionError, MemoryError, OverflowError) as error:
        what = "it calls itself again and again" if isinstance(error, RecursionError) else str(error)
        what = what or "no memory is left"
        raise UserError(
            f"{origin}: the chat template does not come to an end: {what}; mend it or give another"
        ) from None
    except (jinja2.TemplateError, ArithmeticError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(f"{origin}: the chat template refuses this conversation: {error}") from None
    finally:
        _spent.reset(before)
