"""The HTTP side in this process, over real sockets, with a stand-in for the process of the model."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from flask import Response, jsonify
from serving_fake import FakeClient
from serving_processes import SECONDS, Asked, until
from tiny_models import write_tiny_llama

from utils.arguments import ServeArguments
from utils.inference.commands import Job
from utils.inference.loading import Prepared, prepare
from utils.inference.sampling import SamplingOptions
from utils.serving import record
from utils.serving.answering import answer, collect
from utils.serving.app import create_app
from utils.serving.bodies import read_object
from utils.serving.context import Served, serving
from utils.serving.http import HttpServer, places
from utils.serving.metrics import Metrics

REQUESTS = 32  # that a server here expects
LARGE = 2**25  # bytes of a response that no buffer holds


@dataclass
class Running(Asked):
    """A server in this process."""

    client: FakeClient
    served: Served


class Log:
    """What `logged` writes."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @property
    def text(self) -> str:
        return self._file.read_text("utf-8")

    def of(self, *ids: str) -> list[dict[str, Any]]:
        """The lines of requests, which are written when their responses have been sent."""

        def found() -> list[dict[str, Any]]:
            lines = [json.loads(line) for line in self.text.splitlines()]
            return [line for name in ids for line in lines if line["id"] == name and "status" in line]

        until(lambda: len(found()) >= len(ids))
        return found()


def tiny(folder: Path) -> Prepared:
    """What is known of a tiny model before its weights are read."""
    write_tiny_llama(folder)
    return prepare(str(folder), device="cpu")


@contextmanager
def logged(file: Path) -> Iterator[Log]:
    """What is logged goes to a file: pytest's own capture loses what threads write while it is read."""
    with file.open("a", encoding="utf-8") as output, mock.patch.object(record, "sys", SimpleNamespace(stderr=output)):
        yield Log(file)


@contextmanager
def running(prepared: Prepared, client: FakeClient | None = None, **settings: Any) -> Iterator[Running]:
    """A server; ended afterwards."""
    client = client or FakeClient()
    arguments = ServeArguments(src_length=128, max_length=256)
    for name, value in settings.items():
        arguments.set_from(name, value, f"--{name}")
    metrics = Metrics(["tiny"], lambda: client.state)
    served = Served(client, {"tiny": prepared}, arguments, metrics, time.time(), places(REQUESTS))
    app = create_app(served)

    @app.post("/several")
    def several() -> Response:
        """n answers to one prompt, which only other APIs have."""
        options = SamplingOptions(max_new_tokens=1000)
        jobs = [Job("tiny", [1, 2, 3], options, number) for number in range(read_object()["n"])]
        return jsonify([one.text for one in collect(answer(serving(), jobs))])

    @app.get("/large")
    def large() -> Response:
        return Response(b"x" * 2**22 for _ in range(LARGE // 2**22))

    @app.get("/bug")
    def bug() -> Response:
        raise RuntimeError("/home/someone/secret")

    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = HttpServer(app, [listening], REQUESTS)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield Running(listening.getsockname()[1], client, served)
    finally:
        server.stop(0.0)
        thread.join(SECONDS)
        assert not thread.is_alive()


def said(text: str) -> dict[str, Any]:
    return {"error_code": 0, "error_msg": "Success", "result": {"response": {"role": "bot", "utterance": text}}}
