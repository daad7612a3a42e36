"""The process of the model: python -m utils.serving.worker DESCRIPTOR PARENT, started by the HTTP side.

DESCRIPTOR is the inherited end of a pair of sockets, PARENT the number of the process with which this one ends. The
first value on the line are the settings; then come commands, and news go back. Signals are left to the HTTP side; this
process ends when the line does.
"""

from __future__ import annotations

import ctypes
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from utils import errors, runtime, signals

if __name__ == "__main__":
    signals.take()  # before the slow imports

from utils.errors import run_script
from utils.inference.commands import Command, from_json
from utils.inference.loading import load_all
from utils.parallel.process_group import ProcessGroup, end, start
from utils.parallel.topology import Layout
from utils.serving.frames import Link, LinkError, pack
from utils.serving.parent import end_with_parent
from utils.serving.protocol import Ending, Update
from utils.serving.settings import ModelSettings

if TYPE_CHECKING:
    from utils.inference.request import Completion, Request
    from utils.inference.scheduler import Event
    from utils.inference.service import News, Service

HEARTBEAT = 5.0  # seconds between turns without work: ranks that share the model wait for each other no longer
REPORT = 0.25  # seconds between reports of steps that have brought nothing to say
ROLE = "llm-model"
_PR_SET_NAME = 15  # of prctl(2)


def main() -> None:
    """The process of the model of a server."""
    belong_to_parent(int(sys.argv[2]))
    link = Link(socket.socket(fileno=int(sys.argv[1])))
    runtime.prepare(answering=True)
    settings = ModelSettings.from_json(link.receive())
    inbox: SimpleQueue[Command] = SimpleQueue()
    threading.Thread(target=listen, args=(link, inbox), name="commands", daemon=True).start()
    layout = Layout.of_prediction()
    processes = start(layout, settings.device)
    try:
        run(settings, processes, inbox, link)
    except LinkError:  # the HTTP side is gone, or hangs
        end(1)
    if not processes.several:  # or else they leave together
        end(0)  # at once: the libraries' own shutdown takes a while


def follow(settings: ModelSettings, layout: Layout) -> None:
    """A process that shares the model with that of a server: it takes the same steps."""
    signals.handle(signal.SIGTERM, signal.SIG_IGN)  # the first one hears it too, and tells when all is done
    signals.handle(signal.SIGINT, signal.SIG_IGN)
    run(settings, start(layout, settings.device), SimpleQueue(), None)


def run(settings: ModelSettings, processes: ProcessGroup, inbox: SimpleQueue[Command], link: Link | None) -> None:
    """Loads the models and answers until a `Stop` comes.

    Args:
        link: to the HTTP side; None in processes that only follow the first.

    Raises:
        UserError: models that cannot be loaded.
        LinkError: the HTTP side does not listen.
    """
    service = open_service(settings, processes, inbox)
    reporter = Reporter(link, service)
    if link is not None:
        link.send({"ready": facts(service)})
    while not service.stopped:
        reporter.report(service.turn(HEARTBEAT))


def open_service(settings: ModelSettings, processes: ProcessGroup, inbox: SimpleQueue[Command]) -> Service:
    """Reads the weights of all models, and computes something with each: what is needed once has been done then."""
    errors.silent = True  # the HTTP side has said already what there is to say of the models' files
    found = settings.prepare(processes)
    errors.silent = not processes.first
    generators = load_all(found, settings.device, warm_up=True)
    from utils.inference.service import Service

    share = settings.prompt_cache_bytes // len(generators)  # each model computes keys and values of its own
    models = {
        name: partial(generator.scheduler, settings.batch_size, settings.prefill_chunk, share)
        for name, generator in generators.items()
    }
    return Service(models, processes=processes, recovers=True, inbox=inbox)


def facts(service: Service) -> dict[str, Any]:
    """What the HTTP side has to know of the models, see `utils.serving.client.Facts`."""
    engine = service.engine
    return {
        "max_positions": engine.max_positions,
        "vocabulary": engine.vocabulary,
        "embeds": engine.embeds,
        "models": list(service.models),
    }


def listen(link: Link, inbox: SimpleQueue[Command]) -> None:
    """Puts the commands of the HTTP side into the inbox; ends the process when that side has gone."""
    try:
        while (value := link.receive()) is not None:
            for command in value:
                inbox.put(from_json(command))
    finally:  # also after a command that cannot be read
        end(0)


class Reporter:
    """Tells the HTTP side what turns have brought."""

    def __init__(self, link: Link | None, service: Service) -> None:
        self._link, self._service = link, service
        self._said: WeakKeyDictionary[Request, int] = WeakKeyDictionary()  # tokens of answers that are wanted whole
        self._reported, self._steps = 0.0, 0

    def report(self, news: list[News]) -> None:
        """Sends the news of a turn in one value.

        Raises:
            LinkError: the HTTP side does not listen.
        """
        if self._link is None:
            return
        updates = [[one.key, *pack(update)] for one in news if (update := self._update(one)) is not None]
        steps, now = self._service.steps, time.monotonic()
        if updates or (steps != self._steps and now - self._reported > REPORT):
            used = self._service.cache_bytes
            self._link.send({"steps": steps, "cache": used, "updates": updates})
            self._reported, self._steps = now, steps

    def _update(self, news: News) -> Update | None:
        if news.error is not None:
            return Update(ending=Ending("error", 0, 0, error=news.error))
        if news.vectors is not None:
            return Update(ending=Ending("stop", news.prompt_tokens, 0), vectors=news.vectors)
        if news.event is None:
            return Update(opened=True) if news.opened else None
        return streamed(news.event) if news.stream else self._whole(news.event)

    def _whole(self, event: Event) -> Update | None:
        """Of an answer that is wanted whole: that its prompt is read, its first token, and all the rest at the end."""
        said = self._said.get(event.request, 0)
        if event.completion is None:
            if said or not (event.opened or event.tokens):
                return None
            self._said[event.request] = len(event.tokens)
            return replace(streamed(event), text="")
        done = event.completion
        return Update(
            event.opened,
            done.text,
            done.tokens[said:],
            (done.logprobs or ())[said:],
            (done.top_logprobs or ())[said:],
            ending_of(done),
        )


def streamed(event: Event) -> Update:
    """What a step has brought to an answer."""
    ending = None if event.completion is None else ending_of(event.completion)
    return Update(event.opened, event.text, event.tokens, event.logprobs, event.top_logprobs, ending)


def ending_of(completion: Completion) -> Ending:
    """How an answer ended, without the answer."""
    return Ending(
        completion.finish_reason,
        completion.prompt_tokens,
        len(completion.tokens),
        completion.cached_tokens,
        completion.error,
        prompt_logprobs=completion.prompt_logprobs,
        prompt_top_logprobs=completion.prompt_top_logprobs,
    )


def belong_to_parent(parent: int) -> None:
    """Gives this process a name, leaves signals that all processes of a terminal or service get to its parent, and
    lets the system end it with that one."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signals.handle(number, signal.SIG_IGN)
    end_with_parent(parent)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, ROLE.encode(), 0, 0, 0)


if __name__ == "__main__":
    run_script(main)
