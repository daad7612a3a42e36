"""JSON rows of a file with their lines: JSON Lines, or one JSON array; and back to lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError

BLANKS = b" \t\r\n"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DEEP = "not valid JSON (nested too deeply)"
LEFT_OUT = "; what stands behind it in the array cannot be read"


class RowFault(ValueError):
    """What is wrong with one row; the reader adds file and line."""


@contextmanager
def naming(place: str) -> Iterator[None]:
    """A block that works on one row: whatever it raises becomes a `UserError` that begins with the row's place.

    Tokenizers and templates may raise anything on strange text, and those in Rust panic past `Exception`.

    Args:
        place: file and line.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except UserError as error:
        raise UserError([f"{place}: {fault}" for fault in error.faults]) from None
    except RowFault as fault:
        raise UserError(f"{place}: {fault}") from None
    except BaseException as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{place}: this row cannot be made into tokens ({type(error).__name__}: {said})") from error


@dataclass(frozen=True)
class Line:
    """One row of a file, undecoded faults included.

    Attributes:
        number: counted from 1.
        value: the decoded JSON, if `fault` is None.
        fault: why it is not JSON.
    """

    number: int
    value: Any
    fault: str | None = None


def decode_line(content: bytes, number: int) -> Line | None:
    """Decodes one line of a JSON Lines file; None if it is blank."""
    if number == 1:
        content = content.removeprefix(BYTE_ORDER_MARK)
    if not content.strip():
        return None
    try:
        return Line(number, json.loads(content.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Line(number, None, f"not UTF-8 text (byte {error.start + 1})")
    except json.JSONDecodeError as error:
        return Line(number, None, f"not valid JSON ({error.msg}, column {error.colno})")
    except ValueError:
        return Line(number, None, _long_number())
    except RecursionError:
        return Line(number, None, DEEP)


def _long_number() -> str:
    return f"holds a whole number of more than {sys.get_int_max_str_digits():,} digits"


def is_array(file: Path) -> bool:
    """Whether the file holds one JSON array instead of JSON Lines."""
    with file.open("rb") as stream:
        block = stream.read(256).removeprefix(BYTE_ORDER_MARK)
        while block and not (block := block.lstrip(BLANKS)):
            block = stream.read(4096)
    return block[:1] == b"["


class _MarkingLongNumbers(json.JSONDecoder):
    """Reads on behind a whole number that Python refuses to convert.

    Attributes:
        met: whether there was one.
    """

    def __init__(self) -> None:
        self.met = False
        super().__init__(parse_int=self._read)

    def _read(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:
            self.met = True
            return 0


def _array_lines(file: Path) -> Iterator[Line]:
    """The rows of a JSON array, each with the line where it begins."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        yield Line(1, None, f"not UTF-8 text (byte {error.start + 1})")
        return
    decoder, blanks = _MarkingLongNumbers(), BLANKS.decode()
    place, number, counted = text.index("[") + 1, 1, 0

    def skip() -> str:
        """Goes to the next character that is no blank, counts lines up to it, and returns it."""
        nonlocal place, number, counted
        while place < len(text) and text[place] in blanks:
            place += 1
        number += text.count("\n", counted, place)
        counted = place
        return text[place : place + 1]

    while (found := skip()) != "]":
        decoder.met = False
        try:
            value, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            said = f"not valid JSON ({error.msg}, line {error.lineno} column {error.colno}){LEFT_OUT}"
            yield Line(number, None, said)
            return
        except RecursionError:
            yield Line(number, None, f"{DEEP}{LEFT_OUT}")
            return
        yield Line(number, None, _long_number()) if decoder.met else Line(number, value)
        if (found := skip()) == ",":
            place += 1
        elif found != "]":
            yield Line(number, None, f"not valid JSON (expected , or ] after a row){LEFT_OUT}")
            return
    place += 1
    if skip():
        yield Line(number, None, "text behind the end of the JSON array: write all rows into one, or one per line")


def read_lines(file: Path) -> Iterator[Line]:
    """Every row of a file that is not blank, decoded.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        if is_array(file):
            yield from _array_lines(file)
            return
        with file.open("rb") as stream:
            for number, content in enumerate(stream, 1):
                line = decode_line(content, number)
                if line is not None:
                    yield line
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def half_of_pair(text: str) -> int | None:
    """The first character, counted from 1, that is half of a surrogate pair ("\\ud800" in JSON); None without one."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return error.start + 1
    return None


def writable(value: Any) -> Any:
    """The value if it is JSON that others can read too, else None: NaN is none, and Python writes no deep nesting."""
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return value
