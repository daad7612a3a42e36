"""The processes that the HTTP side starts, the model's and the page's: how they start, end, and start again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from utils.arguments.serve_checks import KEY_VARIABLE
from utils.errors import EXIT_USER_ERROR, notice
from utils.serving.frames import Link
from utils.serving.page.settings import PageSettings
from utils.serving.settings import ModelSettings

ROOT = Path(__file__).resolve().parents[2]
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before a process is started again
GOOD_WHILE = 60.0  # seconds of service after which failures before it do not count any more
MOST_FAILURES = 8  # in a row
MOST_FAILURES_TO_START = 3  # of a model that has never been loaded
END_SECONDS = 10.0  # for a process that was told to end


def module(name: str, *words: object) -> list[str]:
    """The command that runs a module of this program, wherever the user is; see `environment`."""
    return [sys.executable, "-P", "-m", name, *map(str, words)]


def environment(**more: str) -> dict[str, str]:
    """The variables of a process that runs a module of this program: without the key of the API."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}
    if KEY_VARIABLE not in more:
        variables.pop(KEY_VARIABLE, None)
    return variables


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
        with theirs:
            self._process = subprocess.Popen(
                module("utils.serving.worker", theirs.fileno(), os.getpid()),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment(),
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


class PageProcess:
    """The process of the chat page; it is started again when it dies."""

    def __init__(self, settings: PageSettings) -> None:
        self._settings = settings
        self._failures = Failures()
        self._ended = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._live, name="page", daemon=True)

    def start(self) -> None:
        """Starts it; returns at once."""
        self._thread.start()

    def leave(self) -> None:
        """From here on it is not started again; call it as soon as the server begins to end."""
        self._ended.set()

    def stop(self) -> None:
        """Ends it."""
        with self._lock:
            self.leave()
            if self._process is not None:
                self._process.kill()  # it has nothing to lose
        self._thread.join()

    def _live(self) -> None:
        """The thread that starts it stays as long: the system ends the process with it."""
        while not self._ended.is_set():
            with self._lock:
                self._process = subprocess.Popen(
                    module("utils.serving.page"),
                    stdin=subprocess.DEVNULL,
                    env=environment(**self._settings.environment()),
                )
            self._failures.ready()
            code = self._process.wait()
            self._failures.add(code)
            if self._ended.wait(self._failures.pause):  # the same signal may have ended it and be about to end us
                return
            if code == EXIT_USER_ERROR:
                notice("there is no page, for the reason above; the API goes on without")
                return
            if self._failures.enough:
                notice(f"the page {self._failures.how}, {self._failures.count} times in a row; the API goes on without")
                return
            notice(f"the page {self._failures.how}; starting it again")
