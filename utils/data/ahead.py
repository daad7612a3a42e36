"""Work done ahead of its use by a thread, without losing an error or a signal on the way."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

from utils import signals

Item = TypeVar("Item")
# Waits are this short, in seconds: Python runs the handler of a signal only between them.
PAUSE = 0.2


def ahead(items: Iterable[Item], count: int) -> Iterator[Item]:
    """The items, of which a thread makes up to `count` before they are asked for.

    Whatever making one raises is raised here, in its place. Closing the iterator ends the thread.
    """
    made: queue.Queue[tuple[list[Item], BaseException | None]] = queue.Queue(count)
    closed = threading.Event()

    def put(item: list[Item], error: BaseException | None = None) -> None:
        while not closed.is_set():
            try:
                return made.put((item, error), timeout=PAUSE)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put([item])
                if closed.is_set():
                    return
            put([])
        except BaseException as error:
            put([], error)

    with signals.kept_from_children(signal.SIGTERM):  # it may outlive this, until Paddle loads: see signals.kept
        threading.Thread(target=work, name="reading ahead", daemon=True).start()
    try:
        while True:
            try:
                item, error = made.get(timeout=PAUSE)
            except queue.Empty:
                continue
            if error is not None:
                raise error
            if not item:
                return
            yield item[0]
    finally:
        closed.set()
