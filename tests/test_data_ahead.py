"""Items made ahead by a thread: in order, with the errors and the signals of those who wait."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from utils import signals
from utils.data.ahead import ahead


@pytest.mark.parametrize("count", [1, 3])
def test_items_come_in_order_and_few_are_made_before(count: int) -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            yield number

    for number in ahead(items(), count):
        assert len(made) <= number + count + 2
    assert number == 49 == made[-1]
    assert list(ahead([], count)) == []


def test_the_thread_leaves_sigterm_to_the_one_that_asks() -> None:
    assert signal.SIGTERM in next(ahead(iter(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, []), None), 1))
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


class Panic(BaseException):
    """What a library in Rust raises."""


@pytest.mark.parametrize("error", [OSError("gone"), Panic("stack"), SystemExit(3)])
def test_what_an_item_raises_is_raised_where_it_is_asked_for(error: BaseException) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise error

    taken = ahead(items(), 2)
    assert next(taken) == 1
    with pytest.raises(type(error)) as caught:
        next(taken)
    assert caught.value is error


def test_a_signal_is_handled_while_the_next_item_is_made() -> None:
    """The item comes only once the handler has run, as `signals.handle` registers it."""
    handled = threading.Event()

    def items() -> Iterator[int]:
        assert handled.wait(60)
        yield 1

    before = signals.handle(signal.SIGALRM, lambda *_: handled.set())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        assert list(ahead(items(), 1)) == [1]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_closed_iterator_ends_its_thread() -> None:
    before = set(threading.enumerate())
    taken = ahead(iter(int, 1), 2)
    assert [next(taken), next(taken)] == [0, 0]
    [thread] = set(threading.enumerate()) - before
    taken.close()  # type: ignore[attr-defined]
    thread.join(60)
    assert not thread.is_alive()
