"""What fleet needs and Paddle's CPU build over gloo lacks; nothing here acts on a build for GPUs.

`install` runs before the parallel environment starts. Each kind of parallelism that needs more than a
plain all-reduce among all ranks adds one function to `PARTS`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

STORE_SECONDS = 900
_stores: list[Any] = []  # kept alive: a group's connections are made through its store
_installed = False


def install() -> bool:
    """Adds every missing part, once per process; returns whether this build needed any."""
    global _installed
    import paddle

    if paddle.is_compiled_with_cuda() or paddle.is_compiled_with_xpu():
        return False
    if not _installed:
        for part in PARTS:
            part()
        _installed = True
    return True


def _private_stores() -> None:
    """Gives every group but the first a store of its own.

    Paddle connects the gloo ranks of a group through the keys "0", "1", ... of the one store that all
    groups share, so that groups overwrite each other's addresses (with more than 2 processes:
    "connection refused", or the wrong partner). Rank 0 of a group serves its store at the address by
    which the launcher knows its machine, so groups may span machines.
    """
    from paddle.base import core

    create = core.ProcessGroupGloo.create

    def create_with_own_store(store: Any, rank: int, size: int, group: int = 0) -> Any:
        if not group:
            return create(store, rank, size, group)
        key = f"store of group {group}"
        if rank == 0:
            host, port = own_host(), free_port()
            own = core.TCPStore(host, port, True, 1, STORE_SECONDS)
            store.set(key, f"{host}:{port}")
        else:
            host, _, port_text = bytes(store.get(key)).decode().rpartition(":")
            own = core.TCPStore(host, int(port_text), False, 1, STORE_SECONDS)
        _stores.append(own)
        return create(own, rank, size, group)

    setattr(core.ProcessGroupGloo, "create", staticmethod(create_with_own_store))  # noqa: B010


def own_host() -> str:
    """The address of this machine as the other ranks know it."""
    return os.environ.get("PADDLE_CURRENT_ENDPOINT", "127.0.0.1:0").rpartition(":")[0] or "127.0.0.1"


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


PARTS: tuple[Callable[[], None], ...] = (_private_stores,)
