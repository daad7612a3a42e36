"""Hostile and clumsy clients by the thousand: every answer is right or a clear 4xx, and nothing is left of them."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving_processes import SECONDS, ServerProcess, memory, processes, request_bytes, server, until
from tiny_models import write_tiny_llama

pytestmark = pytest.mark.slow

REQUESTS = 2000
CLIENTS = 12
WARM_UP = 400  # requests until memory has reached its size
GROWTH = 0.02  # of memory, that is no leak
SLACK = 16 * 2**20  # bytes; what allocators and the stacks of threads still take
CHATS = ("/api/chat", "/v1/chat/completions")


def body_of(path: str, text: str, **fields: Any) -> dict[str, Any]:
    """A short greedy answer to a text."""
    if path == "/api/chat":
        return {"context": text, "max_length": 100, "src_length": 80, **fields}
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0, **fields}


def receive(connection: socket.socket, *, slowly: bool = False) -> bytes:
    """All that comes until the other side closes."""
    found = bytearray()
    while part := connection.recv(7 if slowly else 65536):
        found += part
        if slowly:
            time.sleep(0.0005)
    return bytes(found)


def status_of(response: bytes) -> int:
    """Of a response with its head."""
    return int(response.split(b" ", 2)[1])


def told(path: str, content: bytes) -> str:
    """What an error says; it must have the form of its API."""
    found = json.loads(content)
    message = found["error_msg"] if path == "/api/chat" else found["error"]["message"]
    assert isinstance(message, str) and 0 < len(message) < 1000
    for leak in ("Traceback", "/tmp/", "/home/", ".py", "site-packages"):
        assert leak not in message
    return message


class Clients:
    """One method for each kind of client; each asserts that it was treated right."""

    def __init__(self, server: ServerProcess, expected: dict[str, bytes]) -> None:
        self.server, self.expected = server, expected

    def good(self, chosen: random.Random) -> None:
        """Asks, and gets the answer that it always gets."""
        path = chosen.choice(CHATS)
        status, _, content = self.server.ask("POST", path, body_of(path, "say red"))
        assert status == 200 and self.text(path, content) == self.expected[path]

    def text(self, path: str, content: bytes) -> bytes:
        found = json.loads(content)
        if path == "/api/chat":
            return str(found["result"]["response"]["utterance"]).encode()
        return str(found["choices"][0]["message"]["content"]).encode()

    def unknown_fields(self, chosen: random.Random) -> None:
        path = chosen.choice(CHATS)
        more = {f"field_{chosen.randrange(50)}": chosen.choice([None, 1, "x", {"a": []}])}
        status, _, content = self.server.ask("POST", path, body_of(path, "say red", **more))
        assert status == 200 and self.text(path, content) == self.expected[path]

    def leaves(self, chosen: random.Random) -> None:
        """Goes at any time, with a reset or in order, from a stream or a plain answer, also of several answers."""
        path = chosen.choice(CHATS)
        body = body_of(path, "say", stream=chosen.random() < 0.5, max_length=500, max_tokens=400)
        if path != "/api/chat":
            body["n"] = chosen.choice([1, 3])
        connection = self.server.raw(request_bytes(path, body))
        if chosen.random() < 0.5:
            time.sleep(chosen.random() * 0.2)
        if chosen.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    def breaks_off(self, chosen: random.Random) -> None:
        """Goes in the middle of its request."""
        content = request_bytes("/api/chat", body_of("/api/chat", "say " * 50))
        self.server.raw(content[: chosen.randrange(len(content))]).close()

    def half_closes(self, chosen: random.Random) -> None:
        """Ends its own side; it may get its answer or not, but holds no place."""
        with self.server.raw(request_bytes("/api/chat", body_of("/api/chat", "say"))) as connection:
            connection.shutdown(socket.SHUT_WR)
            receive(connection)

    def reads_slowly(self, chosen: random.Random) -> None:
        body = body_of("/api/chat", "say red", stream=True)
        with self.server.raw(request_bytes("/api/chat", body, ["Connection: close"])) as connection:
            assert status_of(receive(connection, slowly=True)) == 200

    def writes_slowly(self, chosen: random.Random) -> None:
        content = request_bytes("/api/chat", body_of("/api/chat", "say red"), ["Connection: close"])
        with self.server.raw(b"") as connection:
            step = len(content) // 10
            for place in range(0, len(content), step):
                connection.sendall(content[place : place + step])
                time.sleep(0.01)
            response = receive(connection)
        assert status_of(response) == 200
        assert self.text("/api/chat", response.partition(b"\r\n\r\n")[2]) == self.expected["/api/chat"]

    def sends_nonsense(self, chosen: random.Random) -> None:
        """A body that is no JSON, or not what a body is."""
        path = chosen.choice(CHATS)
        good = json.dumps(body_of(path, "say")).encode()
        body = chosen.choice(
            [
                good[: chosen.randrange(len(good))],
                chosen.randbytes(chosen.randrange(1, 500)),
                good.replace(b"say", b"\xff\xfe"),
                good.replace(b"say", b"\\udc00"),
                b"[" * chosen.randrange(100, 200_000),
                b'{"a":' * chosen.randrange(100, 200_000),
                good[:-1] + b', "temperature": NaN}',
                good[:-1] + b', "temperature": 1e999}',
                good[:-1] + b', "seed": ' + b"9" * 10_000 + b"}",
                good[:-1] + b', "stream": false, "stream": true}',
                b"null",
                b"[1, 2]",
                b'"text"',
            ]
        )
        status, _, content = self.server.ask("POST", path, body)
        assert status == 400
        told(path, content)

    def sends_wrong_types(self, chosen: random.Random) -> None:
        path = chosen.choice(CHATS)
        name = chosen.choice(["context", "history", "top_k", "top_p", "temperature", "max_length", "stream"])
        if path != "/api/chat":
            name = chosen.choice(["messages", "n", "top_p", "temperature", "max_tokens", "stream", "stop", "tools"])
        wrong = chosen.choice([{"a": 1}, [[1]], "\ud83c\udf0a", -5, 10**50, [None], {"role": []}])
        status, _, content = self.server.ask("POST", path, body_of(path, "say") | {name: wrong})
        if status != 200:  # a few of them are right
            assert status == 400
            told(path, content)

    def sends_too_much(self, chosen: random.Random) -> None:
        path = chosen.choice(CHATS)
        status, _, content = self.server.ask("POST", path, b"x" * (5 * 2**20))
        assert status == 413
        told(path, content)

    def asks_elsewhere(self, chosen: random.Random) -> None:
        path = chosen.choice(["/v1/nothing", "/etc/passwd", "/../../etc/passwd", "/%00", "/v1/models/none", "/%C3%A9"])
        status, _, content = self.server.ask("GET", path)
        assert status == 404
        told(path, content)


KINDS: list[tuple[Callable[[Clients, random.Random], None], int]] = [
    (Clients.good, 25),
    (Clients.unknown_fields, 5),
    (Clients.leaves, 20),
    (Clients.breaks_off, 8),
    (Clients.half_closes, 4),
    (Clients.reads_slowly, 3),
    (Clients.writes_slowly, 3),
    (Clients.sends_nonsense, 15),
    (Clients.sends_wrong_types, 12),
    (Clients.sends_too_much, 2),
    (Clients.asks_elsewhere, 3),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """With short answers, few threads, and nothing kept of earlier prompts."""
    folder = tmp_path_factory.mktemp("soak")
    model = write_tiny_llama(folder / "model")
    options = ["--src_length", 100, "--max_length", 140, "--max_queue", 32, "--prompt_cache_gib", 0]
    names = ["--model_name_or_path", model, "--served_model_name", "tiny"]
    with server(folder, *names, *options) as running:
        yield running


def test_two_thousand_clients_of_all_kinds_leave_nothing_behind(served: ServerProcess) -> None:
    clients = Clients(served, {})
    for path in CHATS:
        status, _, content = served.ask("POST", path, body_of(path, "say red"))
        assert status == 200
        clients.expected[path] = clients.text(path, content)
    held = [served.raw(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-") for _ in range(20)]
    kinds, weights = zip(*KINDS, strict=True)

    def one(number: int) -> str:
        chosen = random.Random(number)
        kind = chosen.choices(kinds, weights)[0]
        kind(clients, chosen)
        return str(kind.__name__)

    sizes, done = [], set[str]()
    with ThreadPoolExecutor(CLIENTS) as pool:
        for numbers in (range(WARM_UP), range(WARM_UP, REQUESTS)):
            done.update(pool.map(one, numbers))
            until(served.idle)
            sizes.append(sum(map(memory, processes(served.mark))))
    assert len(done) == len(KINDS)
    assert sizes[1] <= sizes[0] * (1 + GROWTH) + SLACK, [size / 2**20 for size in sizes]
    assert all(record["status"] < 500 for record in served.records())
    for connection in held:
        connection.close()
    clients.good(random.Random(0))
    until(lambda: len(os.listdir(f"/proc/{served.process.pid}/fd")) < 100, SECONDS)


def test_schemathesis_finds_no_fault(served: ServerProcess, tmp_path: Path) -> None:
    """Bodies that fit the schema may still ask for what a model cannot do (an empty prompt, unknown token ids)."""
    command = [str(Path(sys.executable).with_name("st")), "run", f"{served.url}/openapi.json"]
    options = ["--exclude-checks", "positive_data_acceptance", "--max-examples", "10", "--generation-deterministic"]
    phases = ["--phases", "examples,coverage,fuzzing", "--request-timeout", "60", "--continue-on-failure"]
    done = subprocess.run(
        [*command, *options, *phases], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    until(served.idle)
