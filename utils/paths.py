"""What a path names, for those who write there: argument checks before a run, and the writers themselves."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

PARTIAL = ".partial"  # ending of the file in which answers are kept until all of them are there
READ_ONLY = "is read-only; chmod u+w allows to replace it"
NO_FILE = "is read more than once, and a pipe or device cannot be; put it into a file first"
_MOST_LINKS = 40  # that the kernel follows


def is_stream(path: Path | str) -> bool:
    """Whether a path names what can only be written into: a device, a pipe, or an open file such as /dev/stdout."""
    if descriptor(path) is not None:
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def is_read_only(path: Path | str) -> bool:
    """Whether somebody has taken the right to write from everybody; root, whom the system lets write, respects it."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_IMODE(mode) & 0o222


def read_only_in(paths: Iterable[Path]) -> list[Path]:
    """What `is_read_only` among `paths` and in those that are folders; a link in them is no more than a name."""
    found = []
    for path in paths:
        inside = sorted(path.rglob("*")) if path.is_dir() else []
        found += [one for one in (path, *inside) if not one.is_symlink() and is_read_only(one)]
    return found


def descriptor(path: Path | str) -> str | None:
    """The name in /proc/PID/fd that a path leads to; None of any other path."""
    place = os.path.abspath(path)
    for _ in range(_MOST_LINKS):
        folder = os.path.realpath(os.path.dirname(place))
        place = os.path.join(folder, os.path.basename(place))
        if re.fullmatch(r"/proc/\d+(/task/\d+)?/fd", folder):
            return place
        if not os.path.islink(place):
            return None
        place = os.path.join(folder, os.readlink(place))
    return None
