"""Answers that begin with the model's reasoning, apart from what it says."""

from __future__ import annotations

from typing import NamedTuple

OPENING = "<think>"
CLOSING = "</think>"


class Said(NamedTuple):
    """Text of an answer, by what it is."""

    reasoning: str = ""
    content: str = ""


class Thoughts:
    """Splits a growing answer at the tag that ends its reasoning; pieces may be cut anywhere."""

    def __init__(self, opened: str | None) -> None:
        """
        Args:
            opened: the tag that the prompt has opened; None if the answer itself may begin with one.
        """
        self._opening = None if opened else OPENING
        self._closing = f"</{opened}>" if opened else CLOSING
        self._held = ""
        self._begun = False
        self._state = "thinking" if opened else "before"

    def push(self, text: str, *, last: bool = False) -> Said:
        """What is certain now; with `last` all of it."""
        self._held += text
        reasoning = ""
        if self._state == "before":
            self._begin(last)
        if self._state == "thinking":
            reasoning = self._think(last)
        if self._state == "after":
            self._held = self._held.lstrip("\n")
            if self._held or last:
                self._state = "saying"
        content = ""
        if self._state == "saying":
            content, self._held = self._held, ""
        return Said(reasoning, content)

    def _begin(self, last: bool) -> None:
        opening = self._opening or ""
        inner = self._held.lstrip()
        if inner.startswith(opening):
            self._held, self._state = inner.removeprefix(opening), "thinking"
        elif last or not opening.startswith(inner):
            self._state = "saying"

    def _think(self, last: bool) -> str:
        if not self._begun:
            self._held = self._held.lstrip("\n")
            self._begun = bool(self._held)
        thought, found, rest = self._held.partition(self._closing)
        if found:
            self._held, self._state = rest, "after"
            return thought.rstrip("\n")
        keep = 0 if last else self._uncertain()
        certain = len(self._held) - keep
        thought, self._held = self._held[:certain], self._held[certain:]
        return thought

    def _uncertain(self) -> int:
        """How many characters at the end may belong to the closing tag, or to the line ends before it."""
        for length in range(min(len(self._closing) - 1, len(self._held)), -1, -1):
            head = self._held[: len(self._held) - length]
            if self._held.endswith(self._closing[:length]):
                return length + len(head) - len(head.rstrip("\n"))
        return 0
