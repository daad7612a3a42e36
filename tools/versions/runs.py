"""Two versions side by side: their folders, and their scripts at work within the processors of this machine."""

from __future__ import annotations

import io
import itertools
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 300  # until a run counts as hanging
LAST_WORDS = 6  # lines shown of a run that failed


class RunError(Exception):
    """A run failed; the message is what to show of it."""


class Skipped(Exception):
    """There is nothing to compare: both versions refuse the arguments with the same words, or nothing was made."""


def checkout(repository: Path, revision: str, folder: Path) -> None:
    """Writes the files of a revision into a new folder.

    Raises:
        RunError: there is no such revision.
    """
    archive = subprocess.run(["git", "-C", str(repository), "archive", revision], capture_output=True)
    if archive.returncode:
        raise RunError(archive.stderr.decode().strip())
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")


class Slots:
    """So many processes at a time; who asks first is served first, also where it needs several."""

    def __init__(self, count: int) -> None:
        self.count, self.turn, self.free = count, threading.Lock(), threading.Semaphore(count)

    @contextmanager
    def taken(self, processes: int) -> Iterator[None]:
        processes = min(processes, self.count)
        with self.turn:
            for _ in range(processes):
                self.free.acquire()
        try:
            yield
        finally:
            self.free.release(processes)


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `said`: what it printed, all ranks in turn."""

    code: int
    said: str
    command: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("error:")]

    def check(self) -> None:
        """Raises `RunError` if the run failed."""
        if self.code:
            last = "\n".join(self.said.strip().splitlines()[-LAST_WORDS:])
            raise RunError(f"{self.command}\nexit code {self.code}\n{last}")


@dataclass
class Version:
    """One version at work; a context manager that ends its processes.

    Attributes:
        name: "before" or "after".
        root: the folder of its files.
        home: where its runs write.
    """

    name: str
    root: Path
    home: Path
    slots: Slots
    waiting: dict[int, Future[int]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    writing: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Version:
        self.home.mkdir(parents=True)
        with ExitStack() as stack:
            said = stack.enter_context(open(self.home / "worker.log", "w", encoding="utf-8"))
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("worker.py"))],
                cwd=self.root,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PADDLE_DISTRI_BACKEND": "gloo"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            self.process.wait()
            last = (self.home / "worker.log").read_text("utf-8").strip().splitlines()[-LAST_WORDS:]
            raise RunError("\n".join([f"the version {self.name} does not start:", *last]))
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            ended = json.loads(line)
            self.waiting.pop(ended["number"]).set_result(ended["code"])

    def run(self, script: str, words: Sequence[object], *, processes: int = 1) -> Outcome:
        """Runs a script in as many processes, connected as Paddle's launcher connects them."""
        ports = free_ports(1 + processes) if processes > 1 else []
        with self.slots.taken(processes):
            logs, ends = [], []
            for rank in range(processes):
                number = next(self.numbers)
                logs.append(self.home / f"{number}.log")
                job: dict[str, Any] = {"number": number, "script": script, "words": [*map(str, words)]}
                job |= {"environment": self.environment(rank, ports), "log": str(logs[-1]), "seconds": SECONDS}
                ends.append(self._start(number, job))
            codes = [end.result() for end in ends]
        said = "\n".join(log.read_text("utf-8", "replace") for log in logs)
        code = next((code for code in codes if code), 0)
        return Outcome(code, said, " ".join([self.name, script, *map(str, words)]))

    def _start(self, number: int, job: dict[str, Any]) -> Future[int]:
        end = self.waiting[number] = Future[int]()
        assert self.process.stdin is not None
        with self.writing:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        return end

    def environment(self, rank: int, ports: Sequence[int]) -> dict[str, str]:
        """What a process finds in its environment; `ports`: the one where all meet, then one for each of several."""
        chosen = {"PADDLE_LLM_CACHE": str(self.home / "cache")}
        if not ports:
            return chosen
        meeting, *ends = [f"127.0.0.1:{port}" for port in ports]
        count = str(len(ends))
        names = ("PADDLE_GLOBAL_RANK", "PADDLE_LOCAL_RANK", "PADDLE_TRAINER_ID", "PADDLE_RANK_IN_NODE")
        counts = ("PADDLE_GLOBAL_SIZE", "PADDLE_LOCAL_SIZE", "PADDLE_TRAINERS_NUM")
        return {
            **chosen,
            **dict.fromkeys(names, str(rank)),
            **dict.fromkeys(counts, count),
            "PADDLE_NNODES": "1",
            "PADDLE_MASTER": meeting,
            "PADDLE_CURRENT_ENDPOINT": ends[rank],
            "PADDLE_TRAINER_ENDPOINTS": ",".join(ends),
        }


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
