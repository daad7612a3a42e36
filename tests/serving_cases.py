"""Real servers for tests: flask_server.py in a process of its own, asked over sockets; nothing may be left behind."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 30.0  # after which something will never happen
START_SECONDS = 180.0
MARK = "SERVING_TEST_ID"  # by which all processes of a server are found
LOCAL = "127.0.0.1"


def until(condition: Callable[[], Any], seconds: float = SECONDS) -> bool:
    """Whether a condition comes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((LOCAL, 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


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

    def idle(self) -> bool:
        """Whether no answer is waited for or in the making."""
        found = self.metrics()
        return not any(
            value for name, value in found.items() if name.startswith(("num_requests_running", "num_requests_waiting"))
        )


@dataclass
class ServerProcess(Asked):
    """flask_server.py, started by `serving_process`.

    Attributes:
        page_port: of the page, if there is one.
        log: its standard output and error.
    """

    page_port: int
    process: subprocess.Popen[bytes]
    log: Path
    mark: str = field(repr=False)

    def text(self) -> str:
        """What it has written so far."""
        return self.log.read_text("utf-8", "replace")

    def records(self) -> list[dict[str, Any]]:
        """The log lines of requests so far."""
        lines = [json.loads(line) for line in self.text().splitlines() if line.startswith('{"time"')]
        return [line for line in lines if "status" in line]

    def pids(self) -> list[int]:
        """All of its processes that live."""
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if wanted in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
                except OSError:
                    continue
        return found

    def model_pid(self) -> int:
        """The process of the model."""
        for pid in self.pids():
            if b"utils.serving.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        raise AssertionError("there is no process of a model")

    def memory(self) -> int:
        """Bytes of memory that all of its processes have of their own."""
        total = 0
        for pid in self.pids():
            try:
                pages = Path(f"/proc/{pid}/statm").read_text().split()
            except OSError:
                continue
            total += (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")
        return total

    def wait_ready(self) -> None:
        """Waits until it answers.

        Raises:
            AssertionError: it has ended, or takes too long.
        """
        ready = until(lambda: self.process.poll() is not None or self.health() == "ok", START_SECONDS)
        assert ready and self.process.poll() is None, f"the server did not start:\n{self.text()}"

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal and waits for the end; the exit code. No process may be left."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(SECONDS + 30)
            left = [] if until(lambda: not self.pids(), 5.0) else self.pids()
        finally:
            for pid in self.pids():
                os.kill(pid, signal.SIGKILL)
            self.process.wait()
        assert not left, f"processes are left: {left}\n{self.text()}"
        return code


@contextmanager
def serving_process(
    folder: Path,
    model: str | Path,
    *options: object,
    launcher: Sequence[str] = (),
    wait: bool = True,
    env: dict[str, str] | None = None,
) -> Iterator[ServerProcess]:
    """A real server on free ports; it is stopped in the end, with exit code 0 if nobody has stopped it before.

    Args:
        folder: for its log, and for its temporary files, of which none may be left.
        model: folder, or name of the embedded model.
        options: more arguments. Without "--no_ui" "false" there is no page.
        launcher: words between python and the script.
        wait: until it is ready.
    """
    port, page_port = free_ports(2)
    mark, temporary = uuid.uuid4().hex, folder / "tmp"
    temporary.mkdir(parents=True)
    fixed = ["--model_name_or_path", model, "--flask_port", port, "--port", page_port, "--no_ui", "true"]
    command = [
        sys.executable,
        *launcher,
        str(ROOT / "flask_server.py"),
        *map(str, [*fixed, "--device", "cpu", *options]),
    ]
    log = folder / "server.log"
    environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "2", MARK: mark, **(env or {})}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    server = ServerProcess(port, page_port, process, log, mark)
    try:
        if wait:
            server.wait_ready()
        yield server
    except BaseException:
        server.stop(signal.SIGKILL)
        raise
    stopped_before = process.poll() is not None
    code = server.stop()
    assert stopped_before or code == 0, f"exit code {code}\n{server.text()}"
    assert not list(temporary.iterdir()), "temporary files are left"


def request_bytes(path: str, body: Any, headers: Sequence[str] = ()) -> bytes:
    """A POST as it goes over the wire."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content
