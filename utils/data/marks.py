"""Text of users stays text: which special tokens of a rendered template are not the template's own.

Two characters that nobody has written go through the template with the texts: one before each special token that
a text holds, one at the ends of a text that could make a token together with what comes next to it. What is rendered
tells by them where text of users is. A text without either goes through as it is.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from utils.families.tokenizers import Tokenizer

# Code points that stand for no character, then those of private use: there is always one that no text has.
CANDIDATES = (range(0xFDD0, 0xFDF0), range(0xF0000, 0xFFFFE))


class Rendered(NamedTuple):
    """What a template wrote.

    Attributes:
        text: without marks.
        plain: where the special tokens begin that are text of users, ascending.
    """

    text: str
    plain: tuple[int, ...] = ()

    @classmethod
    def of_user(cls, text: str, tokenizer: Tokenizer, own: Collection[str]) -> Rendered:
        """A text in which no special token is meant, and none of the template's own."""
        return cls(text, tuple(start for start, _ in tokenizer.special_spans(text, own)))

    def cut(self, start: int, end: int | None = None) -> Rendered:
        """The part from `start` to `end`."""
        end = len(self.text) if end is None else end
        return Rendered(self.text[start:end], tuple(place - start for place in self.plain if start <= place < end))

    def __add__(self, other: Rendered) -> Rendered:  # type: ignore[override]
        moved = tuple(place + len(self.text) for place in other.plain)
        return Rendered(self.text + other.text, self.plain + moved)

    def encode(self, tokenizer: Tokenizer, *, continuation: bool = False) -> list[int]:
        """The ids; see `Tokenizer.encode`."""
        return tokenizer.encode(self.text, continuation=continuation, plain=frozenset(self.plain))


class Marks:
    """The marks of one conversation.

    Attributes:
        ready: the values with marks, which templates get in their place.
    """

    def __init__(
        self, tokenizer: Tokenizer, values: Any, *, own: Collection[str] = (), special_in_text: bool = False
    ) -> None:
        """
        Args:
            values: texts in lists and dictionaries.
            own: tokens that are the template's, special or not.
            special_in_text: special tokens in them are special tokens; nothing is marked.
        """
        self._tokenizer, self._own = tokenizer, own
        texts = "".join(_texts(values))
        codes = (code for part in CANDIDATES for code in part)
        unused = (code for code in codes if chr(code) not in texts and _escaped(code) not in texts)
        found = [next(unused) for _ in range(3)]
        self._before, self._border, self._end = map(chr, found)
        self._kinds = {form: chr(code) for code in found for form in (chr(code), _escaped(code))}
        self._any = re.compile("|".join(map(re.escape, self._kinds)))
        self._beginnings, self._endings = _borders(() if special_in_text else (*tokenizer.written_special, *own))
        self._longest = max(map(len, self._beginnings), default=0)
        self.ready = values if special_in_text else self._put(values)

    def _put(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._mark(value)
        if isinstance(value, list):
            return [self._put(part) for part in value]
        if isinstance(value, dict):
            return {self._mark_tokens(key): self._put(part) for key, part in value.items()}
        return value

    def _mark_tokens(self, text: str) -> str:
        marked, done = "", 0
        for start, _ in self._tokenizer.special_spans(text, self._own):
            marked += text[done:start] + self._before
            done = start
        return marked + text[done:]

    def _mark(self, text: str) -> str:
        marked, inner = self._mark_tokens(text), text.strip()
        sizes = range(1, min(self._longest, len(inner)) + 1)
        if any(inner[:size] in self._endings for size in sizes):
            blanks = len(marked) - len(marked.lstrip())
            marked = marked[:blanks] + self._border + marked[blanks:]
        if any(inner[-size:] in self._beginnings for size in sizes):
            marked = _behind(marked, self._border)
        return marked

    def ended(self, text: str) -> str:
        """A text of `ready` with a mark behind its last character that is no blank; `end` finds it again."""
        return _behind(text, self._end)

    def end(self, written: str) -> int | None:
        """Where a text of `ended` ends in what a template wrote, marks not counted; None if that is not there."""
        place = written.rfind(self._end)
        return None if place < 0 else len(self._any.sub("", written[:place]))

    def take(self, written: str) -> Rendered:
        """What a template wrote of `ready`, without marks."""
        parts, own, borders = list[str](), list[int](), list[int]()
        done, size = 0, 0
        for mark in self._any.finditer(written):
            parts.append(written[done : mark.start()])
            size += len(parts[-1])
            done = mark.end()
            kind = self._kinds[mark[0]]
            if kind != self._end:
                (own if kind == self._before else borders).append(size)
        if not parts:
            return Rendered(written)
        text = "".join([*parts, written[done:]])
        spans = self._tokenizer.special_spans(text, self._own)
        plain = (start for start, end in spans if _within(own, start, end) or _within(borders, start + 1, end))
        return Rendered(text, tuple(plain))


def _escaped(code: int) -> str:
    """How JSON, and Python where a template writes a whole object, show the character."""
    return f"\\u{code:04x}"


def _behind(text: str, mark: str) -> str:
    """The text with a mark behind its last character that is no blank."""
    inner = text.rstrip()
    return inner + mark + text[len(inner) :]


def _within(places: list[int], first: int, end: int) -> bool:
    """Whether one of the ascending places is in range(first, end)."""
    found = bisect_left(places, first)
    return found < len(places) and places[found] < end


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _texts(key)
            yield from _texts(part)


@cache
def _borders(tokens: tuple[str, ...]) -> tuple[frozenset[str], frozenset[str]]:
    """What begins and what ends one of the tokens, but is not all of it; not of those that look like words."""
    cuts = [(token[:at], token[at:]) for token in tokens if not token.isalnum() for at in range(1, len(token))]
    return frozenset(first for first, _ in cuts), frozenset(last for _, last in cuts)
