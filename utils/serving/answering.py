"""From the jobs of one request to its answers: shared by all routes that answer prompts.

It waits for news and looks whether the client is still there, holds the time limit, counts, and fills the request's
record. A route turns the updates into its own form.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flask import Response, g, request

from utils.inference.commands import AnyJob, Job
from utils.serving.context import Served, serving
from utils.serving.errors import ApiError
from utils.serving.protocol import Ending, Update
from utils.serving.record import Record, failure

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from utils.inference.sampling import Alternatives
    from utils.serving.client import Answering

CLIENT_GONE = 499  # as nginx calls it; nobody reads such a response
CLIENT_CLOSED = "client_closed"  # the same, as the log line says it
PAUSE = 0.05  # seconds between two looks at whether the client is still there
SHORT_PAUSE = 0.01  # where the news of several jobs are waited for


@dataclass
class Answer:
    """One job and its answer so far.

    Attributes:
        text, tokens, logprobs, top_logprobs: of all updates together.
        ending: how it ended; None while it is in the making.
        vectors: of a complete `EmbedJob`.
    """

    job: AnyJob
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[Alternatives] = field(default_factory=list)
    ending: Ending | None = None
    vectors: NDArray[np.float32] | None = None
    opened: bool = False
    last_token: float | None = None

    @property
    def finish_reason(self) -> str:
        """Of a complete answer."""
        return "" if self.ending is None else self.ending.finish_reason

    @property
    def prompt_tokens(self) -> int:
        """Of all its prompts."""
        return sum(map(len, self.job.prompts))


@dataclass(frozen=True)
class Usage:
    """Tokens of a request. A prompt with several answers counts once."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Answers:
    """The answers to one request. An iterator of (index of the job, what is new of it).

    It raises `ApiError` if one of the answers cannot be completed: 504 when the time is over, 500 when the model has
    failed, 503 when its process has ended, 499 when the client has gone. `close` cancels what is not complete; whoever
    has it must call it.

    Attributes:
        all: each job with its answer so far.
    """

    def __init__(self, served: Served, jobs: Sequence[AnyJob]) -> None:
        """Submits all jobs.

        Raises:
            ApiError: 429 or 503, none was taken.
        """
        self.all = [Answer(job) for job in jobs]
        self._served, self._model = served, jobs[0].model
        self._record: Record = g.record
        self._gone: Callable[[], bool] = request.environ.get("waitress.client_disconnected", lambda: False)
        self._started = time.perf_counter()
        asked = sum(len(job.prompts) for job in jobs)
        self._record.facts |= {"model": self._model, "n": asked, "stream": jobs[0].stream}
        self._running: dict[int, Answering] = dict(enumerate(served.client.submit_all(jobs)))
        self._news: deque[tuple[int, Update]] = deque()
        self._closed = False

    def __iter__(self) -> Iterator[tuple[int, Update]]:
        return self

    def __next__(self) -> tuple[int, Update]:
        while not self._news:
            if not self._running:
                self.close()
                raise StopIteration
            self._check()
            self._wait()
        index, update = self._news.popleft()
        self._take(self.all[index], update)
        return index, update

    @property
    def usage(self) -> Usage:
        """Tokens of all prompts that were opened and of all answers so far."""
        firsts = [answer for answer in self.all if answer.opened and answer.job.number == 0]
        return Usage(
            sum(answer.prompt_tokens for answer in firsts),
            sum(len(answer.tokens) for answer in self.all),
            sum(answer.ending.cached_tokens for answer in firsts if answer.ending is not None),
        )

    def close(self) -> None:
        """Cancels what is not complete, and counts."""
        if self._closed:
            return
        self._closed = True
        for answering in self._running.values():
            answering.cancel()
        if self._running and not self._record.status >= 400:
            self._record.status = CLIENT_GONE
            self._record.facts["error"] = CLIENT_CLOSED
        metrics, model = self._served.metrics, self._model
        for answer in self.all:
            metrics.finished.labels(model, answer.finish_reason or "abort").inc()
        metrics.whole.labels(model).observe(time.perf_counter() - self._started)
        usage = self.usage
        self._record.facts |= {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "finish_reasons": [answer.finish_reason or "abort" for answer in self.all],
        }
        if self._served.settings.log_requests:
            self._record.facts["answers"] = [answer.text for answer in self.all]

    def _check(self) -> None:
        if self._gone():
            raise ApiError(CLIENT_GONE, "the client has closed the connection", code=CLIENT_CLOSED)
        limit = self._served.settings.request_timeout
        if time.perf_counter() - self._started > limit:
            raise ApiError(
                504, f"the answer was not complete after {limit:g} s (request_timeout)", kind="timeout_error"
            )

    def _wait(self) -> None:
        """Gets what is new; returns without after a short pause."""
        for index, answering in list(self._running.items()):
            while (update := answering.next(0.0)) is not None:
                self._got(index, update)
        if not self._news:
            index, answering = next(iter(self._running.items()))
            update = answering.next(PAUSE if len(self._running) == 1 else SHORT_PAUSE)
            if update is not None:
                self._got(index, update)

    def _got(self, index: int, update: Update) -> None:
        self._news.append((index, update))
        if update.ending is not None:
            del self._running[index]

    def _take(self, answer: Answer, update: Update) -> None:
        """Adds an update to its answer, and counts.

        Raises:
            ApiError: the answer has failed.
        """
        now, metrics, model = time.perf_counter(), self._served.metrics, self._model
        if not answer.opened and (update.opened or update.tokens):
            answer.opened = True
            self._record.facts.setdefault("queue_s", round(now - self._started, 4))
            metrics.queued.labels(model).observe(now - self._started)
            if answer.job.number == 0:
                metrics.prompt_tokens.labels(model).inc(answer.prompt_tokens)
                for prompt in answer.job.prompts:
                    metrics.prompt_lengths.labels(model).observe(len(prompt))
        if update.tokens:
            metrics.generation_tokens.labels(model).inc(len(update.tokens))
            self._time(answer, len(update.tokens), now)
        answer.text += update.text
        answer.tokens += update.tokens
        answer.logprobs += update.logprobs
        answer.top_logprobs += update.top_logprobs
        answer.vectors = update.vectors
        if update.ending is not None:
            self._end(answer, update.ending)

    def _time(self, answer: Answer, tokens: int, now: float) -> None:
        if answer.last_token is None:
            self._record.facts.setdefault("first_token_s", round(now - self._started, 4))
            self._served.metrics.first_token.labels(self._model).observe(now - self._started)
        else:
            gap = (now - answer.last_token) / tokens
            for _ in range(tokens):
                self._served.metrics.between_tokens.labels(self._model).observe(gap)
        answer.last_token = now

    def _end(self, answer: Answer, ending: Ending) -> None:
        answer.ending = ending
        metrics, model = self._served.metrics, self._model
        if isinstance(answer.job, Job):  # vectors have no length, and are made without the cache
            metrics.answer_lengths.labels(model).observe(ending.completion_tokens)
            if answer.job.number == 0:
                metrics.cache_queries.labels(model).inc(ending.prompt_tokens)
                metrics.cache_hits.labels(model).inc(ending.cached_tokens)
        if ending.finish_reason == "error":
            raise ApiError(
                500 if ending.retry_after is None else 503,
                ending.error or "the model has failed",
                kind="server_error",
                retry_after=ending.retry_after,
            )


def answer(served: Served, jobs: Sequence[AnyJob]) -> Answers:
    """Starts the answers to the jobs of the request at hand; they are all of one model.

    Raises:
        ApiError: 429 or 503, none was taken.
    """
    return Answers(served, jobs)


def collect(answers: Answers) -> list[Answer]:
    """The complete answers, in the order of their jobs.

    Raises:
        ApiError: as `Answers`.
    """
    try:
        for _ in answers:
            pass
    finally:
        answers.close()
    return answers.all


def streamed(answers: Answers, pieces: Iterator[str], mimetype: str, last_words: Callable[[ApiError], str]) -> Response:
    """A response that is written while its answers are made.

    What goes wrong before the first piece is an error with a true status; later it is a last piece.

    Args:
        pieces: what the route makes of `answers`.
        last_words: an error as a piece.

    Raises:
        ApiError: as `Answers`, before the first piece.
    """
    try:
        first = next(pieces, "")
    except BaseException:
        answers.close()
        raise
    record: Record = g.record
    served = serving()

    def body() -> Iterator[str]:
        try:
            yield first
            yield from pieces
        except Exception as error:
            said = failure(error, record.id)
            record.status = said.status
            record.note(said, text=served.settings.log_requests)
            yield last_words(said)

    response = Response(body(), mimetype=mimetype)
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Accel-Buffering"] = "no"  # nginx passes each piece on at once
    response.call_on_close(answers.close)
    return response
