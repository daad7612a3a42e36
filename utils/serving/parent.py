"""A process that another one has started ends with it, however that one ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """From here on the system kills this process as soon as its parent has gone, also by `kill -9`.

    Call it on the main thread, early. Only Linux can do this; elsewhere it has no effect.

    Args:
        parent: process number of the parent, as the parent has given it: it may have gone before the call.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
