"""Serving over HTTP: where, for whom, how much at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from utils.arguments.fields import Arguments, arg

MOST_PORTS = 65535


@dataclass
class HttpArguments(Arguments):
    """Where the server is reached, and who may ask."""

    group: ClassVar[str] = "HTTP"

    host: str = arg("127.0.0.1", "address to listen on; another than this machine's own needs api_key or insecure")
    flask_port: int = arg(8010, "port of the HTTP API", minimum=1, maximum=MOST_PORTS)
    port: int = arg(8011, "port of the chat page", minimum=1, maximum=MOST_PORTS)
    no_ui: bool = arg(False, "serve no page, which then needs no Gradio")
    title: str = arg("LLM", "title of the page")
    api_key: str | None = arg(
        None, "key that every request must bring; rather set LLM_API_KEY, which the process list does not show"
    )
    api_key_file: str | None = arg(None, "file whose first line is the key, as secrets of services are", path=True)
    insecure: bool = arg(False, "listen on any address without a key")
    cors_origins: list[str] = arg(  # noqa: RUF009
        [], "web sites whose scripts may ask, such as https://chat.example.org, or *; none by default", many=True
    )
    log_requests: bool = arg(False, "write the text of requests and answers to the log, where by default no text is")


@dataclass
class ServedArguments(Arguments):
    """What is served, and how much of it at a time."""

    group: ClassVar[str] = "Serving"

    served_model_name: str | None = arg(
        None, "name that requests give as model; by default the model's own, of a folder the last part of its path"
    )
    lora_modules: list[str] = arg(  # noqa: RUF009
        [], "LoRA adapters served beside the model, each under a name: NAME=FOLDER NAME=FOLDER", many=True
    )
    max_length: int = arg(
        2048,
        "longest prompt and answer together, for all routes; if left out, the model's positions, and 2048 for "
        "requests to /api/chat that say nothing else",
        minimum=2,
        unit="tokens",
    )
    max_batch_size: int = arg(8, "answers at a time", minimum=1, maximum=1024, unit="answers")
    max_queue: int = arg(256, "requests that may wait; more are refused with 429", minimum=0, unit="requests")
    request_timeout: float = arg(600.0, "longest time of a request, waiting included", above=0, unit="seconds")
    prefill_chunk: int = arg(
        512,
        "a long prompt is read in parts of this length, and other answers go on between them",
        minimum=1,
        unit="tokens",
    )
    prompt_cache_gib: float = arg(
        1.0,
        "memory for prompts' beginnings that were read before and may come again; 0 keeps none",
        minimum=0,
        unit="GiB",
    )
    stall_timeout: float = arg(
        60.0, "time without progress, while requests run, after which /health says stalled", above=0, unit="seconds"
    )
    shutdown_timeout: float = arg(
        30.0, "time that running requests get to finish after SIGTERM or Ctrl-C", minimum=0, unit="seconds"
    )
