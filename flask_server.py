"""Serves a model over HTTP, with a page to chat: python flask_server.py --model_name_or_path NAME ...

`--help` lists the arguments. The model runs in a process of its own, and so does the page; this one speaks HTTP. As
several processes (`python -m paddle.distributed.launch`) that share the model, the first speaks HTTP.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING

from utils import runtime, signals

if __name__ == "__main__":
    signals.take()  # before the slow imports

from utils.arguments import ServeArguments, parse
from utils.arguments.serve_checks import KEY_VARIABLE
from utils.errors import run_script
from utils.inference.loading import check_model_type, fitting_src_length
from utils.parallel.process_group import ProcessGroup
from utils.parallel.topology import Layout
from utils.serving import sockets, worker
from utils.serving.client import ModelClient
from utils.serving.context import Served
from utils.serving.page.settings import PageSettings
from utils.serving.settings import ModelSettings
from utils.serving.supervisor import PageProcess

if TYPE_CHECKING:
    from utils.serving.http import HttpServer

AGAIN_SECONDS = 1.0  # after a signal in which the same one counts once: launchers send it several times
FLUSH_SECONDS = 5.0  # for responses that are complete to reach their clients


def main() -> None:
    """Parses, checks, listens, starts the processes of the model and the page, serves until it is told to end."""
    runtime.prepare(answering=True)
    run = parse(ServeArguments, script="flask_server.py")
    layout = Layout.of_prediction()
    layout.check_device(run)
    settings = ModelSettings.of(run)
    if layout.rank > 0:
        return worker.follow(settings, layout)
    listening = sockets.listen(run.host, run.flask_port)
    models = settings.prepare(ProcessGroup(layout))
    base = next(iter(models.values()))
    check_model_type(run, base.checkpoint)
    run.src_length = fitting_src_length(run, base)

    from utils.serving.app import create_app  # slow to import: faults of arguments do not wait
    from utils.serving.http import HttpServer, places
    from utils.serving.metrics import Metrics

    server = Server(run, settings, layout)
    metrics = Metrics(list(models), lambda: server.client.state)
    requests = len(models) * run.max_batch_size + run.max_queue
    served = Served(server.client, models, run, metrics, time.time(), places(requests))
    server.http = HttpServer(create_app(served), listening, requests)
    code = server.run()
    if code:
        sys.exit(code)


class Server:
    """The process that speaks HTTP, and those that it has started.

    Attributes:
        client: the process of the model.
        http: set before `run`.
    """

    http: HttpServer

    def __init__(self, run: ServeArguments, settings: ModelSettings, layout: Layout) -> None:
        self._run = run
        self._code = 0
        self._ending: float | None = None  # since when
        self.client = ModelClient(
            settings,
            max_queue=run.max_queue,
            stall_timeout=run.stall_timeout,
            restarts=layout.world == 1,  # of several processes, the launcher ends all when one has ended
            on_ready=self._say_where,
            on_failure=self._failed,
        )
        self._page: PageProcess | None = None
        if not run.no_ui:
            api = sockets.url(run.host, run.flask_port)
            page = PageSettings(api, run.host, run.port, run.title, run.api_key or "", parent=os.getpid())
            self._page = PageProcess(page)

    def run(self) -> int:
        """Serves until a signal ends it or the model cannot be kept alive; the exit code."""
        signals.handle(signal.SIGPIPE, signal.SIG_IGN)  # nobody has to read what it says
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if not signals.is_ignored(number):
                signals.handle(number, self._end)
        self.client.start()
        if self._page is not None:
            self._page.start()
        try:
            self.http.run()
        finally:
            self.client.stop()
            if self._page is not None:
                self._page.stop()
        return self._code

    def _end(self, number: int, frame: FrameType | None) -> None:
        """A handler of signals: the first one lets running requests finish, a second one ends at once."""
        if self._ending is not None:
            if time.monotonic() - self._ending > AGAIN_SECONDS:
                self.client.kill()
                signals.end(number)
            return
        self._ending = time.monotonic()
        if self._page is not None:
            self._page.leave()
        signals.notice(
            f"ending after {signals.name(number)}: running requests have {self._run.shutdown_timeout:g} s to finish; "
            "a second signal ends at once"
        )
        threading.Thread(target=self._finish, name="end", daemon=True).start()

    def _finish(self) -> None:
        """New requests are refused, those that run finish, then the HTTP side ends."""
        self.client.stop(self._run.shutdown_timeout)
        self.http.stop(FLUSH_SECONDS)

    def _failed(self, code: int) -> None:
        """The model cannot be kept alive."""
        self._code = code
        self.http.stop(FLUSH_SECONDS)

    def _say_where(self) -> None:
        """One line on where everything is, and one that can be tried."""
        run = self._run
        api = sockets.url(run.host, run.flask_port)
        page = [] if run.no_ui else [f"page: {sockets.url(run.host, run.port)}"]
        print("  ".join([*page, f"API: {api}/v1", f"documentation: {api}/docs"]))
        print(to_try(run), flush=True)


def to_try(run: ServeArguments) -> str:
    """A line that works in a shell. The key is taken from where the shell finds it: it never stands in the log."""
    said, header = "try it", ""
    if run.api_key_file is not None:
        header = f' -H "Authorization: Bearer $(head -n 1 {shlex.quote(os.path.abspath(run.api_key_file))})"'
    elif run.api_key is not None:
        said, header = f"try it, with the key in {KEY_VARIABLE}", f' -H "Authorization: Bearer ${KEY_VARIABLE}"'
    address = f"{sockets.url(run.host, run.flask_port)}/api/chat"
    return f"""{said}: curl {address} -H "Content-Type: application/json"{header} -d '{{"context": "Hello"}}'"""


if __name__ == "__main__":
    run_script(main)
