"""What every route of the server needs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from flask import current_app

from utils.data.lines import naming
from utils.errors import UserError
from utils.serving.errors import ApiError
from utils.serving.metrics import Metrics
from utils.serving.protocol import Job, Update

if TYPE_CHECKING:
    from utils.inference.loading import Prepared

_EXTENSION = "serving"
_FOLDERS = re.compile(r"(?<![\w/:])(?:~|\.{1,2})?/(?:[^\s/:;,]+/)*(?=[^\s/:;,])")


class State(Protocol):
    """How the process of the model is: `name` is loading, ready, stalled, restarting, stopping or failed."""

    name: str
    running: int
    waiting: int
    cache_used_bytes: int
    steps: int


class Facts(Protocol):
    """What is known of the model."""

    max_positions: int | None
    vocabulary: int
    embeds: bool
    models: tuple[str, ...]


class Answering(Protocol):
    """A job on its way to an answer."""

    def next(self, timeout: float) -> Update | None:
        """The next news; None if there is none within `timeout` seconds."""

    def cancel(self) -> None:
        """Nobody waits for it any more; may be called again, and when it is complete."""


class ModelClient(Protocol):
    """The process of the model, as the HTTP side sees it."""

    @property
    def state(self) -> State: ...

    @property
    def facts(self) -> Facts: ...

    def submit_all(self, jobs: Sequence[Job]) -> Sequence[Answering]:
        """Takes all jobs, or none.

        Raises:
            ApiError: 429, the queue is full; 503, the model is not there.
        """

    def embed(self, model: str, prompts: list[list[int]], timeout: float) -> list[list[float]]:
        """The mean of the last hidden state of each prompt."""


@dataclass
class Served:
    """A model with its adapters, and how it is served.

    Attributes:
        client: the process of the model.
        models: tokenizer and template of each served name; the first is the base, adapters follow.
        settings: the arguments of the server.
        metrics: what is counted.
        started: when, in seconds since 1970.
    """

    client: ModelClient
    models: dict[str, Prepared]
    settings: Any
    metrics: Metrics
    started: float

    def model(self, name: str | None) -> tuple[str, Prepared]:
        """(served name, tokenizer and template) of the model that a client names; None means the base.

        Raises:
            ApiError: 404, no such model.
        """
        if name is None:
            name = next(iter(self.models))
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(
                404, f"there is no model {name!r:.100}; served: {known}", param="model", code="model_not_found"
            )
        return name, self.models[name]


def attach(app: Any, served: Served) -> None:
    """Gives an app what its routes need."""
    app.extensions[_EXTENSION] = served


def serving() -> Served:
    """What the app of the request at hand serves."""
    served: Served = current_app.extensions[_EXTENSION]
    return served


@contextmanager
def reading(field: str) -> Iterator[None]:
    """A block that makes a client's text into tokens; whatever it raises is a fault of that text.

    Raises:
        ApiError: 400, with `field`.
    """
    try:
        with naming(field):
            yield
    except UserError as error:
        message = "; ".join(error.faults)
        raise ApiError(400, _FOLDERS.sub("", message), param=field) from error
