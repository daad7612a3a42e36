"""From the bytes of a request to a checked model of its fields; each fault is a 400 in one clear sentence."""

from __future__ import annotations

import json
import math
import re
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar

from flask import g, request
from pydantic import BaseModel, ConfigDict, ValidationError

from utils.data.lines import half_of_pair
from utils.serving import limits
from utils.serving.context import serving
from utils.serving.errors import ApiError
from utils.serving.record import log_line
from utils.settings import shown

FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")  # what a page elsewhere can send unasked
MOST_NAMES = 1000  # of unknown fields that are remembered
SHOWN_FAULTS = 5
EXACT = 2.0**53  # below it a float holds every whole number
LENGTH = re.compile(r"\w+ should have (at \w+ \d+ \w+)")
_TOO_DEEP = f"is nested too deeply: at most {limits.JSON_DEPTH} objects and lists in each other"
_unknown: set[tuple[str, str]] = set()
_lock = threading.Lock()


class Body(BaseModel):
    """Base of all bodies: types are as JSON has them (no "1" for 1), and what is unknown is left out."""

    model_config = ConfigDict(strict=True, extra="ignore")

    @classmethod
    def refused(cls) -> dict[str, tuple[Any, ...]]:
        """Fields that are known and cannot be served, with the values that ask for nothing."""
        return {}


B = TypeVar("B", bound=Body)


def read(kind: type[B]) -> B:
    """The body of the request at hand.

    Raises:
        ApiError: 400, naming the field; 413; 415.
    """
    value = read_object()
    _note_unknown(kind, value)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        faults = faults_of(error, value)
        more = f" (and {len(faults) - SHOWN_FAULTS} more)" if len(faults) > SHOWN_FAULTS else ""
        message = "; ".join(f"{name}: {text}" if name else text for name, text in faults[:SHOWN_FAULTS])
        raise ApiError(400, message + more, param=faults[0][0] or None) from None


def read_object() -> dict[str, Any]:
    """The JSON object of the request at hand.

    Raises:
        ApiError: 400, 413, 415.
    """
    if request.mimetype in FORMS:
        raise ApiError(415, "the body must be JSON; send it with the header Content-Type: application/json")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ApiError(415, "the body must not be compressed; send it without Content-Encoding")
    value = parse(request.get_data(cache=False))
    if serving().settings.log_requests:
        g.record.facts["request"] = value
    return value


def parse(content: bytes) -> dict[str, Any]:
    """A JSON object, read strictly.

    Raises:
        ApiError: 400; it is not UTF-8 or no object, or as `load_json`.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 text (byte {error.start + 1})") from None
    value = load_json(text, "the body")
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, such as {{...}}; it is {shown(value)}")
    return value


def load_json(text: str, what: str) -> Any:
    """A value from JSON, read strictly.

    Args:
        what: as errors name it.

    Raises:
        ApiError: 400; it is not JSON, nested too deeply, has a key twice, or holds what no text or number can be.
    """
    try:
        value = json.loads(
            text, parse_constant=_no_number, parse_float=_float, parse_int=_int, object_pairs_hook=_object
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"{what} is not valid JSON: {error.msg} ({place})") from None
    except ValueError as error:
        raise ApiError(400, f"{what} is not valid JSON: {error}") from None
    except RecursionError:
        raise ApiError(400, f"{what} {_TOO_DEEP}") from None
    if not _is_shallow(value):
        raise ApiError(400, f"{what} {_TOO_DEEP}")
    if "\\ud" in text.lower() and any(half_of_pair(found) is not None for found in _strings(value)):
        raise ApiError(400, f"{what} holds half of a surrogate pair, which is no character")
    return value


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _float(digits: str) -> float | int:
    """JSON has one kind of number: 5.0 is a whole one."""
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits:.20} is beyond all numbers")
    return int(value) if value.is_integer() and abs(value) < EXACT else value


def _int(digits: str) -> int:
    if len(digits) > limits.NUMBER_DIGITS:
        raise ValueError(f"a whole number of {len(digits):,} digits; at most {limits.NUMBER_DIGITS} are taken")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the field {shown(twice)} stands twice in one object")
    return value


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _is_shallow(value: Any) -> bool:
    level = [value]
    for _ in range(limits.JSON_DEPTH + 1):
        level = [child for one in level for child in _children(one)]
        if not level:
            return True
    return False


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    if isinstance(value, dict):
        yield from value
    for child in _children(value):
        yield from _strings(child)


def faults_of(error: ValidationError, body: dict[str, Any]) -> list[tuple[str, str]]:
    """(name of the field, what is wrong with it) of each field at fault.

    Of a field that may be of several types pydantic names each type; here they stand in one sentence. If parts of a
    list or object are at fault, it is not told what could stand in its place.
    """
    found: dict[str, tuple[list[str], Any]] = {}
    for one in error.errors(include_url=False):
        name, value = _place(one["loc"], body, missing=one["type"] == "missing")
        found.setdefault(name, ([], value))[0].append(_expected(one["type"], one["msg"]))
    deepest = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    return [(name, _sentence(*found[name])) for name in deepest]


def _place(path: tuple[int | str, ...], value: Any, *, missing: bool) -> tuple[str, Any]:
    """(name of a field as a client writes it, its value); pydantic's path names types between the keys as well."""
    names = []
    for number, step in enumerate(path):
        if isinstance(value, dict) and (step in value or (missing and number == len(path) - 1)):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            continue
        names.append(str(step))
    return ".".join(names), value


def _expected(type: str, message: str) -> str:
    """What pydantic says, as the end of "expected ..."; nothing of a field that is missing."""
    if type == "missing":
        return ""
    if type in ("dict_type", "model_type", "model_attributes_type"):
        return "an object"
    if length := LENGTH.match(message):
        return length[1]
    return message.removeprefix("Input should be ").removeprefix("Value error, ")


def _sentence(expected: list[str], value: Any) -> str:
    return "is missing" if "" in expected else f"expected {' or '.join(dict.fromkeys(expected))}, found {shown(value)}"


def _note_unknown(kind: type[Body], value: dict[str, Any]) -> None:
    """Logs once for each field that is left out."""
    aliases = {field.alias for field in kind.model_fields.values() if field.alias}
    known = {*kind.model_fields, *aliases, *kind.refused()}
    for name in value.keys() - known:
        entry = (request.path, name[:100])
        with _lock:
            new = entry not in _unknown and len(_unknown) < MOST_NAMES
            if new:
                _unknown.add(entry)
        if new:
            log_line(id=g.record.id, route=entry[0], ignored_field=entry[1])
