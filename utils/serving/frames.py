"""The line between two processes: JSON values over a pair of sockets, each behind its length in bytes."""

from __future__ import annotations

import json
import socket
import struct
import threading
from base64 import b64decode, b64encode
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.serving.protocol import Ending, Update

PATIENCE = 30.0  # seconds; a partner that reads nothing for so long hangs
MOST_BYTES = 1 << 30  # of one value
_LENGTH = struct.Struct("!I")
_TIMEVAL = struct.Struct("@ll")  # of setsockopt(2)


class LinkError(Exception):
    """The other side is gone, reads nothing, or has written something else."""


class Link:
    """One end. Any thread may send; one receives."""

    def __init__(self, end: socket.socket, patience: float = PATIENCE) -> None:
        """
        Args:
            end: connected; `close` closes it.
            patience: seconds that `send` waits for the other side to read.
        """
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(patience), int(patience % 1 * 1e6)))
        self._socket = end
        self._stream = end.makefile("rb", buffering=1 << 16)
        self._sending = threading.Lock()

    def send(self, value: Any) -> None:
        """Writes a JSON value.

        Raises:
            LinkError: the other side is gone, or read nothing for `patience` seconds. Nothing more can be sent.
        """
        content = json.dumps(value, separators=(",", ":")).encode()
        try:
            with self._sending:
                self._socket.sendall(_LENGTH.pack(len(content)) + content)
        except OSError as error:
            self.end()  # half a value may be on its way
            raise LinkError(f"the other process does not listen: {error.strerror or error}") from None

    def receive(self) -> Any:
        """The next JSON value; None at the end, also if that cuts a value.

        Raises:
            LinkError: what came is no such value.
        """
        try:
            head = self._stream.read(_LENGTH.size)
            if len(head) < _LENGTH.size:
                return None
            (length,) = _LENGTH.unpack(head)
            if length > MOST_BYTES:
                raise LinkError(f"a value of {length} bytes")
            content = self._stream.read(length)
            return json.loads(content) if len(content) == length else None
        except json.JSONDecodeError as error:
            raise LinkError(f"no JSON: {error}") from None
        except OSError:  # reset
            return None

    def end(self) -> None:
        """Ends the connection; who waits in `receive`, here and there, gets None."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the connection; to be called by who receives."""
        self.end()
        with self._sending:
            self._stream.close()
            self._socket.close()


# --- updates ----------------------------------------------------------------------------------------


def pack(update: Update) -> list[Any]:
    """An update as a JSON value without the empty fields at its end; what comes most often is shortest."""
    ending = update.ending
    values: list[Any] = [
        update.tokens,
        update.text,
        update.opened,
        update.logprobs,
        update.top_logprobs,
        None if ending is None else [getattr(ending, name) for name in Ending.__dataclass_fields__],
        None if update.vectors is None else _pack_vectors(update.vectors),
    ]
    while values and not values[-1]:
        values.pop()
    return values


def unpack(values: list[Any]) -> Update:
    """The update that `pack` has written."""
    tokens, text, opened, logprobs, top, ending, vectors = [*values, *_EMPTY[len(values) :]]
    return Update(
        bool(opened),
        text,
        tuple(tokens),
        tuple(logprobs),
        _ranks(top),
        ending and _ending(ending),
        vectors and _vectors(*vectors),
    )


_EMPTY: list[Any] = [(), "", False, (), (), None, None]


def _ending(values: list[Any]) -> Ending:
    ending = dict(zip(Ending.__dataclass_fields__, values, strict=True))
    if ending["prompt_logprobs"] is not None:
        ending["prompt_logprobs"] = tuple(ending["prompt_logprobs"])
    if ending["prompt_top_logprobs"] is not None:
        ending["prompt_top_logprobs"] = _ranks(ending["prompt_top_logprobs"])
    return Ending(**ending)


def _ranks(values: Any) -> tuple[tuple[tuple[int, float], ...], ...]:
    return tuple(tuple((token, score) for token, score in place) for place in values)


def _pack_vectors(vectors: NDArray[np.float32]) -> tuple[int, str]:
    """Vectors [rows, size] for a JSON value: decimal digits would take ten times as long."""
    return vectors.shape[1], b64encode(vectors.astype("<f4").tobytes()).decode()


def _vectors(size: int, content: str) -> NDArray[np.float32]:
    return np.frombuffer(b64decode(content), "<f4").reshape(-1, size)
