"""A stand-in for the process of the model: it says the words of its prompt again, one a step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from utils.inference.commands import AnyJob, EmbedJob
from utils.serving.errors import ApiError
from utils.serving.protocol import Ending, Update


@dataclass
class FakeState:
    """See `utils.serving.context.State`."""

    name: str = "ready"
    running: int = 0
    waiting: int = 0
    cache_used_bytes: int = 0
    steps: int = 0


@dataclass
class FakeFacts:
    """See `utils.serving.context.Facts`."""

    max_positions: int | None = None
    vocabulary: int = 0
    embeds: bool = True
    models: tuple[str, ...] = ()


class FakeAnswering:
    """An answer of `length` pieces, one each `pause` seconds; the N-th is the text "N ". Vectors take as long."""

    def __init__(self, job: AnyJob, pause: float, length: int, error: str | None) -> None:
        self.job, self.cancelled = job, threading.Event()
        self._news: queue.Queue[Update] = queue.Queue()
        threading.Thread(target=self._run, args=(pause, length, error), daemon=True).start()

    def _run(self, pause: float, length: int, error: str | None) -> None:
        self._news.put(Update(opened=True))
        prompt_tokens = sum(map(len, self.job.prompts))
        if isinstance(self.job, EmbedJob):
            if not self.cancelled.wait(pause * length):
                vectors = np.array([[len(prompt)] for prompt in self.job.prompts], np.float32)
                self._news.put(Update(ending=Ending("stop", prompt_tokens, 0), vectors=vectors))
            return
        count = min(length, self.job.options.max_new_tokens)
        said = ""
        for number in range(count):
            if self.cancelled.wait(pause):
                return
            if error is not None and number == 1:
                self._news.put(Update(ending=Ending("error", prompt_tokens, number, error=error)))
                return
            said += f"{number} "
            if self.job.stream:
                self._news.put(Update(text=f"{number} ", tokens=(number,)))
        ending = Ending("length", prompt_tokens, count)
        rest = (
            Update(ending=ending) if self.job.stream else Update(text=said, tokens=tuple(range(count)), ending=ending)
        )
        self._news.put(rest)

    def next(self, timeout: float) -> Update | None:
        try:
            return self._news.get(timeout=timeout) if timeout else self._news.get_nowait()
        except queue.Empty:
            return None

    def cancel(self) -> None:
        self.cancelled.set()


@dataclass
class FakeClient:
    """See `utils.serving.context.ModelClient`.

    Attributes:
        pause: seconds per token.
        length: tokens of an answer.
        most: answers at a time; what is beyond gets 429.
        error: with which each answer ends after its first token.
        given: all answers.
    """

    pause: float = 0.001
    length: int = 5
    most: int = 1000
    error: str | None = None
    state: FakeState = field(default_factory=FakeState)
    facts: FakeFacts = field(default_factory=FakeFacts)
    given: list[FakeAnswering] = field(default_factory=list)

    def submit_all(self, jobs: Sequence[AnyJob]) -> list[FakeAnswering]:
        if self.state.name != "ready":
            raise ApiError(503, f"the model is {self.state.name}", kind="server_error", retry_after=5)
        if len(jobs) > self.most:
            raise ApiError(429, "the queue is full", kind="rate_limit_error", retry_after=1)
        answers = [FakeAnswering(job, self.pause, self.length, self.error) for job in jobs]
        self.given += answers
        return answers
