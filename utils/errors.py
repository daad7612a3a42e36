"""The one way in which a user's mistake reaches the user: short, complete, exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class UserError(Exception):
    """One or more faults that the user can mend.

    Each fault is one sentence or two: where (file, line, key), what was expected, the next step.
    All faults of one check travel together, so that one run shows every one of them.
    """

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults))


def raise_if(faults: Sequence[str]) -> None:
    """Raises `UserError` with all `faults`, if there are any."""
    if faults:
        raise UserError(faults)


def notice(text: str) -> None:
    """Says one useful thing to the user on standard error (standard output is for results)."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def run_script(main: Callable[[], None]) -> NoReturn:
    """Runs a script's `main` and turns what it raises into an exit code.

    Exit codes: 0 success, 2 a `UserError` (each fault on its own `error:` line on standard error),
    130 interrupted by Ctrl-C, 141 nobody reads the output. Anything else is a bug and keeps its traceback.
    """
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone, as in `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    sys.exit(0)
