"""Guesses for speculative decoding: what followed the last few tokens when they occurred before.

Prompt lookup (Saxena 2023): answers often repeat the prompt or themselves, in summaries, corrections
and code. A guess costs nothing; the model verifies all of its tokens in one forward.
"""

from __future__ import annotations

from collections.abc import Sequence

# Sizes of the n-grams that are looked up, the first that is found decides. Single tokens are left
# out: what follows "the" is hardly ever right, and a wrong guess costs computation.
SIZES = (3, 2)


class Lookup:
    """Where each n-gram of a growing text occurred last."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        for token in text:
            self.accept(token)

    def accept(self, token: int) -> None:
        """Adds a token to the text."""
        for size in SIZES:
            if len(self._text) >= size:
                self._after[tuple(self._text[-size:])] = len(self._text)
        self._text.append(token)

    def draft(self, count: int) -> list[int]:
        """At most `count` tokens that followed the latest match of the text's end; maybe none."""
        for size in SIZES:
            start = self._after.get(tuple(self._text[-size:])) if len(self._text) >= size else None
            if start is not None and count > 0:
                return self._text[start : start + count]
        return []
