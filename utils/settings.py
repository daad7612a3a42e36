"""The JSON files beside a model, read by type: what is unambiguous is taken, the rest is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError

_SHOWN = 60  # characters of a wrong value that an error shows
_WORDS = {"true": True, "false": False}


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def read_text(path: Path) -> str:
    """The text of a file in UTF-8; a byte order mark before it is left out.

    Raises:
        UserError: the file cannot be read or is no such text.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no text in UTF-8: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, see `read_text`.

    Raises:
        UserError: the file cannot be read or holds no JSON object.
    """
    try:
        value = json.loads(read_text(path))
    except RecursionError as error:
        raise UserError(f"{path}: not valid JSON: objects or lists are nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


@dataclass(frozen=True)
class Kind:
    """What the value of a key must be.

    Attributes:
        expected: in words, as they follow "expected".
        read: the value in its own type.
            Raises ValueError: it is of no such kind.
        null: whether null is a value of its own; else it stands for a key that is not there.
    """

    expected: str
    read: Callable[[Any], Any]
    null: bool = False


# The keys of an object and what they must be; a table in a table is an object in the object.
Table = Mapping[str, "Kind | Table"]


def typed(table: Table, values: Mapping[str, Any], file: str, prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """An object with the values of known keys in their own types; other keys stay as they are.

    Args:
        file: as faults name it.
        prefix: of the names of keys, for an object in an object.

    Returns:
        The object, and one fault for each value that is of another kind.
    """
    known: dict[str, Any] = {}
    faults: list[str] = []
    for name, value in values.items():
        kind = table.get(name)
        if kind is None:
            known[name] = value
        elif value is None:
            if isinstance(kind, Kind) and kind.null:
                known[name] = None
        elif isinstance(kind, Kind):
            try:
                known[name] = kind.read(value)
            except ValueError:
                faults.append(f"{file}: {prefix}{name} is {shown(value)}; expected {kind.expected}")
        elif isinstance(value, Mapping):
            known[name], inside = typed(kind, value, file, f"{prefix}{name}.")
            faults += inside
        else:
            faults.append(f"{file}: {prefix}{name} is {shown(value)}; expected an object or null")
    return known, faults


def shown(value: Any) -> str:
    """A value as it stands in JSON, cut where it is long."""
    if isinstance(value, list | dict):
        kind = "list" if isinstance(value, list) else "object"
        return f"{'a' if kind == 'list' else 'an'} {kind} of {len(value)}" if value else f"an empty {kind}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def whole_of(value: Any) -> int:
    """The whole number of 2, 2.0, "2" or "2.0".

    Raises:
        ValueError: the value is no whole number.
    """
    found = number_of(value)
    if not isinstance(found, int) and not found.is_integer():
        raise ValueError
    return int(found)


def number_of(value: Any) -> int | float:
    """The number of 0.5, "0.5" or 2.

    Raises:
        ValueError: the value is no finite number.
    """
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            value = float(value)
    try:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError
    except OverflowError:  # a whole number beyond all floats
        raise ValueError from None
    return value


def whole(low: int, high: int, *, null: bool = False) -> Kind:
    """A whole number within bounds."""

    def read(value: Any) -> int:
        found = whole_of(value)
        if not low <= found <= high:
            raise ValueError
        return found

    return Kind(f"a whole number from {low} to {high}" + " or null" * null, read, null)


def number(low: float, high: float, *, above: bool = False, below: bool = False) -> Kind:
    """A number within bounds.

    Args:
        above, below: whether the lower, or the upper bound itself is none of them.
    """

    def read(value: Any) -> int | float:
        found = number_of(value)
        if not low <= found <= high or (above and found == low) or (below and found == high):
            raise ValueError
        return found

    first, last = ("above" if above else "of at least"), ("below" if below else "up to")
    return Kind(f"a number {first} {low:g} and {last} {high:g}", read)


def _flag(value: Any) -> bool:
    if isinstance(value, str):
        value = _WORDS.get(value.strip().lower())
    if value not in (0, 1):
        raise ValueError
    return bool(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def list_of(read: Callable[[Any], Any], expected: str, *, null: bool = False) -> Kind:
    """A list of values of a kind, or one of them by itself, which stays so."""

    def read_all(value: Any) -> Any:
        return [read(one) for one in value] if isinstance(value, list) else read(value)

    return Kind(expected, read_all, null)


FLAG = Kind("true or false", _flag)
TEXT = Kind("a text", _text)
TEXTS = list_of(_text, "a list of texts")
