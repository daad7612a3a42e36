"""What is decided before Paddle loads, and how its threads are scheduled."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from utils import runtime


@pytest.mark.parametrize(
    ("vendor", "flags", "answering", "path"),
    [
        ("AuthenticAMD", "avx2", True, "5"),
        ("AuthenticAMD", "avx2 avx512f", True, "7"),
        ("AuthenticAMD", "avx2 avx512f", False, "5"),
        ("GenuineIntel", "avx2 avx512f", True, "None"),
    ],
)
def test_the_math_library_path(vendor: str, flags: str, answering: bool, path: str, root: Path) -> None:
    code = (
        "import os\nfrom utils import runtime\n"
        f"runtime.cpu_flags = lambda: ({vendor!r}, frozenset({flags.split()}))\n"
        f"runtime.prepare(answering={answering})\nprint(os.environ.get('MKL_DEBUG_CPU_TYPE'))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MKL_DEBUG_CPU_TYPE"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == path


def test_only_new_threads_wait() -> None:
    policies: dict[str, int] = {}
    done = threading.Event()

    def start(name: str) -> threading.Thread:
        thread = threading.Thread(target=done.wait, name=name)
        thread.start()
        return thread

    before = start("before")
    with runtime.new_threads_wait():
        new = start("new")
    for thread in (before, new):
        policies[thread.name] = os.sched_getscheduler(thread.native_id or 0)
    done.set()
    before.join()
    new.join()
    assert policies == {"before": os.SCHED_OTHER, "new": os.SCHED_BATCH}


def test_a_notice_may_interrupt_a_print(root: Path) -> None:
    """A handler that prints while the stream is being written to would end with an error of the stream."""
    code = """
import io, signal, sys
from utils import signals

class Raw(io.FileIO):
    def write(self, text):
        signal.raise_signal(signal.SIGTERM)
        return super().write(text)

sys.stderr = io.TextIOWrapper(io.BufferedWriter(Raw(2, "wb", closefd=False)), line_buffering=True)
signals.handle(signal.SIGTERM, lambda number, frame: signals.notice("stopping"))
print("a step", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "note: stopping\na step\n")
