"""A whole server for tests: the HTTP side in a thread, on a socket of its own, and the model in its process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai

from utils.arguments import ServeArguments, parse
from utils.serving.app import create_app
from utils.serving.client import ModelClient
from utils.serving.context import Served
from utils.serving.http import HttpServer
from utils.serving.metrics import Metrics
from utils.serving.settings import ModelSettings

LOADING_SECONDS = 240


@dataclass
class Local:
    """A server that runs.

    Attributes:
        url: where its routes are.
        served: what it serves.
        key: of its API.
    """

    url: str
    served: Served
    key: str | None = None

    @property
    def openai(self) -> openai.OpenAI:
        """The official client, which does not ask twice."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, timeout=300)


@contextmanager
def serving(model: Path | str, *words: str) -> Iterator[Local]:
    """A server of a model, with more arguments of flask_server.py; ready when it is yielded."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    command = ["--model_name_or_path", str(model), "--no_ui", "true", "--flask_port", "8010", "--device", "cpu", *words]
    settings = parse(ServeArguments, command, "flask_server.py")
    assert settings.served_model_name is not None and settings.model_name_or_path is not None
    of_model = ModelSettings(
        settings.served_model_name,
        settings.model_name_or_path,
        dtype=settings.dtype,
        chat_template=settings.chat_template,
        lora_path=settings.lora_path,
        batch_size=settings.max_batch_size,
    )
    client = ModelClient(of_model, max_queue=settings.max_queue)
    models = of_model.prepare()
    served = Served(client, models, settings, Metrics(list(models), lambda: client.state), time.time())
    server = HttpServer(create_app(served), [listening], settings.max_queue)
    client.start()
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + LOADING_SECONDS
        while client.state.name != "ready":
            assert client.state.name == "loading" and time.monotonic() < end
            time.sleep(0.05)
        yield Local(f"http://127.0.0.1:{port}", served, settings.api_key)
    finally:
        client.stop()
        server.stop(0)
        thread.join()
