"""Signals that this project handles: what they interrupt goes on."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from utils import errors

Handler = Callable[[int, FrameType | None], Any] | int | None


def handle(number: int, handler: Handler) -> Handler:
    """`signal.signal`, with which system calls under way are restarted; returns the handler before.

    Python's own would let them fail. It repeats its own calls then, but Paddle's store takes a failed one for
    the end of rank 0, and with it the run ends without a checkpoint.
    """
    before = signal.signal(number, handler)
    signal.siginterrupt(number, False)
    return before


def notice(text: str) -> None:
    """`errors.notice` for a handler, which may have interrupted a print: the stream refuses a second one then."""
    try:
        descriptor = sys.stderr.fileno()
    except (OSError, AttributeError):  # a stream in memory, as in a notebook
        errors.notice(text)
        return
    if not errors.silent:
        os.write(descriptor, f"note: {text}\n".encode())
