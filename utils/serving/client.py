"""The model as the HTTP side sees it: jobs go to a process of its own, which is started again when it dies."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any

from utils.errors import EXIT_USER_ERROR, notice
from utils.inference.commands import AnyJob, Cancel, EmbedJob, Stop, Submit, to_json
from utils.serving.errors import ApiError
from utils.serving.frames import Link, LinkError, unpack
from utils.serving.protocol import Ending, Update
from utils.serving.settings import ModelSettings
from utils.serving.supervisor import Failures, ModelProcess

LOADING_SECONDS = 5  # until a client should ask again
_OPENED, _ENDING = 3, 6  # places in a packed update behind its key


@dataclass
class Facts:
    """What is known of the models once they are loaded.

    Attributes:
        max_positions: most tokens of prompt and answer together; None has no limit.
        vocabulary: token ids are below it.
        embeds: whether an `EmbedJob` is answered.
        models: served names; the first is the base.
    """

    max_positions: int | None = None
    vocabulary: int = 0
    embeds: bool = False
    models: tuple[str, ...] = ()


@dataclass
class State:
    """How the model is.

    Attributes:
        name: "loading", "ready", "stalled" (there is work, but no step has ended for long), "restarting", "stopping",
            or "failed".
        running: answers, vectors among them, whose prompt has been opened.
        waiting: those before.
        cache_used_bytes: of texts and kept heads.
        steps: of the running process so far.
    """

    name: str
    running: int
    waiting: int
    cache_used_bytes: int = 0
    steps: int = 0


class Answering:
    """An answer in the making."""

    def __init__(self, client: ModelClient, key: int, job: AnyJob) -> None:
        self.key, self.job = key, job
        self.opened = False
        self._client = client
        self._news: SimpleQueue[list[Any] | Update] = SimpleQueue()

    def next(self, timeout: float) -> Update | None:
        """The next update; None if there is none within `timeout` seconds. There is none after an ending."""
        try:
            news = self._news.get(timeout=timeout)
        except Empty:
            return None
        return news if isinstance(news, Update) else unpack(news[1:])

    def cancel(self) -> None:
        """Nobody waits for it any more. Any time, any number of times."""
        self._client.cancel(self)

    def put(self, news: list[Any] | Update) -> None:
        """Hands over an update, as it came from the process of the model or as it is."""
        self._news.put(news)

    def fail(self, error: str) -> None:
        """Ends it with an error that is none of its own."""
        prompt_tokens = sum(map(len, self.job.prompts))
        self.put(Update(ending=Ending("error", prompt_tokens, 0, error=error, retry_after=LOADING_SECONDS)))


class ModelClient:
    """Jobs in, updates out; any thread. `start` it, `stop` it in the end.

    Attributes:
        facts: of the models, once they are loaded.
        failures: how often and how the process has ended by itself.
    """

    def __init__(
        self,
        settings: ModelSettings,
        *,
        max_queue: int = 256,
        stall_timeout: float = 60.0,
        restarts: bool = True,
        on_ready: Callable[[], None] | None = None,
        on_failure: Callable[[int], None] | None = None,
    ) -> None:
        """
        Args:
            settings: of the process of the model.
            max_queue: most jobs that may wait; 0 takes only what can begin at once.
            stall_timeout: seconds without a step, while there is work, until the state is "stalled".
            restarts: whether a process that dies is started again.
            on_ready: called when the model is loaded for the first time.
            on_failure: called with the exit code of the server when the model cannot be kept alive.
        """
        self.facts = Facts()
        self.failures = Failures()
        self._settings = settings
        self._max_queue = max_queue
        self._stall_timeout = stall_timeout
        self._restarts = restarts
        self._on_ready = on_ready
        self._on_failure = on_failure or (lambda code: None)
        self._changed = threading.Condition()  # guards all that follows
        self._phase = "loading"
        self._link: Link | None = None  # to a process that is ready
        self._process: ModelProcess | None = None
        self._answers: dict[int, Answering] = {}
        self._keys = count(1)
        self._progress = time.monotonic()  # when the last step ended, or work began
        self._steps = self._cache_bytes = 0
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Starts the process of the model; returns at once."""
        self._thread.start()

    # --- what routes use -----------------------------------------------------------------------------

    def submit(self, job: AnyJob) -> Answering:
        """Gives a job to the model.

        Raises:
            ApiError: 429 when too many wait, 503 when the model is not there, 400 when it gives no vectors.
        """
        (answering,) = self.submit_all([job])
        return answering

    def submit_all(self, jobs: Sequence[AnyJob]) -> list[Answering]:
        """Gives several jobs to the model, or none of them.

        Raises:
            ApiError: see `submit`.
        """
        with self._changed:
            self._check_phase()
            for job in jobs:
                if isinstance(job, EmbedJob) and not self.facts.embeds:
                    text = f"{job.model} gives no vectors, as an exported model (--mode static); serve the model itself"
                    raise ApiError(400, text, param="model", code="unsupported_model")
            self._check_room(jobs)
            if not self._answers:
                self._progress = time.monotonic()
            answers = [Answering(self, next(self._keys), job) for job in jobs]
            self._answers.update((answering.key, answering) for answering in answers)
            link = self._link
        self._tell(link, [to_json(Submit(answering.key, answering.job)) for answering in answers])
        return answers

    def cancel(self, answering: Answering) -> None:
        """See `Answering.cancel`."""
        with self._changed:
            known = self._answers.pop(answering.key, None)
            link = self._link
            self._changed.notify_all()
        if known is not None:
            self._tell(link, [to_json(Cancel(answering.key))])

    @property
    def state(self) -> State:
        """How the model is now."""
        with self._changed:
            running = sum(answering.opened for answering in self._answers.values())
            stalled = self._answers and time.monotonic() - self._progress > self._stall_timeout
            name = "stalled" if stalled and self._phase == "ready" else self._phase
            return State(name, running, len(self._answers) - running, self._cache_bytes, self._steps)

    @property
    def pid(self) -> int | None:
        """Of the process of the model, if there is one."""
        process = self._process
        return None if process is None else process.pid

    def _check_phase(self) -> None:
        if self._phase == "ready":
            return
        said = {
            "loading": "the model is being loaded",
            "restarting": "the model is being started again",
            "stopping": "the server is stopping",
            "failed": "the model cannot be started",
        }
        wait = math.ceil(self.failures.pause) if self._phase == "restarting" else 0
        raise ApiError(503, said[self._phase], kind="server_error", retry_after=LOADING_SECONDS + wait)

    def _check_room(self, jobs: Sequence[AnyJob]) -> None:
        """Counts what waits beyond the places of each model: the process may not have opened yet what it soon will."""
        wanted: dict[str, int] = {}
        for job in [*(answering.job for answering in self._answers.values()), *jobs]:
            wanted[job.model] = wanted.get(job.model, 0) + 1
        waiting = sum(max(0, number - self._settings.batch_size) for number in wanted.values())
        if waiting > self._max_queue:
            raise ApiError(
                429,
                f"too many requests: {self._max_queue} may wait, and so many do",
                kind="rate_limit_error",
                code="queue_full",
                retry_after=1,
            )

    def _tell(self, link: Link | None, commands: list[Any]) -> None:
        """Sends commands. A process that is gone needs none: jobs that wait go to the next one."""
        if link is not None:
            try:
                link.send(commands)
            except LinkError:
                self.kill()  # it may also hang

    # --- the end -------------------------------------------------------------------------------------

    def drain(self) -> None:
        """From here on no job is taken."""
        with self._changed:
            if self._phase != "failed":
                self._phase = "stopping"

    def stop(self, timeout: float = 0.0) -> None:
        """Takes no more jobs, waits up to `timeout` seconds until those there are complete, ends the process."""
        self.drain()
        with self._changed:
            if self._link is not None:
                self._changed.wait_for(lambda: not self._answers or self._link is None, timeout)
            link = self._link
            self._fail("the server is stopping", list(self._answers.values()))
        if link is None:
            self.kill()
        else:
            self._tell(link, [to_json(Stop())])
        if self._thread.ident is not None:
            self._thread.join()

    def kill(self) -> None:
        process = self._process
        if process is not None:
            process.kill()

    # --- the thread of the process -------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._live()
        except BaseException:  # a server without this thread would only look alive
            self._phase = "failed"
            self._on_failure(1)
            raise

    def _live(self) -> None:
        """Starts the process, hands out what it says, and starts it again when it has ended."""
        while self._phase != "stopping":
            self.failures.add(self._one_life())
            with self._changed:
                if self._phase == "stopping":
                    return
                given_up = self.failures.enough or not self._restarts
                self._phase = "failed" if given_up else "loading" if self._phase == "loading" else "restarting"
            if given_up:
                return self._give_up()
            notice(f"the process of the model {self.failures.how}; starting it again in {self.failures.pause:g} s")
            with self._changed:
                self._changed.wait_for(lambda: self._phase == "stopping", self.failures.pause)

    def _one_life(self) -> int:
        """From start to end of a process; its exit code."""
        try:
            process = ModelProcess(self._settings)
        except (OSError, LinkError) as error:
            notice(f"the process of the model cannot be started: {error}")
            return 1
        with self._changed:
            self._process = process
            if self._phase == "stopping":
                process.kill()
        try:
            while (value := process.link.receive()) is not None:
                self._take(value, process.link)
        except LinkError as error:
            notice(f"the process of the model has written {error}")
        self._lost()
        process.link.end()
        code = process.ended()
        process.link.close()
        self._process = None
        return code

    def _take(self, value: dict[str, Any], link: Link) -> None:
        """Hands out what the process says."""
        self._progress = time.monotonic()
        if "ready" in value:
            return self._ready(value["ready"], link)
        self._steps, self._cache_bytes = value["steps"], value.get("cache", 0)
        for update in value["updates"]:
            answering = self._answers.get(update[0])
            if answering is None:  # it was cancelled
                continue
            if len(update) > _OPENED and update[_OPENED]:
                answering.opened = True
            if len(update) > _ENDING:
                with self._changed:
                    self._answers.pop(answering.key, None)
                    self._changed.notify_all()
            answering.put(update)

    def _ready(self, facts: dict[str, Any], link: Link) -> None:
        self.failures.ready()
        self.facts = Facts(facts["max_positions"], facts["vocabulary"], facts["embeds"], tuple(facts["models"]))
        with self._changed:
            self._link = link
            if self._phase != "stopping":
                self._phase = "ready"
            waiting = [to_json(Submit(answering.key, answering.job)) for answering in self._answers.values()]
        if waiting:
            self._tell(link, waiting)
        on_ready, self._on_ready = self._on_ready, None
        if on_ready is not None:
            on_ready()

    def _lost(self) -> None:
        """The process is gone: its answers fail, and those that waited go on waiting."""
        with self._changed:
            self._link = None
            if self._phase == "ready":
                self._phase = "restarting"
            stays = self._restarts and self._phase == "restarting"
            lost = [one for one in self._answers.values() if one.opened or not stays]
            self._fail("the process of the model has ended; send the request again", lost)

    def _fail(self, error: str, answers: list[Answering]) -> None:
        for answering in answers:
            self._answers.pop(answering.key, None)
            answering.fail(error)
        self._changed.notify_all()

    def _give_up(self) -> None:
        """The model cannot be kept alive."""
        with self._changed:
            self._fail("the model cannot be started", list(self._answers.values()))
        if self.failures.last != EXIT_USER_ERROR:  # who has said what is wrong
            times = f"{self.failures.count} times in a row" if self.failures.count > 1 else "and is not started again"
            notice(f"the process of the model {self.failures.how}, {times}; the server ends")
        self._on_failure(EXIT_USER_ERROR if self.failures.last == EXIT_USER_ERROR else 1)
