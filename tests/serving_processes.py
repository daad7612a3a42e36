"""Servers as their users start them: flask_server.py in a process of its own, asked over sockets; nothing may stay."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 30.0  # after which something will never happen
READY_SECONDS = 180.0
LOCAL = "127.0.0.1"


def until(condition: Callable[[], Any], seconds: float = SECONDS) -> None:
    """Waits until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not become so"
        time.sleep(0.02)


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as one:
        one.bind((LOCAL, 0))
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


def memory(number: int) -> int:
    """Bytes of memory that a process has of its own."""
    pages = Path(f"/proc/{number}/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def request_bytes(path: str, body: Any, headers: Sequence[str] = ()) -> bytes:
    """A POST as it goes over the wire."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content


@dataclass
class Asked:
    """A server that can be asked."""

    port: int

    @property
    def url(self) -> str:
        return f"http://{LOCAL}:{self.port}"

    def ask(
        self, method: str, path: str, body: bytes | Any = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers with small letters, content).

        Args:
            body: bytes as they are, or what becomes JSON.
            headers: with _ for -.
        """
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            sent.setdefault("Content-Type", "application/json")
        connection = http.client.HTTPConnection(LOCAL, self.port, timeout=SECONDS)
        try:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """(status, content as JSON)."""
        status, _, content = self.ask(method, path, body, **headers)
        return status, json.loads(content)

    def chat(self, **fields: Any) -> tuple[int, Any]:
        """(status, content) of POST /api/chat."""
        return self.json("POST", "/api/chat", {"context": "say", **fields})

    def open(self, path: str, body: Any, timeout: float = 2 * SECONDS) -> Any:
        """The response to a POST, whatever its status, of which the body is still to be read."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            return urllib.request.urlopen(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            return error

    def raw(self, content: bytes) -> socket.socket:
        """A connection on which `content` has been sent."""
        connection = socket.create_connection((LOCAL, self.port), timeout=SECONDS)
        connection.sendall(content)
        return connection

    def health(self) -> str:
        """What /health says; "" if nobody answers."""
        try:
            return str(self.json("GET", "/health")[1]["status"])
        except (OSError, http.client.HTTPException):
            return ""

    def metrics(self) -> dict[str, float]:
        """Each line of /metrics, without the prefix: its name with labels, and the value."""
        text = self.ask("GET", "/metrics")[2].decode()
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name.removeprefix("paddle_llm:"): float(value) for name, _, value in lines}

    def answering(self) -> float:
        """How many answers are in the making."""
        return sum(value for name, value in self.metrics().items() if name.startswith("num_requests_running"))

    def idle(self) -> bool:
        """Whether no answer is waited for or in the making."""
        waiting = (value for name, value in self.metrics().items() if name.startswith("num_requests_waiting"))
        return not self.answering() and not any(waiting)


@dataclass
class ServerProcess(Asked):
    """flask_server.py, started by `server`.

    Attributes:
        log: its standard output and error.
        mark: NAME=value in the environment of all its processes.
    """

    process: subprocess.Popen[bytes]
    log: Path
    mark: str

    @property
    def said(self) -> str:
        """All that it has printed."""
        return self.log.read_text("utf-8", "replace")

    def records(self) -> list[dict[str, Any]]:
        """The log lines of requests so far."""
        lines = [json.loads(line) for line in self.said.splitlines() if line.startswith('{"time"')]
        return [line for line in lines if "status" in line]

    def workers(self) -> list[int]:
        """The numbers of its processes of models; one, but while it is started again."""
        return [number for number, line in processes(self.mark).items() if "utils.serving.worker" in line]

    def worker(self) -> int:
        """The number of the process of the model."""
        (found,) = self.workers()
        return found

    def ready(self) -> None:
        """Waits until the model is there."""

        def there() -> bool:
            assert self.process.poll() is None, self.said
            return self.health() == "ok"

        until(there, READY_SECONDS)

    def end(self, number: int = signal.SIGTERM, seconds: float = 2 * SECONDS) -> int:
        """Sends a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def gone(self) -> None:
        """Waits until none of its processes is left."""
        try:
            until(lambda: not processes(self.mark))
        finally:
            for number in processes(self.mark):
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)


@contextmanager
def server(
    folder: Path,
    *options: object,
    launcher: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    wait: bool = True,
) -> Iterator[ServerProcess]:
    """flask_server.py with these options, until the block ends, with exit code 0 if it has not ended before.

    It has no page unless the options give the page's port. Neither processes nor temporary files may be left.

    Args:
        folder: for its log.
        launcher: words between python and the script; the exit code is the launcher's then, and says nothing.
        environment: more variables.
        wait: until the model is there.
    """
    port = free_port()
    mark, log, temporary = f"SERVER_OF_TEST={os.getpid()}-{port}", folder / f"server-{port}.log", folder / f"tmp-{port}"
    temporary.mkdir(parents=True)
    words = ["--device", "cpu", "--flask_port", port, *options]
    if "--port" not in options:
        words.append("--no_ui")
    command = [sys.executable, "-u", *launcher, str(ROOT / "flask_server.py"), *map(str, words)]
    own = {"TMPDIR": str(temporary), **dict([mark.split("=")])}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **own, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    running = ServerProcess(port, process, log, mark)
    try:
        if wait:
            running.ready()
        yield running
        if process.poll() is None:
            code = running.end()
            assert code == 0 or launcher, f"exit code {code}\n{running.said}"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        running.gone()
    assert process.returncode != 0 or not list(temporary.iterdir()), "temporary files are left"
