"""Reads a flat JSON object strictly and remembers the line of every key."""

from __future__ import annotations

import json
from dataclasses import dataclass
from json.decoder import JSONDecodeError
from pathlib import Path
from typing import Any

from utils.errors import UserError

WHITESPACE = " \t\r\n"


@dataclass(frozen=True)
class Entry:
    """One `"key": value` of the object and the line (from 1) that the key stands on."""

    key: str
    value: Any
    line: int


def read_object(path: str) -> list[Entry]:
    """The entries of the JSON object in a file, in order; a key that occurs twice is there twice.

    Raises:
        UserError: the file cannot be read, is no UTF-8, or is not one JSON object; with line and column.
    """
    name = display(path)
    try:
        data = Path(path).expanduser().read_bytes()
    except FileNotFoundError:
        raise UserError(f"{name}: no such file; expected a JSON file with arguments") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}); expected a JSON file") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name} line {line}: not UTF-8 text; save the file as UTF-8") from None
    try:
        return _entries(text)
    except JSONDecodeError as error:
        place = f"{name} line {error.lineno} column {error.colno}"
        raise UserError(f"{place}: broken JSON, {error.msg}") from None
    except RecursionError:
        raise UserError(f"{name}: broken JSON, nested too deeply; expected one flat object") from None


def display(path: str) -> str:
    """A path as it is shown in messages: without a leading ./"""
    return path[2:] if path.startswith("./") else path


def _entries(text: str) -> list[Entry]:
    decoder = json.JSONDecoder(parse_int=_whole_number)
    entries: list[Entry] = []
    at = _expect(text, _skip(text, 0), "{", "expected { at the start of one object of arguments")
    at = _skip(text, at)
    more = text[at : at + 1] != "}"
    while more:
        if text[at : at + 1] != '"':
            raise JSONDecodeError(_why_no_key(text, at, bool(entries)), text, at)
        line = text.count("\n", 0, at) + 1
        key, after = decoder.raw_decode(text, at)
        at = _expect(text, _skip(text, after), ":", f'expected : after "{key}"')
        try:
            value, after = decoder.raw_decode(text, _skip(text, at))
        except JSONDecodeError as error:
            message = f'expected a value for "{key}"' if error.msg == "Expecting value" else error.msg
            raise JSONDecodeError(message, text, error.pos) from None
        entries.append(Entry(key, value, line))
        at = _skip(text, after)
        more = text[at : at + 1] == ","
        if more:
            at = _skip(text, at + 1)
    at = _expect(text, at, "}", "expected , or } after a value")
    if text[_skip(text, at) :]:
        raise JSONDecodeError("nothing may follow the closing }", text, _skip(text, at))
    return entries


def _whole_number(digits: str) -> int | float:
    # Python refuses to read whole numbers of thousands of digits; as infinity they fail the range check.
    return int(digits) if len(digits) < 100 else float("inf")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in WHITESPACE:
        at += 1
    return at


def _expect(text: str, at: int, sign: str, message: str) -> int:
    if text[at : at + 1] != sign:
        raise JSONDecodeError(message, text, at)
    return at + 1


def _why_no_key(text: str, at: int, has_entries: bool) -> str:
    if text[at : at + 1] == "}" and has_entries:
        return "remove the comma before }"
    if text[at : at + 1] in ("#", "/"):
        return "JSON has no comments; remove it"
    return 'expected a key in double quotes, such as "lora"'
