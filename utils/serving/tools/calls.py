"""Reading an answer for calls of functions, piece by piece or as a whole."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils.serving.tools.form import ID, CallForm
from utils.serving.tools.scan import Scan

LONGEST_NAME = 256  # signs, with the blanks around it
SIGNS = string.ascii_letters + string.digits


@dataclass
class Said:
    """What a piece of an answer brings.

    Attributes:
        content: new text.
        calls: OpenAI's deltas of tool_calls: first index, id, type and the function's name, then pieces of its
            arguments.
    """

    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)


def read_answer(
    form: CallForm, tools: Sequence[Mapping[str, Any]], text: str, *, parallel: bool = True
) -> tuple[str, list[dict[str, Any]]]:
    """The text of a whole answer, and its calls as OpenAI's messages have them. What is no sound call is text."""
    said = CallReader(form, tools, parallel=parallel, patient=True).push(text, last=True)
    calls: list[dict[str, Any]] = []
    for delta in said.calls:
        if "id" in delta:
            calls.append({"id": delta["id"], "type": delta["type"], "function": dict(delta["function"])})
        else:
            calls[-1]["function"]["arguments"] += delta["function"]["arguments"]
    return said.content, calls


class CallReader:
    """Finds calls in a text that grows.

    Attributes:
        called: whether there was any.
    """

    def __init__(
        self, form: CallForm, tools: Sequence[Mapping[str, Any]], *, parallel: bool = True, patient: bool = False
    ) -> None:
        """
        Args:
            tools: as OpenAI's requests have them; what calls another function is text.
            parallel: whether several calls are taken; what follows the first is dropped else.
            patient: tell of a call only when its arguments are complete, so that broken ones are text.
        """
        self.called = False
        self._form, self._parallel, self._patient = form, parallel, patient
        self._names = {str(tool["function"]["name"]) for tool in tools}
        self._head = _head(form)
        self._short_ids = ID in form.after or ID in (form.between or "")
        self._state: Callable[[], bool] = self._read_text
        self._last = False
        self._rest = ""  # of the text, not told yet
        self._said = Said()
        self._blank = ""  # behind the content so far, and no part of it if a call follows
        self._spoken = False  # whether there is any content
        self._opened = 0  # signs of `_rest` that open the call
        self._done = 0  # signs of `_rest` that `_scan` has read
        self._scan = Scan()
        self._arguments = ""
        self._enclosing = 0
        self._in_list = False
        self._count = 0

    def push(self, text: str, *, last: bool = False) -> Said:
        """What a new piece brings; with `last` also what was held back."""
        self._rest += text
        self._last = last
        self._said = Said()
        while self._state():
            pass
        if last and not self.called:
            self._said.content += self._blank
        return self._said

    # --- states: each works on `_rest` and returns whether the next one can go on ----------------------------

    def _read_text(self) -> bool:
        """Text, up to the mark that a call begins with. Without such a mark an answer must begin with the call."""
        opening = self._form.opening
        begins = self._rest.lstrip()
        if not opening and not self._spoken and (begins[:1] in ("{", "[") or not begins):
            return self._open(len(self._rest) - len(begins), 0) if begins else self._drop_blank()
        place = self._rest.find(opening) if opening else -1
        if place >= 0:
            return self._open(place, len(opening))
        keep = 0 if self._last else _overlap(self._rest, opening)
        self._tell(len(self._rest) - keep)
        return False

    def _read_head(self) -> bool:
        """A call up to its arguments."""
        body = self._rest[self._opened :]
        if not self._form.is_json:
            return self._read_name(body)
        begins = body.lstrip()
        if begins and begins[0] not in "{[":
            return self._give_up()
        found = self._head.match(body)
        if found is not None and (name := _text(found["name"])) in self._names:
            self._in_list = self._in_list or found["list"] is not None
            self._enclosing = found[0].count("{")
            return self._begin(name, self._opened + found.end())
        self._done = max(self._done, self._opened + len(body) - len(begins))
        read, end = self._scan.read(self._rest[self._done :])
        self._arguments += read
        self._done += len(self._rest) - self._done if end is None else end
        if end is None:
            return self._give_up() if self._last else False
        calls = list(self._calls_in(self._arguments))
        if not calls:
            return self._give_up()
        self._rest = self._rest[self._done :]
        for name, arguments in calls:
            self._say_begin(name)
            self._say_arguments(json.dumps(arguments, ensure_ascii=False))
        self._in_list, self._enclosing = self._in_list and not self._arguments.startswith("["), 0
        return self._go(self._read_behind)

    def _read_name(self, body: str) -> bool:
        """The name of a call that is no JSON object, up to its arguments."""
        middle = self._form.middle.strip()
        place = body.find(middle)
        if place < 0 or not body[place + len(middle) :].strip():
            return self._give_up() if self._last or len(body) > LONGEST_NAME else False
        name = body[:place].strip()
        behind = body[place + len(middle) :]
        blank = len(behind) - len(behind.lstrip())
        if name not in self._names or behind[blank] != "{":
            return self._give_up()
        return self._begin(name, self._opened + place + len(middle) + blank)

    def _read_arguments(self) -> bool:
        """The arguments of a call."""
        read, end = self._scan.read(self._rest[self._done :])
        self._arguments += read
        self._done = len(self._rest) if end is None else self._done + end
        if self._patient:
            if end is None and not self._last:
                return False
            if end is not None and _object(self._arguments) is None:
                return self._give_up()
            self._say_begin(self._name)
            self._say_arguments(self._arguments)
        else:
            self._say_arguments(read)
        self._rest, self._done = self._rest[self._done :], 0
        if end is None:
            return False
        self._scan = Scan(self._enclosing)
        return self._go(self._read_behind)

    def _read_behind(self) -> bool:
        """What stands behind the arguments: the end of the call's object and of a list, or the next call."""
        if not self._parallel:
            return self._go(self._drop)
        return self._read_behind_object() if self._form.is_json else self._read_behind_name()

    def _read_behind_object(self) -> bool:
        closing, begins = self._form.closing, self._rest.lstrip()
        if not begins:
            return False
        if self._enclosing and begins[0] in ",}":
            return self._go(self._read_enclosing)
        if self._in_list and begins[0] in ",]":
            self._rest, self._in_list = begins[1:], begins[0] == ","
            return self._open(0, 0) if self._in_list else True
        if closing and not self._last and closing.startswith(begins) and begins != closing:
            return False
        self._rest = begins.removeprefix(closing) if closing else begins
        if not self._form.opening:
            begins = self._rest.lstrip("; \n")
            if not begins and not self._last:
                return False
            if begins[:1] == "{":
                self._rest = begins
                return self._open(0, 0)
        return self._go(self._read_text)

    def _read_enclosing(self) -> bool:
        """The rest of the object that the arguments stand in."""
        _, end = self._scan.read(self._rest)
        self._rest = "" if end is None else self._rest[end:]
        if end is None:
            return False
        self._enclosing = 0
        return self._go(self._read_behind)

    def _read_behind_name(self) -> bool:
        begins = self._rest.lstrip()
        between, after = (self._form.between or "").strip(), self._form.after.strip()
        if between and begins.startswith(between):
            return self._open(len(self._rest) - len(begins), len(between))
        if begins.startswith(after):
            self._rest = begins[len(after) :]
            return self._go(self._read_text)
        if not self._last and (between.startswith(begins) or after.startswith(begins)):
            return False
        return self._go(self._read_text)

    def _drop(self) -> bool:
        self._rest = ""
        return False

    # --- steps between states ---------------------------------------------------------------------------------

    def _go(self, state: Callable[[], bool]) -> bool:
        self._state = state
        return True

    def _open(self, place: int, size: int) -> bool:
        """A call may begin at `place` of `_rest`, with a mark of so many signs."""
        self._tell(place)
        self._opened = self._done = size
        self._scan, self._arguments = Scan(), ""
        return self._go(self._read_head)

    def _begin(self, name: str, place: int) -> bool:
        """A call begins; its arguments stand at `place` of `_rest`."""
        self._name, self._done = name, place
        self._scan, self._arguments = Scan(), ""
        if not self._patient:
            self._say_begin(name)
        return self._go(self._read_arguments)

    def _give_up(self) -> bool:
        """What seemed to be a call is text."""
        self._spoken = True
        self._in_list = False
        self._tell(max(self._opened, 1))
        return self._go(self._read_text)

    def _tell(self, count: int) -> None:
        """The first signs of `_rest` are text."""
        text, self._rest = self._blank + self._rest[:count], self._rest[count:]
        content = text.rstrip()
        self._blank = text[len(content) :]
        self._said.content += content
        self._spoken = self._spoken or bool(content)

    def _drop_blank(self) -> bool:
        self._tell(len(self._rest))
        return False

    def _say_begin(self, name: str) -> None:
        self.called = True
        self._blank = ""
        size = 9 if self._short_ids else 24
        name_of_call = ("" if self._short_ids else "call_") + "".join(secrets.choice(SIGNS) for _ in range(size))
        function = {"name": name, "arguments": ""}
        self._said.calls.append({"index": self._count, "id": name_of_call, "type": "function", "function": function})
        self._count += 1

    def _say_arguments(self, piece: str) -> None:
        if piece:
            self._said.calls.append({"index": self._count - 1, "function": {"arguments": piece}})

    def _calls_in(self, text: str) -> Iterator[tuple[str, Any]]:
        """Names and arguments of a complete object or list that may be calls; nothing if one of them is none."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return
        found = [self._call_in(one) for one in (value if isinstance(value, list) else [value])]
        if found and all(found):
            yield from (call for call in found if call)

    def _call_in(self, value: Any) -> tuple[str, Any] | None:
        """Name and arguments of a call, whatever their order; the arguments may be JSON text."""
        if not isinstance(value, dict):
            return None
        value = value["function"] if isinstance(value.get("function"), dict) else value
        name = value.get(str(self._form.name_key))
        arguments = next((value[key] for key in _arguments_keys(self._form) if key in value), None)
        if isinstance(arguments, str):
            arguments = _object(arguments)
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        return name, arguments


def _arguments_keys(form: CallForm) -> list[str]:
    """The template's own key, and those that models know from others."""
    return list(dict.fromkeys([str(form.arguments_key), "arguments", "parameters"]))


def _head(form: CallForm) -> re.Pattern[str]:
    """The beginning of a JSON object that is a call, up to its arguments."""
    keys = "|".join(map(re.escape, _arguments_keys(form)))
    return re.compile(
        r'\s*(?P<list>\[)?\s*\{\s*(?:"(?:type|id)"\s*:\s*"[^"]*"\s*,\s*|"function"\s*:\s*\{\s*)*'
        rf'"{re.escape(str(form.name_key))}"\s*:\s*(?P<name>"(?:[^"\\]|\\.)*")\s*,\s*"(?:{keys})"\s*:\s*(?=\{{)'
    )


def _text(quoted: str) -> str | None:
    """A JSON text."""
    try:
        return str(json.loads(quoted))
    except ValueError:
        return None


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that is a beginning of `mark`, but not all of it."""
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(mark[:size])), 0)
