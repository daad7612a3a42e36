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
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from utils import signals
from utils.errors import UserError

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


def input_files(path: str, endings: tuple[str, ...] = ()) -> list[Path]:
    """The file of this name, or all files below the folder, sorted; hidden ones are left out.

    Args:
        endings: of a folder, take only files that end like this; all without any.

    Raises:
        UserError: there are none.
    """
    root = Path(path)
    if root.is_file():
        return [root]
    found = sorted(
        file
        for file in root.rglob("*")
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
        and (not endings or file.name.endswith(endings))
    )
    if not found:
        raise UserError(f"input_path {path}: holds no file{' that ends in ' + ' or '.join(endings) if endings else ''}")
    return found
