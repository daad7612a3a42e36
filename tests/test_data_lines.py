"""JSON rows with their lines: what a file may hold, and that every fault has its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from utils.checkpoints.files import json_bytes
from utils.data.lines import RowFault, decode_line, naming, read_lines, writable
from utils.errors import UserError

PAIR = '{"src": "one", "tgt": "two"}'
LONG = '{"src": "one", "tgt": "two", "id": ' + "1" * 5000 + "}"  # more digits than Python converts


def faults(file: Path, content: str) -> list[tuple[int, str | None]]:
    file.write_text(content, "utf-8")
    return [(line.number, line.fault) for line in read_lines(file)]


@pytest.mark.parametrize(
    ("behind", "line"),
    [(f"\n[{PAIR}]\n", 2), ("garbage", 1), ("\n\n\n, ", 4), (f"\n{PAIR}\n{PAIR}", 2), ("]", 1)],
)
def test_text_behind_an_array_is_a_fault(tmp_path: Path, behind: str, line: int) -> None:
    found = faults(tmp_path / "train.json", f"[{PAIR}, {PAIR}]{behind}")
    assert [fault for _, fault in found[:2]] == [None, None]
    [(number, fault)] = found[2:]
    assert number == line and fault is not None and "behind the end of the JSON array" in fault


def test_blanks_around_an_array_are_none(tmp_path: Path) -> None:
    for content in (f"[{PAIR}]", f"{' ' * 300}\n[{PAIR}] \r\n\t\n", f"\ufeff[{PAIR}]"):
        assert [fault for _, fault in faults(tmp_path / "train.json", content)] == [None]


def test_a_number_too_long_for_python_breaks_its_row_only(tmp_path: Path) -> None:
    said = "holds a whole number of more than 4,300 digits"
    for text in (f"{PAIR}\n{LONG}\n{PAIR}\n", f"[{PAIR},\n{LONG},\n{PAIR}]"):
        assert faults(tmp_path / "train.json", text) == [(1, None), (2, said), (3, None)]


def test_a_broken_row_of_an_array_hides_the_rest_and_says_so(tmp_path: Path) -> None:
    for broken in ('{"src" "one"}', "[" * 100_000, f"{PAIR} {PAIR}"):
        *good, (line, fault) = faults(tmp_path / "train.json", f"[{PAIR},\n{broken},\n{PAIR}]")
        assert good[0] == (1, None) and line == 2 and fault is not None
        assert fault.startswith("not valid JSON") and "what stands behind it in the array cannot be read" in fault


class Panic(BaseException):
    """What a library in Rust raises: no `Exception`."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError(["first", "second"]), ["here line 3: first", "here line 3: second"]),
        (RowFault("no question in it"), ["here line 3: no question in it"]),
        (ValueError("a\n b"), ["here line 3: this row cannot be made into tokens (ValueError: a b)"]),
        (Panic("stack"), ["here line 3: this row cannot be made into tokens (Panic: stack)"]),
    ],
)
def test_whatever_a_row_raises_has_its_place(error: BaseException, said: list[str]) -> None:
    with pytest.raises(UserError) as caught, naming("here line 3"):
        raise error
    assert list(caught.value.faults) == said


def test_ctrl_c_is_no_fault_of_a_row() -> None:
    with pytest.raises(KeyboardInterrupt), naming("here line 3"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("value", [{"a\ud83d": ["\udc00", {"b": "\ud83d"}]}, "caf\u00e9 \U0001f600", [1, None, True]])
def test_any_text_can_be_written_and_read_again(value: Any) -> None:
    assert json.loads(json_bytes(value).decode("utf-8")) == value == writable(value)


def test_what_is_no_json_is_not_written() -> None:
    deep: Any = "a"
    for _ in range(100_000):
        deep = [deep]
    for value in (float("nan"), [float("inf")], deep):
        assert writable(value) is None
    assert decode_line(b'{"src": NaN}', 1) is not None  # pandas writes it: a row may hold it
