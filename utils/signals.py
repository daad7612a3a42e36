"""What a signal does to this process: it ends in order and at once, or after what is under way.

A handler that raises is no good for the first: libraries catch every exception while they are imported, and the run
goes on.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn, TextIO

from utils import errors

Handler = Callable[[int, FrameType | None], Any] | int | None

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)

_output_closed: Handler = None  # see `handle`
_unfinished: list[Path] = []  # files and folders that this process is writing


def take() -> None:
    """From here on a signal ends this process at once, see `end`; scripts call it before they import anything slow.

    Standard output and error get used to losing their reader: a closed pipe counts as a signal too, and a terminal
    that has gone is written to in vain. SIGHUP stays ignored where it is (nohup).
    """
    for number in ENDING:
        if not is_ignored(number):
            handle(number, end)
    sys.stdout, sys.stderr = _patient(sys.stdout), _patient(sys.stderr)
    os.register_at_fork(after_in_child=_in_child)
    sys.meta_path.insert(0, _EarlyThreads())


def handle(number: int, handler: Handler) -> Handler:
    """`signal.signal`, with which system calls under way are restarted; returns the handler before.

    Python's own would let them fail. It repeats its own calls then, but Paddle's store takes a failed one for
    the end of rank 0, and with it the run ends without a checkpoint.

    The handler of SIGPIPE is called when nobody reads standard output or error any more; the signal itself stays
    ignored, as connections of libraries cause it too.
    """
    global _output_closed
    if number == signal.SIGPIPE:
        before, _output_closed = _output_closed, handler
        return before
    before = signal.signal(number, handler)
    signal.siginterrupt(number, False)
    return before


def current(number: int) -> Handler:
    """The handler that `handle` has set."""
    return _output_closed if number == signal.SIGPIPE else signal.getsignal(number)


def is_ignored(number: int) -> bool:
    """Whether the user has said that this process is to outlive its terminal (nohup)."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


def end(number: int, frame: FrameType | None = None) -> NoReturn:
    """A handler that ends the process with 128 + `number`: removes what it has half written, says so in one line."""
    for path in _unfinished:
        _remove(path)
    if "multiprocessing" in sys.modules:
        from multiprocessing import active_children

        for child in active_children():
            child.kill()
    if number != signal.SIGPIPE:
        _write(2, f"ended by {name(number)}")  # whatever stands in the place of sys.stderr now
    with suppress(Exception):  # the signal may have interrupted a print
        sys.stdout.flush()
    os._exit(128 + number)


@contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """A block that writes a file or fills a folder and then moves it; what is left at `path` is removed in the end,
    also if a signal ends the process."""
    _unfinished.append(path)
    try:
        yield
    finally:
        _remove(path)
        _unfinished.remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # it was a folder, or has been moved
        path.unlink()


@contextmanager
def kept(number: int) -> Iterator[None]:
    """A block in which a library may replace Python's handler, as Paddle does when it loads: a report of a crash.

    Afterwards the handler is what it was; a signal that comes meanwhile waits until then: every other thread has to
    leave it to this one, see `_EarlyThreads`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(number)
    with kept_from_children(number):
        try:
            yield
        finally:
            handle(number, handler)


class _EarlyThreads(MetaPathFinder):
    """Finds NumPy, whose library starts threads when it loads: they never get the signals that wait in `kept`.

    The system hands a signal to any thread that takes it, and nobody can change that of another thread later.
    """

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "numpy" or (spec := PathFinder.find_spec(fullname, path, target)) is None or not spec.loader:
            return None
        execute = spec.loader.exec_module

        def execute_apart(module: ModuleType) -> None:
            with kept_from_children(signal.SIGTERM):
                execute(module)

        spec.loader.exec_module = execute_apart  # type: ignore[method-assign]
        return spec


@contextmanager
def left_to_system() -> Iterator[None]:
    """A block in a library that does not come back to Python while it waits: a signal ends the process there."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            handle(number, handler)


@contextmanager
def kept_from_children(number: int) -> Iterator[None]:
    """A block whose new processes and threads never get a signal: Ctrl-C goes to all processes of a terminal."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def name(number: int) -> str:
    """A signal as people call it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def notice(text: str) -> None:
    """`errors.notice` for a handler, which may have interrupted a print: the stream refuses a second one then."""
    try:
        descriptor = sys.stderr.fileno()
    except (OSError, AttributeError):  # a stream in memory, as in a notebook
        errors.notice(text)
        return
    _write(descriptor, text)


def _write(descriptor: int, text: str) -> None:
    if not errors.silent:
        with suppress(OSError):  # nobody reads it any more
            os.write(descriptor, f"note: {text}\n".encode())


def _in_child() -> None:
    """A forked process leaves Ctrl-C to its parent, and ends when it is told to."""
    _unfinished.clear()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --- standard output whose reader is gone ----------------------------------------------------------


class _Output(io.FileIO):
    def write(self, content: Any) -> int:
        try:
            return super().write(content) or 0
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if error.errno == errno.EPIPE and callable(_output_closed):
                _output_closed(signal.SIGPIPE, None)
        return len(content)


def _patient(stream: TextIO) -> TextIO:
    """A standard stream that outlives its reader; anything else is left as it is."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    raw = _Output(stream.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        newline="\n",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
