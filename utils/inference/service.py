"""Several models behind one inbox: commands come from any thread, one thread works them off turn by turn."""

from __future__ import annotations

import gc
import secrets
import sys
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils import runtime
from utils.errors import UserError
from utils.inference.commands import Cancel, Command, EmbedJob, Job, Stop, Submit, from_json, to_json
from utils.inference.engine import Engine, Vectors
from utils.inference.request import Request
from utils.inference.scheduler import Event, Scheduler
from utils.parallel.process_group import ProcessGroup

MOST_FAILURES = 3  # steps that raise while no answer gets complete: the engine is beyond help


@dataclass(frozen=True)
class News:
    """What a turn has brought to one request. The last news of it has a completion, vectors or an error.

    Attributes:
        key: of the command.
        event: of the scheduler.
        stream: whether text was asked for before the answer is complete.
        opened: the vectors of an `EmbedJob` are made from now on.
        vectors: float32 [prompts, hidden] of an `EmbedJob`.
        prompt_tokens: of all its prompts, with the vectors.
        error: why there will be no answer.
    """

    key: int
    event: Event | None = None
    stream: bool = False
    opened: bool = False
    vectors: NDArray[np.float32] | None = None
    prompt_tokens: int = 0
    error: str | None = None


@dataclass(eq=False)
class _Embedding:
    """An `EmbedJob`, and its vectors in the making once it is opened."""

    key: int
    job: EmbedJob
    vectors: Vectors | None = None

    def close(self) -> None:
        """Gives up what has been made."""
        if self.vectors is not None:
            self.vectors.close()


class Service:
    """Runs the requests of several models: `post` commands from any thread, call `turn` in one.

    Processes that share a model each have such a service with the same models: commands that are posted to that of the
    first reach the others in the same order, so that all take the same steps.

    Attributes:
        steps: of all schedulers so far, and portions of vectors.
        stopped: whether a `Stop` has come.
    """

    def __init__(
        self,
        models: Mapping[str, Callable[[], Scheduler]],
        *,
        processes: ProcessGroup | None = None,
        recovers: bool = False,
        inbox: SimpleQueue[Command] | None = None,
    ) -> None:
        """
        Args:
            models: what makes a scheduler, by served name.
            processes: the processes that share the models; None if each is posted the same commands.
            recovers: a step that raises an exception answers the requests of its model with an error, and the
                service goes on; otherwise the exception comes out of `turn`.
            inbox: where commands come in.
        """
        self.steps = 0
        self.stopped = False
        self._makers = dict(models)
        self._schedulers = {name: make() for name, make in self._makers.items()}
        self._turns = deque(self._schedulers)
        self._processes = processes or ProcessGroup()
        self._recovers = recovers
        self._inbox: SimpleQueue[Command] = SimpleQueue() if inbox is None else inbox
        self._requests: dict[int, tuple[Job, Request]] = {}
        self._keys: dict[Request, int] = {}
        self._embeddings: deque[_Embedding] = deque()
        self._failures = 0

    @property
    def models(self) -> tuple[str, ...]:
        """Served names; the first is the base."""
        return tuple(self._schedulers)

    @property
    def engine(self) -> Engine:
        """Of the base."""
        return self._schedulers[self.models[0]].engine

    @property
    def cache_bytes(self) -> int:
        """Of all schedulers, see there."""
        return sum(scheduler.cache_bytes for scheduler in self._schedulers.values())

    @property
    def busy(self) -> bool:
        """Whether a turn has anything to do."""
        return self._working or not self._inbox.empty()

    @property
    def _working(self) -> bool:
        return bool(self._embeddings) or any(scheduler.busy for scheduler in self._schedulers.values())

    def post(self, *commands: Command) -> None:
        """Adds commands. Any thread may call this, any time."""
        for command in commands:
            self._inbox.put(command)

    def turn(self, wait: float = 0.0) -> list[News]:
        """Takes the commands that have come, then moves one model on by a step: each has its turn.

        Args:
            wait: seconds to wait for a command if there is nothing else to do.

        Raises:
            Exception: what a step has raised, see `recovers`; with it or after `MOST_FAILURES` all that is left to
                do is `close`.
        """
        news: list[News] = []
        for command in self._commands(0.0 if self._working else wait):
            news += self._obey(command)
        if self._embeddings:
            news += self._embed()
        for _ in range(len(self._turns)):
            self._turns.rotate(-1)
            if self._schedulers[self._turns[-1]].busy:
                return news + self._step(self._turns[-1])
        return news

    def close(self) -> None:
        """Forgets all requests and frees all slots."""
        self._requests.clear()
        self._keys.clear()
        for embedding in self._embeddings:
            embedding.close()
        self._embeddings.clear()
        for scheduler in self._schedulers.values():
            scheduler.close()

    # --- commands ------------------------------------------------------------------------------------

    def _commands(self, wait: float) -> list[Command]:
        if not self._processes.several:
            return self._arrived(wait)
        made = self._processes.from_first(lambda: self._shared(wait), "waiting for the first process to take a turn")
        return [from_json(value) for value in made]

    def _arrived(self, wait: float) -> list[Command]:
        """What has come in, in order."""
        commands = []
        try:
            if wait > 0:
                commands.append(self._inbox.get(timeout=wait))
            while True:
                commands.append(self._inbox.get_nowait())
        except Empty:
            return commands

    def _shared(self, wait: float) -> list[list[Any]]:
        """What has come in, for all processes: they need the same random numbers."""
        return [to_json(_seeded(command)) for command in self._arrived(wait)]

    def _obey(self, command: Command) -> list[News]:
        match command:
            case Submit(key, Job() as job):
                return self._submit(key, job)
            case Submit(key, EmbedJob() as job):
                self._embeddings.append(_Embedding(key, job))
            case Cancel(key):
                self._cancel(key)
            case Stop():
                self.stopped = True
                self.close()
        return []

    def _submit(self, key: int, job: Job) -> list[News]:
        scheduler = self._schedulers[job.model]
        try:
            request = scheduler.submit(job.prompt, job.options, number=job.number, stream=job.stream)
        except Exception as error:  # such as a grammar that cannot be used
            if not self._recovers:
                raise
            return [News(key, error=_told(error))]
        self._requests[key] = job, request
        self._keys[request] = key
        return []

    def _cancel(self, key: int) -> None:
        job, request = self._requests.pop(key, (None, None))
        if job is not None and request is not None:
            del self._keys[request]
            self._schedulers[job.model].cancel(request)
        for embedding in [one for one in self._embeddings if one.key == key]:
            self._embeddings.remove(embedding)
            embedding.close()

    # --- work ----------------------------------------------------------------------------------------

    def _step(self, name: str) -> list[News]:
        try:
            events = self._schedulers[name].step()
        except Exception as error:
            return self._failed(name, error)
        self.steps += 1
        news = []
        for event in events:
            key = self._keys[event.request]
            job, _ = self._requests[key]
            if event.completion is not None:
                self._failures = 0
                del self._keys[event.request], self._requests[key]
            news.append(News(key, event, job.stream))
        return news

    def _failed(self, name: str, error: Exception) -> list[News]:
        """Answers the requests of a model whose step has raised an exception, and makes it ready for others."""
        self._failures += 1
        if not self._recovers or self._processes.several or self._failures == MOST_FAILURES:
            raise error
        told = _told(error)
        self._schedulers[name].close()
        _give_back_memory(error)
        self._schedulers[name] = self._makers[name]()
        keys = [key for key, (job, _) in self._requests.items() if job.model == name]
        for key in keys:
            _, request = self._requests.pop(key)
            del self._keys[request]
        return [News(key, error=told) for key in keys]

    def _embed(self) -> list[News]:
        """Goes on with the `EmbedJob` that came first: answers in the making must not wait for all of it."""
        embedding = self._embeddings[0]
        key, job = embedding.key, embedding.job
        try:
            if embedding.vectors is None:  # told before it is begun, so that it is known what a process dies of
                embedding.vectors = self._schedulers[job.model].engine.embed(job.prompts)
                return [News(key, opened=True)]
            next(embedding.vectors)
        except StopIteration as complete:
            self._embeddings.popleft()
            return [News(key, vectors=complete.value, prompt_tokens=sum(map(len, job.prompts)))]
        except Exception as error:
            if not self._recovers or self._processes.several:
                raise
            self._embeddings.popleft()
            told = _told(error)
            _give_back_memory(error)
            return [News(key, error=told)]
        self.steps += 1
        return []


def _seeded(command: Command) -> Command:
    """With a seed that every process knows."""
    match command:
        case Submit(key, Job(options=options) as job) if options.seed is None:
            return Submit(key, replace(job, options=replace(options, seed=secrets.randbits(64))))
    return command


def _told(error: Exception) -> str:
    """What a client hears of an exception; the traceback is for the server's log."""
    if isinstance(error, UserError):
        return str(error)
    traceback.print_exception(error, file=sys.stderr)
    scarce = isinstance(error, MemoryError) or "ResourceExhausted" in str(error)
    return "there was too little memory for this answer" if scarce else "the model failed while it answered"


def _give_back_memory(error: Exception) -> None:
    """What a step had made before it raised an exception."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    runtime.give_back_freed_memory()
