"""What every route of the server needs."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flask import current_app

from utils.data.lines import naming
from utils.data.template import JinjaTemplate
from utils.errors import UserError
from utils.serving.errors import ApiError
from utils.serving.metrics import Metrics

if TYPE_CHECKING:
    from utils.arguments import ServeArguments
    from utils.inference.loading import Prepared
    from utils.serving.client import ModelClient

_EXTENSION = "serving"
_FOLDERS = re.compile(r"(?<![\w/:])(?:~|\.{1,2})?/(?:[^\s/:;,]+/)*(?=[^\s/:;,])")


@dataclass
class Served:
    """A model with its adapters, and how it is served.

    Attributes:
        client: the process of the model.
        models: tokenizer and template of each served name; the first is the base, adapters follow.
        settings: the arguments of the server.
        metrics: what is counted.
        started: when, in seconds since 1970.
        places: of requests that may take their time; fewer than the server has threads.
    """

    client: ModelClient
    models: dict[str, Prepared]
    settings: ServeArguments
    metrics: Metrics
    started: float
    places: threading.BoundedSemaphore

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

    def longest(self, prepared: Prepared) -> int:
        """Most tokens of prompt and answer together on all routes: the model's positions, or less if --max_length was
        given. Its default only limits models that have no limit of their own.
        """
        limits = [limit for limit in (prepared.positions, self.client.facts.max_positions) if limit is not None]
        if not limits or "max_length" in self.settings.provided:
            limits.append(self.settings.max_length)
        return min(limits)


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
        for prepared in serving().models.values():  # their files are named; what else looks like a folder goes as well
            if isinstance(prepared.template, JinjaTemplate):
                message = message.replace(prepared.template.origin, os.path.basename(prepared.template.origin))
            message = message.replace(f"{prepared.checkpoint.folder}{os.sep}", "")
        raise ApiError(400, _FOLDERS.sub("", message), param=field) from error
