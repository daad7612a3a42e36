"""Long conversations that grow: what is known of their earlier rounds is not written by the template again.

A template writes a conversation anew for each of its answers, which takes as long as the square of its length. Where
the template only appends, the ids of the leading rounds stay as they are when messages follow.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.data.marks import Rendered

if TYPE_CHECKING:
    from utils.data.template import Message, Round
    from utils.families.tokenizers import Tokenizer

SHORTEST = 8  # answers; of fewer it is not worth it
CHARACTERS = 2**21  # of all conversations that are known


class Told(NamedTuple):
    """The leading messages of a conversation, up to an answer.

    Attributes:
        length: number of messages.
        rounds: of the answers among them.
        behind: ids of what the template writes behind the last one.
        text: what the template writes of them.
    """

    length: int = 0
    rounds: tuple[Round, ...] = ()
    behind: tuple[int, ...] = ()
    text: Rendered = Rendered("")


class History:
    """The conversations that a template has written lately. Any thread may use it."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[Tokenizer, bytes], Told] = OrderedDict()
        self._characters = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[History], tuple[()]]:
        """Another process begins with none."""
        return type(self), ()

    def longest(self, tokenizer: Tokenizer, messages: Sequence[Message], context: Any) -> Told:
        """What is known of the beginning of a conversation; `Told()` if that is nothing.

        Args:
            context: a JSON value; all else that decides what the template writes.
        """
        for key in reversed(_keys(tokenizer, messages, context)):
            with self._lock:
                if key in self._known:
                    self._known.move_to_end(key)
                    return self._known[key]
        return Told()

    def add(self, tokenizer: Tokenizer, messages: Sequence[Message], context: Any, told: Told) -> None:
        """Remembers `told` of a conversation with these messages, which may go on behind it."""
        keys = _keys(tokenizer, messages[: told.length], context)
        if not keys:
            return
        with self._lock:
            before = self._known.pop(keys[-1], Told())
            self._known[keys[-1]] = told
            self._characters += len(told.text.text) - len(before.text.text)
            while self._characters > CHARACTERS:
                _, oldest = self._known.popitem(last=False)
                self._characters -= len(oldest.text.text)


def _keys(tokenizer: Tokenizer, messages: Sequence[Message], context: Any) -> list[tuple[Tokenizer, bytes]]:
    """A key for each part of a conversation that ends with an answer and has enough of them, the shortest first."""
    digest, answers, keys = hashlib.sha256(_json(context)), 0, []
    for message in messages:
        digest.update(_json(message))
        if message["role"] == "assistant":
            answers += 1
            if answers >= SHORTEST:
                keys.append((tokenizer, digest.digest()))
    return keys


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\0"
