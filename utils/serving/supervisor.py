"""The process of the model as its parent sees it: how it starts and ends, and when it may start again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from utils.errors import EXIT_USER_ERROR
from utils.serving.frames import Link
from utils.serving.settings import ModelSettings

ROOT = Path(__file__).resolve().parents[2]
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before a process is started again
GOOD_WHILE = 60.0  # seconds of service after which failures before it do not count any more
MOST_FAILURES = 8  # in a row
MOST_FAILURES_TO_START = 3  # of a model that has never been loaded
END_SECONDS = 10.0  # for a process that was told to end


class ModelProcess:
    """One life of the process of the model.

    Attributes:
        link: to it.
    """

    def __init__(self, settings: ModelSettings) -> None:
        """Starts it. The thread that does so has to live as long: the system ends the process with it.

        Raises:
            OSError: the system has no room for another process.
        """
        ours, theirs = socket.socketpair()
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "utils.serving.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        self.link = Link(ours)
        self.link.send(settings.to_json())

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """Ends it at once."""
        self._process.kill()

    def ended(self, seconds: float = END_SECONDS) -> int:
        """Waits until it has ended, which it is made to after some seconds; its exit code, or minus a signal."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        self._process.kill()
        return self._process.wait()


class Failures:
    """The ends of the process that nobody had asked for.

    Attributes:
        count: in a row.
        last: exit code of the last one, or minus a signal.
    """

    def __init__(self) -> None:
        self.count = 0
        self.last = 0
        self._served = False
        self._ready_since: float | None = None

    def ready(self) -> None:
        """The model is loaded."""
        self._served = True
        self._ready_since = time.monotonic()

    def add(self, code: int) -> None:
        """The process has ended."""
        if self._ready_since is not None and time.monotonic() - self._ready_since > GOOD_WHILE:
            self.count = 0
        self._ready_since = None
        self.count += 1
        self.last = code

    @property
    def enough(self) -> bool:
        """Whether there is no use in starting it again."""
        if not self._served and self.last == EXIT_USER_ERROR:
            return True
        return self.count >= (MOST_FAILURES if self._served else MOST_FAILURES_TO_START)

    @property
    def pause(self) -> float:
        """Seconds until the next start."""
        return float(min(FIRST_PAUSE * 2 ** (self.count - 1), LONGEST_PAUSE))

    @property
    def how(self) -> str:
        """How it ended, in words."""
        if self.last == -signal.SIGKILL:
            return "was killed, perhaps because memory was short"
        if self.last < 0:
            return f"was ended by {signal.Signals(-self.last).name}"
        return f"ended with exit code {self.last}"
