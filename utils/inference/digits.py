"""Numbers of JSON that end: a schema lets them grow without end, and a model may prefer one more digit for ever."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MOST_DIGITS = 20  # in a row
MOST_DECIMALS = 15  # behind a point: a double keeps so many, and 0.999... of more would be 1
MOST_OF_EXPONENT = 2  # so that every number is a double
_DIGITS, _EXPONENT, _SIGNS = b"0123456789", b"eE", b"+-"
_QUOTE, _BACKSLASH, _POINT = b'"\\.'


class DigitTokens:
    """The digits with which the tokens of a vocabulary begin.

    Attributes:
        leading: how many there are, int [vocabulary].
        most: the largest of these.
        single: tokens that are one digit, ids.
    """

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.leading: NDArray[np.int64] = np.array([len(token) - len(token.lstrip(_DIGITS)) for token in tokens])
        self.most = int(self.leading.max())
        self.single = [place for place in np.flatnonzero(self.leading).tolist() if len(tokens[place]) == 1]


class DigitRun:
    """How many digits end a text that is JSON so far, or JSON among the marks of a template; none within a string.

    Attributes:
        room: how many more may follow.
    """

    def __init__(self) -> None:
        self.room = MOST_DIGITS
        self._in_string = self._escaped = self._in_exponent = False

    def add(self, text: bytes) -> None:
        """Goes on with the bytes of a token."""
        for byte in text:
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = byte == _BACKSLASH
                self._in_string = byte != _QUOTE
            elif byte in _DIGITS:
                self.room -= 1
            else:
                self._in_string = byte == _QUOTE
                self._in_exponent = byte in _EXPONENT or (self._in_exponent and byte in _SIGNS)
                most = MOST_DECIMALS if byte == _POINT else MOST_DIGITS
                self.room = MOST_OF_EXPONENT if self._in_exponent else most
