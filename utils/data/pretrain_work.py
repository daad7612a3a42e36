"""What the data tools share: work in several processes with results in order, and lines of progress."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from utils import signals
from utils.errors import UserError, raise_if

Task = TypeVar("Task")
Found = TypeVar("Found")
AHEAD = 4  # tasks per process that are handed out before the oldest result is taken


def in_order(
    work: Callable[[Task], Found],
    tasks: Iterable[Task],
    workers: int,
    prepare: Callable[..., None],
    arguments: tuple[Any, ...] = (),
) -> Iterator[Found]:
    """The results of `work` in the order of its tasks, few of them in memory at a time.

    Args:
        work: a function of a module; with one worker it runs here.
        prepare: is called with `arguments` once in every process, before any work.

    Raises:
        UserError: what `work` raised, or that the system ended a process.
    """
    if workers == 1:
        prepare(*arguments)
        yield from map(work, tasks)
        return
    # a process that a signal ends leaves semaphores: they are removed, but not without a warning
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    pool = ProcessPoolExecutor(workers, get_context("spawn"), prepare, arguments)
    waiting: deque[Future[Found]] = deque()
    try:
        for task in tasks:
            with signals.kept_from_children(signal.SIGINT):
                waiting.append(pool.submit(work, task))
            if len(waiting) >= AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        reason = "a worker process was ended by the system, perhaps for want of memory; use fewer --workers"
        raise UserError(reason) from None
    finally:
        pool.shutdown(cancel_futures=True)


class Progress:
    """Says on standard error how far a tool is, every so many documents.

    Args:
        total: bytes of the whole input.
        interval: documents between two lines.
    """

    def __init__(self, total: int, interval: int) -> None:
        self.total, self.interval = max(total, 1), interval
        self.documents = self.bytes = self._said = 0
        self._started = time.monotonic()

    def add(self, documents: int, size: int) -> None:
        """Counts what was done since the last call; `size` in bytes of the input."""
        self.documents += documents
        self.bytes += size
        if self.documents - self._said < self.interval:
            return
        self._said = self.documents
        seconds = max(time.monotonic() - self._started, 1e-9)
        minutes, rest = divmod(round(seconds * max(self.total - self.bytes, 0) / max(self.bytes, 1)), 60)
        print(
            f"{self.documents:,} documents  {self.bytes / self.total:.0%}  "
            f"{self.documents / seconds:,.0f} documents/s  {self.bytes / seconds / 1e6:.2f} MB/s  "
            f"ETA {minutes:02d}:{rest:02d}",
            file=sys.stderr,
            flush=True,
        )


def input_files(path: str, outputs: Callable[[Path], Iterable[Path]], endings: tuple[str, ...] = ()) -> list[Path]:
    """The file of this name, or all files below the folder, sorted; hidden ones are left out.

    Args:
        outputs: what the tool will write for a file. In a folder these are its own of an earlier run: left out.
        endings: of a folder, take only files that end like this; all without any.

    Raises:
        UserError: there are none, or one of them would be written over.
    """
    root = Path(path)
    found = [root] if root.is_file() else _in_folder(root, outputs, endings)
    if not found:
        raise UserError(f"input_path {path}: holds no file{' that ends in ' + ' or '.join(endings) if endings else ''}")
    written = {_identity(output): output for file in found for output in outputs(file) if output.exists()}
    faults = [
        f"input_path {file}: would be written over by the output {written[_identity(file)]}; name another output"
        for file in found
        if _identity(file) in written
    ]
    raise_if(faults)
    return found


def _in_folder(root: Path, outputs: Callable[[Path], Iterable[Path]], endings: tuple[str, ...]) -> list[Path]:
    found = sorted(
        file
        for file in root.rglob("*")
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
        and (not endings or file.name.endswith(endings))
    )
    resolved = cache(Path.resolve)
    own = {(resolved(output.parent), output.name) for file in found for output in outputs(file)}
    return [file for file in found if (resolved(file.parent), file.name) not in own]


def _identity(file: Path) -> tuple[int, int]:
    """The same for all names and links of a file."""
    status = file.stat()
    return status.st_dev, status.st_ino
