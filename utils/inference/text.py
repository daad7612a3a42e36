"""Text of a growing answer: whole characters only, and stop words wherever tokens cut them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

# What a decoder writes for bytes that are no complete character (yet).
INCOMPLETE = "\ufffd"


class TextStream:
    """Turns tokens into text as they come.

    The pieces returned by `push` and `finish` join to exactly the text of all tokens, cut before the
    first stop word (the one that is complete first; of several, the longest). A piece never ends inside
    a character, nor inside what may become a stop word.

    Attributes:
        stopped: whether a stop word was found; nothing more is returned then.
        text: everything returned so far.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        """
        Args:
            decode: ids to text.
            stop: texts that end the answer.
        """
        self.stopped = False
        self.text = ""
        self._decode = decode
        self._stop = tuple(stop)
        self._may_stop = True
        self._ids: list[int] = []
        # Tokens from _start are decoded again with each new one, since a decoder may treat the first
        # token of a text differently (a leading space, say); those before _done are returned already, as _known.
        self._start = 0
        self._done = 0
        self._known = ""
        self._held = ""

    def copy(self) -> TextStream:
        """A stream that goes on from here on its own."""
        other = copy.copy(self)
        other._ids = list(self._ids)
        return other

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """Adds one token; returns the text that is now certain, which may be empty.

        Args:
            may_stop: whether stop words count. Text from before they did is part of none.
        """
        self._ids.append(token)
        self._may_stop = may_stop
        fresh = self._fresh()
        if not fresh or fresh.endswith(INCOMPLETE):
            return ""
        last = self._decode(self._ids[self._done :])
        if last.strip():  # decoders drop all blanks that a text begins with
            self._start, self._known = self._done, last
        else:
            self._known += fresh
        self._done = len(self._ids)
        return self._release(fresh)

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        if self.stopped:
            return ""
        rest = self._release(self._fresh())
        self._start, self._done, self._known = len(self._ids), len(self._ids), ""
        rest += self._held
        self.text += self._held
        self._held = ""
        return rest

    def _fresh(self) -> str:
        text = self._decode(self._ids[self._start :])
        if text.startswith(self._known):
            return text[len(self._known) :]
        return self._decode(self._ids[self._done :])  # a decoder gives up all bytes beside a wrong one

    def _release(self, fresh: str) -> str:
        """Moves text from the end that may belong to a stop word into `_held`; returns what is before."""
        if self.stopped:
            return ""
        text = self._held + fresh
        words = self._stop if self._may_stop else ()
        found = [(text.find(word) + len(word), text.find(word)) for word in words if word in text]
        if found:
            self.stopped = True
            certain, self._held = text[: min(found)[1]], ""
        else:
            keep = max((_overlap(text, word) for word in words), default=0)
            certain, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += certain
        return certain


def whole_text(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> str:
    """What a stream gives of these tokens, all at once."""
    text = decode(ids)
    if INCOMPLETE not in text:
        return text
    stream = TextStream(decode)
    for token in ids:
        stream.push(token)
    stream.finish()
    return stream.text


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that is a beginning, but not all, of `word`."""
    for length in range(min(len(word) - 1, len(text)), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0
