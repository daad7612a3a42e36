"""The processes of one run, as each of them sees the others.

`start` connects them; the object that it returns is all that scripts and the trainer need. With one
process it is a plain `ProcessGroup`, which does nothing, so that no caller asks how many there are.

Everything that waits for other ranks goes through a barrier: a count in the store that rank 0 serves. It
needs no partner to answer in time (gloo gives up after 30 s), knows who is missing, and hears of a rank
that has failed.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any, TypeVar

from utils import errors, runtime, signals
from utils.errors import UserError
from utils.parallel import groups
from utils.parallel.topology import Layout

STEP_SECONDS = 1800.0  # ranks do the same work: one that is so much later hangs
ALONE_SECONDS = 24 * 3600.0  # one rank works, the others wait: tokenizing, saving
TOLD_SECONDS = 1.0  # for another rank to say why it does not answer
SEEN_SECONDS = 5.0  # for rank 0 to show what another rank has found
READ_SECONDS = 0.1  # for others to read from the store before rank 0 ends, and the store with it
BUCKET_BYTES = 64 << 20
EXIT_FAILED = 1
UNANSWERED = re.compile(r"an exchange among ranks .*(Timed out|timeout|closed|reset|Broken pipe|did not come).*", re.I)
STORE_GONE = (RuntimeError, ValueError)  # what the store raises when the process that serves it has ended

Value = TypeVar("Value")


class ProcessGroup:
    """One process. `ConnectedGroup` has the same methods for several.

    Attributes:
        layout: who does what.
        first: whether this process writes files and speaks to the user.
        groups: the ranks with which this one shares a model, rows or state.
    """

    def __init__(self, layout: Layout | None = None) -> None:
        self.layout = layout or Layout()
        self.groups = groups.Groups()
        self.first = self.layout.rank == 0

    @property
    def several(self) -> bool:
        return self.layout.world > 1

    def barrier(self, what: str, seconds: float = ALONE_SECONDS) -> None:
        """Waits until every rank is here.

        Args:
            what: is being waited for, for messages.
            seconds: after which the ranks that have not come are taken for hung.

        Raises:
            UserError: a rank has failed, or did not come.
        """

    def check(self) -> None:
        """Raises `UserError` if another rank has failed."""

    def sums(self, values: Iterable[float]) -> list[float]:
        """The sum of each value over all ranks, in float64."""
        return list(values)

    def gather(self, value: Value) -> list[Value]:
        """The JSON value of every rank, in their order."""
        return [value]

    def from_first(self, make: Callable[[], Value], what: str) -> Value:
        """The JSON value that rank 0 makes, while the others wait.

        Args:
            what: is being waited for, for messages.
        """
        return make()

    def add_up(self, tensors: Sequence[Any], group: Any) -> None:
        """Replaces each tensor by its sum over a group, worked out in float32; all have the same result.

        Args:
            group: one of `groups`; nothing happens in None. No barrier stands before: the ranks must be together.
        """

    def copy_from_first(self, tensors: Sequence[Any], group: Any) -> None:
        """Replaces each tensor by that of the first rank of a group, see `add_up`."""

    def alike(self, value: Any, fault: str) -> None:
        """Raises `UserError` with `fault` unless all ranks have the same JSON value."""

    def ending(self) -> None:
        """To be called when this process is going to fail, but has still something to write before it says so."""

    @contextmanager
    def one_after_first(self) -> Iterator[None]:
        """A block that the first process of every machine goes through before the others, which then find
        what it has put into the cache."""
        yield


class ConnectedGroup(ProcessGroup):
    """Several processes that the launcher has started, connected."""

    def __init__(self, layout: Layout, store: Any) -> None:
        super().__init__(layout)
        self.store = store
        self.passed = 0  # barriers
        self.gathered = 0
        self.made = 0
        self.relayed = False  # another rank's failure is what ends this one

    # --- waiting -------------------------------------------------------------------------------------

    def barrier(self, what: str, seconds: float = ALONE_SECONDS) -> None:
        self.passed += 1
        try:
            self._wait_for(what, seconds)
        except STORE_GONE as error:  # the store is gone
            self._lost(error)

    def _wait_for(self, what: str, seconds: float) -> None:
        wanted = self.passed * self.layout.world
        started, pause = time.monotonic(), 0.0005
        arrived = self.store.add("barrier", 1)
        # after that: whoever is missing in the sum is missing here too, also if it stops between the two
        self.store.add(f"barrier/{self.layout.rank}", 1)
        while arrived < wanted:
            time.sleep(pause)
            waited = time.monotonic() - started
            pause = min(2 * pause, 0.02 if waited < 10 else 0.2)
            arrived = self.store.add("barrier", 0)
            if waited > 0.05:
                self.heed()
            if waited > seconds and arrived < wanted:
                late = [rank for rank in range(self.layout.world) if self.store.add(f"barrier/{rank}", 0) < self.passed]
                raise UserError(
                    f"{what}: rank {', '.join(map(str, late))} did not come within {seconds:.0f} s; "
                    "look at the end of its workerlog file"
                )

    def check(self) -> None:
        try:
            self.heed()
        except STORE_GONE as error:  # the store is gone
            self._lost(error)

    def heed(self) -> None:
        """Raises `UserError` with what another rank has found, if one has failed."""
        if self.store.add("failed", 0):
            self.relayed = True
            raise UserError(json.loads(bytes(self.store.get("failure")).decode()))

    def _lost(self, error: Exception) -> None:
        """The process of rank 0, which serves the store, has ended: so does this one, in silence."""
        print(f"rank {self.layout.rank}: rank 0 has ended ({str(error).splitlines()[0]})", file=sys.stderr)
        end(EXIT_FAILED)

    @contextmanager
    def one_after_first(self) -> Iterator[None]:
        if self.layout.local_rank == 0:
            yield
            self.barrier("waiting for the first process of another machine")
        else:
            self.barrier("waiting for the first process of this machine")
            yield

    # --- exchanging ----------------------------------------------------------------------------------

    def sums(self, values: Iterable[float]) -> list[float]:
        import paddle
        import paddle.distributed as dist

        self.barrier("adding up", STEP_SECONDS)
        total = paddle.to_tensor(list(values), dtype="float64")
        dist.all_reduce(total)
        return [float(value) for value in total.numpy()]

    def gather(self, value: Value) -> list[Value]:
        self.gathered += 1
        number = self.gathered % 2  # no rank comes two exchanges further while another still reads
        self.store.set(f"gather/{number}/{self.layout.rank}", json.dumps(value))
        self.barrier("exchanging results", STEP_SECONDS)
        return [
            json.loads(bytes(self.store.get(f"gather/{number}/{rank}")).decode()) for rank in range(self.layout.world)
        ]

    def from_first(self, make: Callable[[], Value], what: str) -> Value:
        self.made += 1
        key = f"made/{self.made % 2}"  # rank 0 makes no third value while another still reads the first
        if self.first:
            self.store.set(key, json.dumps(make()))
        self.barrier(what)
        return json.loads(bytes(self.store.get(key)).decode())

    def add_up(self, tensors: Sequence[Any], group: Any) -> None:
        import paddle.distributed as dist

        self._in_buckets(tensors, group, lambda flat: dist.all_reduce(flat, group=group))

    def copy_from_first(self, tensors: Sequence[Any], group: Any) -> None:
        import paddle.distributed as dist

        self._in_buckets(tensors, group, lambda flat: dist.broadcast(flat, group.ranks[0], group=group))

    def _in_buckets(self, tensors: Sequence[Any], group: Any, exchange: Callable[[Any], Any]) -> None:
        """Few large messages instead of one per tensor."""
        if group is None:
            return
        import paddle

        with paddle.no_grad():
            for bucket in buckets(tensors, BUCKET_BYTES // 4):
                flat = paddle.concat([tensor.astype("float32").reshape([-1]) for tensor in bucket])
                exchange(flat)
                parts = paddle.split(flat, [tensor.size for tensor in bucket]) if len(bucket) > 1 else [flat]
                for tensor, part in zip(bucket, parts, strict=True):
                    paddle.assign(part.reshape(tensor.shape).astype(tensor.dtype), tensor)

    def alike(self, value: Any, fault: str) -> None:
        if any(other != json.loads(json.dumps(value)) for other in self.gather(value)):
            raise UserError(fault)

    # --- the end -------------------------------------------------------------------------------------

    def ending(self) -> None:
        keep_own_exit_code()

    def failed(self, faults: Sequence[str]) -> None:
        """Ends this process with exit code 2; rank 0 shows the faults of whichever rank found them first."""
        keep_own_exit_code()
        speaks = self.layout.local_rank == 0
        try:
            if not self.relayed:
                self._publish(faults)
            if not speaks and not self.relayed:
                speaks = not self._was_seen()
        except STORE_GONE:
            speaks = speaks or not self.relayed
        if speaks:
            errors.show(faults)
            self._say("seen")
        if self.first:
            time.sleep(READ_SECONDS)
        end(errors.EXIT_USER_ERROR)

    def crashed(self, error: BaseException) -> None:
        """Ends this process after a bug, with its traceback, and the other ranks with its last line.

        An exchange in which another rank did not answer is no bug: that rank has the reason, if it could say it.
        """
        keep_own_exit_code()
        told = unanswered(error)
        if told or self.relayed:
            self._partner_lost(told)
        traceback.print_exception(error)
        last = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
        rank = self.layout.rank
        try:
            self._publish([f"rank {rank} has ended with {last}; workerlog.{self.layout.local_rank} has the traceback"])
            if not self.first:
                self._was_seen()
        except STORE_GONE:
            pass
        end(EXIT_FAILED)

    def _partner_lost(self, told: str) -> None:
        """Ends this process with what another rank has found, or else with what it was told itself."""
        started = time.monotonic()
        try:
            while time.monotonic() - started < TOLD_SECONDS:
                self.heed()
                time.sleep(0.05)
        except UserError as error:
            self.failed(error.faults)
        except STORE_GONE as error:
            self._lost(error)
        self.failed([told])

    def _publish(self, faults: Sequence[str]) -> None:
        if self.store.add("failures", 1) == 1:
            self.store.set("failure", json.dumps(list(faults)))
            self.store.add("failed", 1)

    def _was_seen(self) -> bool:
        started = time.monotonic()
        while time.monotonic() - started < SEEN_SECONDS:
            if self.store.add("seen", 0):
                return True
            time.sleep(0.05)
        return False

    def _say(self, key: str) -> None:
        with suppress(*STORE_GONE):
            self.store.add(key, 1)

    def leave(self, code: int) -> None:
        """Ends this process after its work; rank 0, which serves the store, is the last."""
        keep_own_exit_code()
        self._say("left")
        started = time.monotonic()
        while self.first and self.store.add("left", 0) < self.layout.world and time.monotonic() - started < 60:
            time.sleep(0.02)
        end(code)


def unanswered(error: BaseException) -> str:
    """What to say of an exchange that failed because a rank of it has ended or hangs; "" of any other error.

    Within a backward pass Paddle makes one text of an error and where it came from.
    """
    found = UNANSWERED.search(str(error))
    if found is None:
        return ""
    return (
        f"{found[0].strip()}; one of these ranks has ended or hangs: look at the ends of their workerlog files. "
        "The same command continues from the last checkpoint"
    )


def keep_own_exit_code() -> None:
    """The launcher sends SIGTERM to all when one has ended, and passes on the exit code of the first that failed."""
    signals.handle(signal.SIGTERM, signal.SIG_IGN)


def end(code: int) -> None:
    """Ends the process at once: the libraries' own shutdown would wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def buckets(tensors: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Neighbouring tensors of together at most `size` elements, at least one."""
    bucket: list[Any] = []
    for tensor in tensors:
        if bucket and sum(one.size for one in bucket) + tensor.size > size:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def send_at_once() -> None:
    """Switches Nagle's algorithm off on this process's TCP connections, those of the store among them.

    The store sends a request in several pieces, and the system keeps the second one back until the other side
    confirms the first, after 40 ms.
    """
    for path in Path("/proc/self/fd").glob("*"):  # only Linux has it, and only it waits so long
        with suppress(OSError):  # closed in between
            if not os.readlink(path).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(path.name))) as one:
                if one.type == socket.SOCK_STREAM and one.family in (socket.AF_INET, socket.AF_INET6):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def start(layout: Layout, device: str) -> ProcessGroup:
    """Connects the processes of a run; with one process there is nothing to connect and no Paddle to load.

    Afterwards only rank 0 prints, and a rank that fails ends all of them.
    """
    if layout.world == 1:
        return ProcessGroup(layout)
    kind = device.split(":")[0]
    if kind == "cpu":
        os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
    runtime.use_device(kind)
    from utils.parallel import collectives_cpu

    collectives_cpu.install()
    import paddle.distributed as dist
    from paddle.base import core

    with signals.left_to_system():
        with redirect_stderr(io.StringIO()):  # a list of its flags
            dist.init_parallel_env()
        store = core.create_or_get_global_tcp_store()
        processes = ConnectedGroup(layout, store)
        processes.groups = groups.create(layout)
    send_at_once()  # on the connections of all groups
    errors.ending = processes
    if not processes.first:
        errors.silent = True
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return processes
