"""A store of its own for every group of ranks."""

from __future__ import annotations

import os
import socket
from typing import Any

STORE_SECONDS = 900
_stores: list[Any] = []  # kept alive: a group's connections are made through its store


def private_stores() -> None:
    """Gives every group but the first a store of its own.

    Paddle connects the gloo ranks of a group through the keys "0", "1", ... of the one store that all
    groups share, so that groups overwrite each other's addresses (with more than 2 processes:
    "connection refused", or the wrong partner). Rank 0 of a group serves its store at the address by
    which the launcher knows its machine, so groups may span machines.
    """
    from paddle.base import core

    create = core.ProcessGroupGloo.create

    def create_with_own_store(store: Any, rank: int, size: int, group: int = 0) -> Any:
        return create(own_store(store, f"group {group}", rank == 0) if group else store, rank, size, group)

    setattr(core.ProcessGroupGloo, "create", staticmethod(create_with_own_store))  # noqa: B010


def own_store(shared: Any, name: str, serves: bool) -> Any:
    """A store for the few ranks that ask for this name.

    Args:
        shared: the store of all ranks, by which these find each other.
        serves: whether this rank serves the store; one of them does.
    """
    from paddle.base import core

    key = f"store of {name}"
    if serves:
        host, port = own_host(), free_port()
        own = core.TCPStore(host, port, True, 1, STORE_SECONDS)
        shared.set(key, f"{host}:{port}")
    else:
        host, _, port_text = bytes(shared.get(key)).decode().rpartition(":")
        own = core.TCPStore(host, int(port_text), False, 1, STORE_SECONDS)
    _stores.append(own)
    return own


def own_host() -> str:
    """The address of this machine as the other ranks know it."""
    return os.environ.get("PADDLE_CURRENT_ENDPOINT", "127.0.0.1:0").rpartition(":")[0] or "127.0.0.1"


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
