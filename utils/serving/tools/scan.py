"""Where a JSON object or list ends, in a text that grows."""

from __future__ import annotations

import json


class Scan:
    """Reads one value sign by sign."""

    def __init__(self, depth: int = 0) -> None:
        """
        Args:
            depth: how many objects and lists are open already.
        """
        self._depth = depth
        self._in_text = self._escaped = False

    def read(self, text: str) -> tuple[str, int | None]:
        """
        Returns:
            What belongs to the value, with line ends and the like escaped where they stand in its texts, as models
            forget to do; and how many signs of `text` that are if the value ends there.
        """
        parts = []
        for place, sign in enumerate(text, start=1):
            if self._in_text:
                parts.append(self._within(sign))
                continue
            parts.append(sign)
            if sign == '"':
                self._in_text = True
            elif sign in "{[":
                self._depth += 1
            elif sign in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return "".join(parts), place
        return "".join(parts), None

    def _within(self, sign: str) -> str:
        """A sign of a text."""
        if self._escaped:
            self._escaped = False
        elif sign == "\\":
            self._escaped = True
        elif sign == '"':
            self._in_text = False
        return json.dumps(sign)[1:-1] if sign < " " else sign
