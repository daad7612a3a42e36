"""Servers as their users start them: flask_server.py in a process of its own, on free ports."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_runs import ROOT

READY_SECONDS = 120.0


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def processes(variable: str) -> dict[int, str]:
    """Command lines by number of all processes whose environment has `variable` (NAME=value)."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended, or is another user's
            continue
    return {number: line for number, line in found.items() if line}  # without those that nobody has waited for


def until(condition: Any, seconds: float = 30.0) -> None:
    """Waits until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not become so"
        time.sleep(0.02)


@dataclass
class Running:
    """A server.

    Attributes:
        mark: NAME=value in the environment of all its processes.
    """

    process: subprocess.Popen[str]
    port: int
    log: Path
    mark: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def said(self) -> str:
        """All that it has printed."""
        return self.log.read_text("utf-8", errors="replace")

    def open(self, path: str, body: Any = None, timeout: float = 60) -> Any:
        """The response, whatever its status."""
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, {"Content-Type": "application/json"})
        try:
            return urllib.request.urlopen(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            return error

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        """(status, body as JSON)."""
        with self.open(path, body) as response:
            return response.status, json.loads(response.read())

    @property
    def status(self) -> str:
        """What /health says; "" while nobody answers."""
        try:
            found: str = self.ask("/health")[1]["status"]
            return found
        except OSError:
            return ""

    def ready(self) -> None:
        """Waits until the model is there."""

        def there() -> bool:
            assert self.process.poll() is None, self.said
            return self.status == "ok"

        until(there, READY_SECONDS)

    def worker(self) -> int:
        """The number of the process of the model."""
        (found,) = [n for n, line in processes(self.mark).items() if "utils.serving.worker" in line]
        return found

    def end(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        """Sends a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def gone(self) -> None:
        """Waits until none of its processes is left."""
        until(lambda: not processes(self.mark), 30)


@contextmanager
def server(
    folder: Path,
    *options: object,
    launcher: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    wait: bool = True,
) -> Iterator[Running]:
    """flask_server.py with these options, until the block ends; without a page unless they give its port.

    Args:
        folder: for its log.
        launcher: words between python and the script.
        environment: more variables.
        wait: until the model is there.
    """
    port = free_port()
    mark = f"SERVER_OF_TEST={os.getpid()}-{port}"
    log = folder / f"server-{port}.log"
    words = ["--device", "cpu", "--flask_port", port, *options]
    if "--port" not in options:
        words.append("--no_ui")
    command = [sys.executable, "-u", *launcher, str(ROOT / "flask_server.py"), *map(str, words)]
    name, value = mark.split("=")
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, name: value, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    running = Running(process, port, log, mark)
    try:
        if wait:
            running.ready()
        yield running
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        running.gone()
