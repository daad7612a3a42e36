"""The one way in which a user's mistake reaches the user: short, complete, exit code 2."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol, TypeGuard

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
FIRST_SPEAKS_SECONDS = 2.0


class Ending(Protocol):
    """How a process of several ends: each method ends it, the last one if another process has failed."""

    def failed(self, faults: Sequence[str]) -> None: ...

    def crashed(self, error: BaseException) -> None: ...

    def leave(self, code: int) -> None: ...

    def heed(self) -> None: ...


ending: Ending | None = None  # set once several processes are connected
silent = False  # whether another process of this run speaks to the user


class UserError(Exception):
    """One or more faults that the user can mend.

    Each fault is one sentence or two: where (file, line, key), what was expected, the next step.
    All faults of one check travel together, so that one run shows every one of them.
    """

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults))

    def __reduce__(self) -> tuple[type[UserError], tuple[tuple[str, ...]]]:
        """On its way from a worker process each fault stays one."""
        return type(self), (self.faults,)


def raise_if(faults: Sequence[str]) -> None:
    """Raises `UserError` with all `faults`, if there are any."""
    if faults:
        raise UserError(faults)


def notice(text: str) -> None:
    """Says one useful thing to the user on standard error (standard output is for results)."""
    if not silent:
        print(f"note: {text}", file=sys.stderr, flush=True)


def show(faults: Sequence[str]) -> None:
    """Prints each fault on an `error:` line of its own on standard error."""
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    sys.stderr.flush()


def reason(error: OSError) -> str:
    """What the system says, with the file if it names one: a full disk, a folder that is gone, no permission."""
    said = error.strerror or str(error)
    return said if error.filename is None else f"{error.filename}: {said}"


def run_script(main: Callable[[], None]) -> NoReturn:
    """Runs a script's `main` and turns what it raises into an exit code.

    Exit codes: 0 success, 2 a `UserError` or an error of the file system (each fault on its own `error:` line on
    standard error), 130 interrupted by Ctrl-C, 141 nobody reads the output. Anything else is a bug and keeps its
    traceback. Of several processes the first says what all of them have found.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names and answers may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _fail(error.faults)
    except KeyboardInterrupt:
        notice("ended by Ctrl-C")
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone, as in `--help | head`
        _drop_output()
        sys.exit(EXIT_BROKEN_PIPE)
    except SystemExit as error:
        if ending is not None:
            ending.leave(error.code if isinstance(error.code, int) else EXIT_USER_ERROR)
        raise
    except Exception as error:
        if _is_of_files(error):
            _fail([reason(error)])
        if ending is not None:
            ending.crashed(error)
        raise
    if ending is not None:
        ending.leave(0)
    sys.exit(0)


def _is_of_files(error: Exception) -> TypeGuard[OSError]:
    """Whether the file system has refused something; Paddle makes an `OSError`, without a number, of any other."""
    return (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, (ConnectionError, TimeoutError))
    )


def _drop_output() -> None:
    """From here on nothing is written to standard output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(faults: Sequence[str]) -> NoReturn:
    """Ends the process with faults that the user can mend."""
    try:
        sys.stdout.flush()
    except OSError:  # it is a file on a full disk, and Python would complain once more
        _drop_output()
    if ending is not None:
        ending.failed(faults)
    if int(os.environ.get("PADDLE_RANK_IN_NODE") or 0) == 0:
        show(faults)
    else:  # the first process of this machine finds the same, and the launcher ends it when we are gone
        time.sleep(FIRST_SPEAKS_SECONDS)
    sys.exit(EXIT_USER_ERROR)
