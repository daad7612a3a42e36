"""Connections of two ranks for what one sends to another."""

from __future__ import annotations

import time
from typing import Any

from utils import errors

FIRST_NUMBER = 1 << 20  # above the numbers that Paddle gives to groups
WAIT_SECONDS = 1800.0
_pairs: dict[int, Any] = {}


def group_of(process_group: Any) -> Any:
    """The Paddle Group of a process group, or None."""
    from paddle.distributed.communication.group import _GroupManager

    for group in _GroupManager.group_map_by_id.values():
        if group.process_group is process_group:
            return group
    return None


def number_of(process_group: Any, peer: int) -> int:
    """The same number for this rank with `peer` as for `peer` with this rank, and for no other two of any group."""
    rank, size = process_group.rank(), process_group.size()
    return FIRST_NUMBER + (group_of(process_group).id * size + min(rank, peer)) * size + max(rank, peer)


def pair(process_group: Any, peer: int) -> tuple[Any, int]:
    """Where to reach a rank of a group: (process group, its rank there).

    Paddle's gloo groups number their exchanges, every rank by itself, and a message arrives only under its
    number. In a group of more than two, the stages of a pipeline for one, ranks send and receive different
    numbers of messages; from then on nothing in that group arrives any more. So each two ranks of it have a
    connection of their own, made when both first use it.
    """
    if process_group.size() == 2:
        return process_group, peer
    from paddle.base import core

    rank, number = process_group.rank(), number_of(process_group, peer)
    if number not in _pairs:
        shared = core.create_or_get_global_tcp_store()
        _pairs[number] = core.ProcessGroupGloo.create(shared, int(rank > peer), 2, number)
    return _pairs[number], int(peer > rank)


def meet(process_group: Any, peer: int) -> None:
    """Waits until a rank of the group is about to exchange with this one.

    gloo would give up after 30 s, but the last stage of a pipeline waits for all stages before it. Here the
    wait is a count in the store of all ranks; of the ranks that have failed it hears as `ConnectedGroup.barrier` does.

    Raises:
        RuntimeError: the other rank did not come within half an hour.
        UserError: a rank has failed.
    """
    from paddle.base import core

    store, number = core.create_or_get_global_tcp_store(), number_of(process_group, peer)
    mine = store.add(f"met/{number}/{process_group.rank()}", 1)
    started = time.monotonic()
    while store.add(f"met/{number}/{peer}", 0) < mine:
        waited = time.monotonic() - started
        if waited > WAIT_SECONDS:
            raise RuntimeError(f"it did not come within {WAIT_SECONDS:.0f} s")
        if waited > 0.05 and errors.ending is not None:
            errors.ending.heed()
        time.sleep(min(max(waited / 8, 0.00005), 0.1))
