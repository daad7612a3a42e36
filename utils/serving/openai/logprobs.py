"""Log-probabilities in the two forms of OpenAI's API. Tokens stand there as text and as bytes, since a token may be a
part of a character only.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from utils.families.token_bytes import token_bytes
from utils.families.tokenizers import Tokenizer
from utils.inference.sampling import Alternatives

LOWEST = -9999.0  # stands for minus infinity, which JSON lacks


@lru_cache(maxsize=100_000)
def bytes_of(tokenizer: Tokenizer, token: int) -> bytes:
    """What a token adds to a text; see `token_bytes`."""
    return token_bytes(tokenizer, token)


def shown(data: bytes) -> str:
    """The text of a token; bytes that are no whole characters as \\xNN."""
    return data.decode("utf-8", "backslashreplace")


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def scored(
    tokens: Sequence[int], logprobs: Sequence[float], tops: Sequence[Alternatives]
) -> Iterator[tuple[int, float, Alternatives]]:
    """Tokens with their log-probabilities and the likeliest ones, of which there are none if nobody asked for them."""
    return zip(tokens, logprobs, tops or [()] * len(tokens), strict=True)


def chat_entries(
    tokenizer: Tokenizer, tokens: Sequence[int], logprobs: Sequence[float], tops: Sequence[Alternatives]
) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat."""
    entries = []
    for token, logprob, others in scored(tokens, logprobs, tops):
        top = [_entry(tokenizer, other, value) for other, value in others]
        entries.append({**_entry(tokenizer, token, logprob), "top_logprobs": top})
    return entries


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = bytes_of(tokenizer, token)
    return {"token": shown(data), "logprob": finite(logprob), "bytes": list(data)}


class CompletionLogprobs:
    """`logprobs` of a completion, whose tokens come bit by bit; `take` gives those that are new.

    `text_offset` is where a token begins in the text of the choice, in characters.
    """

    def __init__(self, tokenizer: Tokenizer, count: int) -> None:
        """
        Args:
            count: how many of the likeliest tokens are told.
        """
        self._tokenizer, self._count = tokenizer, count
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0  # that are complete
        self._first = True

    def take(
        self, tokens: Iterable[int], logprobs: Iterable[float | None], tops: Iterable[Alternatives | None]
    ) -> dict[str, Any]:
        """The form of these tokens, which follow those before; None stands for what the first token has not."""
        names, offsets, values, others = [], [], [], []
        for token, logprob, top in zip(tokens, logprobs, tops, strict=True):
            data = bytes_of(self._tokenizer, token)
            names.append(_name(data))
            offsets.append(self._offset(data))
            self._advance(token, data)
            values.append(None if logprob is None else finite(logprob))
            others.append(None if top is None or logprob is None else self._top(top, token, logprob))
        return {
            "tokens": names,
            "token_logprobs": values,
            "top_logprobs": others if self._count else None,
            "text_offset": offsets,
        }

    def _top(self, top: Alternatives, token: int, logprob: float) -> dict[str, float]:
        likely = [*top[: self._count], (token, logprob)]
        return {_name(bytes_of(self._tokenizer, other)): finite(value) for other, value in likely}

    def _offset(self, data: bytes) -> int:
        """A token that goes on with a character begins where the character does."""
        begun, _ = self._decoder.getstate()
        goes_on = bool(data) and data[0] & 0xC0 == 0x80
        return self._characters + (bool(begun) and not goes_on)

    def _advance(self, token: int, data: bytes) -> None:
        if token in self._tokenizer.special_ids:
            return  # the text does not have it
        if self._first and data.startswith(b" ") and not self._tokenizer.decode([token]).startswith(" "):
            data = data[1:]  # a tokenizer may drop the blank that begins a text
        self._first = False
        self._characters += len(self._decoder.decode(data))


def _name(data: bytes) -> str:
    text = shown(data)
    try:
        data.decode()
    except UnicodeDecodeError:
        return f"bytes:{text}"
    return text
