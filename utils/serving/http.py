"""The WSGI server: waitress over sockets that are bound already, with limits for clients that are slow or many."""

from __future__ import annotations

import logging
import resource
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import TcpWSGIServer
from waitress.task import ErrorTask, ThreadedTaskDispatcher

from utils import runtime
from utils.checkpoints.files import json_bytes
from utils.serving import limits
from utils.serving.app import error_body
from utils.serving.errors import ApiError

SPARE_THREADS = 16  # for what needs no answer of the model, such as /health and 429
KEPT_THREADS = 8  # of them, that only requests which end at once may take
MOST_THREADS = 1024
SPARE_CONNECTIONS = 1024  # idle ones
IDLE_SECONDS = 75  # that a connection may do nothing between two requests
STUCK_SECONDS = 60  # that a client may leave what was written to it unread, or have its answer wait to be written
READ_SECONDS = 120  # that the reading of one request may take
LINGER_SECONDS = 10  # that the rest of a refused request is read, so that its client gets to the answer
UNREAD_BYTES = 2**20  # that wait for a slow reader before its answer waits too
NO_FILES = 2**40  # bytes of a body or response beyond which waitress would need a file, and room on the disk for it
CHECK_SECONDS = 5  # between two looks at all this


class _ErrorTask(ErrorTask):
    """Answers what is no request, or too large, in the form of the API."""

    def execute(self) -> None:
        refusal = self.request.error
        path = getattr(self.request, "path", "") or ""
        said = {
            413: f"the body is larger than {limits.BODY_BYTES:,} bytes",
            431: f"the headers are larger than {limits.HEADER_BYTES:,} bytes",
            500: "the server has failed",
        }.get(refusal.code, f"this is no request: {refusal.body}")
        error = ApiError(refusal.code, said, kind="server_error" if refusal.code >= 500 else "invalid_request_error")
        self.channel.refused = True
        self.status = f"{refusal.code} {refusal.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        body = json_bytes(error_body(error, path))
        self.content_length = len(body)
        self.write(body)


class _Parser(HTTPRequestParser):
    def parse_header(self, header_plus: bytes) -> None:
        """
        Raises:
            ParsingError: among others, a body has two lengths; a proxy might go by the other one than this server.
        """
        super().parse_header(header_plus)
        if self.chunked and "CONTENT_LENGTH" in self.headers:
            raise ParsingError("Content-Length and Transfer-Encoding exclude each other")


class _Channel(HTTPChannel):
    """One connection.

    Attributes:
        refused: whether its last request was refused before it was read to its end.
        began: when the request that is being read began to come.
        lingering: when the rest of a refused request began to be thrown away.
        waits: since when its answer waits for the client to read, and keeps a thread.
    """

    parser_class = _Parser
    error_task_class = _ErrorTask
    refused = False
    began: float | None = None
    lingering: float | None = None
    waits: float | None = None

    def received(self, data: bytes) -> bool:
        if self.began is None:
            self.began = time.time()
        taken: bool = super().received(data)
        if self.request is None:
            self.began = None
        return taken

    def send_continue(self) -> None:
        if self.request.error is None:  # or else the client would send all of what is refused
            super().send_continue()

    def _flush_outbufs_below_high_watermark(self) -> None:
        self.waits = time.time()
        try:
            super()._flush_outbufs_below_high_watermark()
        finally:
            self.waits = None

    def readable(self) -> bool:
        return self.lingering is not None or super().readable()

    def handle_read(self) -> None:
        if self.lingering is None:
            super().handle_read()
        else:
            self.recv(2**16)  # closes at the end

    def handle_close(self) -> None:
        """A socket that is closed with something unread resets the connection, and the answer is lost with it."""
        if self.refused and self.connected:
            self.refused = self.will_close = False
            try:
                self.socket.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            else:
                self.lingering = time.time()
                return
        super().handle_close()

    def overdue(self, now: float) -> bool:
        """Whether the client takes too long."""
        if self.lingering is not None:
            return now - self.lingering > LINGER_SECONDS
        if self.began is not None and now - self.began > READ_SECONDS:
            return True
        waits = self.waits
        if waits is not None and now - waits > STUCK_SECONDS:
            return True
        silent = now - self.last_activity
        return silent > STUCK_SECONDS if self.total_outbufs_len else silent > IDLE_SECONDS and not self.requests


class _Server(TcpWSGIServer):
    channel_class = _Channel

    def maintenance(self, now: float) -> None:
        """Nothing: waitress waits for a client to read before it closes, which one that is stuck never does."""


def threads_for(requests: int) -> int:
    """How many threads serve a model at which so many requests may wait or run."""
    return min(requests + SPARE_THREADS, MOST_THREADS)


def places(requests: int) -> threading.BoundedSemaphore:
    """What requests that may take their time share, see `Served.places`: whatever comes, some threads stay free."""
    return threading.BoundedSemaphore(threads_for(requests) - KEPT_THREADS)


class HttpServer:
    """Serves an application on sockets that are bound already.

    Args:
        app: of `create_app`.
        sockets: bound, not yet listening.
        requests: how many may wait or run at a time; each has a thread of its own.
    """

    def __init__(self, app: Any, sockets: Sequence[socket.socket], requests: int) -> None:
        runtime.share_heaps()
        for name in ("waitress", "waitress.queue"):
            logging.getLogger(name).setLevel(logging.ERROR)
        threads = threads_for(requests)
        adjustments = Adjustments(
            threads=threads,
            connection_limit=_connections(threads + SPARE_CONNECTIONS),
            cleanup_interval=CHECK_SECONDS,
            max_request_header_size=limits.HEADER_BYTES,
            max_request_body_size=limits.BODY_BYTES + 1,
            outbuf_high_watermark=UNREAD_BYTES,
            inbuf_overflow=NO_FILES,
            outbuf_overflow=NO_FILES,
            channel_request_lookahead=1,  # so that a client's going is noticed while its request is served
            log_socket_errors=False,
            ident=None,
        )
        self._map: dict[int, Any] = {}
        self._threads = ThreadedTaskDispatcher()
        self._threads.set_thread_count(threads)
        self._servers = [
            _Server(
                app,
                self._map,
                True,
                one,
                dispatcher=self._threads,
                adj=adjustments,
                bind_socket=False,
                sockinfo=(one.family, one.type, one.proto, one.getsockname()),
            )
            for one in sockets
        ]
        self._ending = threading.Event()
        self._limit = self._checked = 0.0

    def run(self) -> None:
        """Serves until `stop` was called and all responses are written, or their time is over."""
        while not self._ending.is_set():
            self._turn()
        for server in self._servers:  # no new connections
            server.del_channel()
            server.socket.close()
        while self._busy() and time.monotonic() < self._limit:
            self._turn()
        self._threads.shutdown(timeout=1)
        wasyncore.close_all(self._map)

    def stop(self, within: float) -> None:
        """No new requests from here on. May be called from any thread, or by a handler of a signal.

        Args:
            within: seconds that responses under way have to be completed.
        """
        self._limit = time.monotonic() + within
        self._ending.set()
        self._servers[0].pull_trigger()

    def _turn(self) -> None:
        wasyncore.loop(timeout=1, use_poll=True, map=self._map, count=1)
        now = time.time()
        if now - self._checked > CHECK_SECONDS:
            self._checked = now
            for channel in list(self._map.values()):
                if isinstance(channel, _Channel) and channel.overdue(now):
                    channel.refused = False
                    channel.handle_close()

    def _busy(self) -> bool:
        return any(
            isinstance(channel, _Channel) and (channel.requests or channel.total_outbufs_len)
            for channel in list(self._map.values())
        )


def _connections(wanted: int) -> int:
    """How many connections there can be: the system's limit of open files is raised as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + 128
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(wanted, soft - min(128, soft // 2))
