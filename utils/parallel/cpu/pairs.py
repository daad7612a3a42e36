"""Connections of two ranks for what one sends to another."""

from __future__ import annotations

from typing import Any

FIRST_NUMBER = 1 << 20  # above the numbers that Paddle gives to groups
_pairs: dict[int, Any] = {}


def group_of(process_group: Any) -> Any:
    """The Paddle Group of a process group, or None."""
    from paddle.distributed.communication.group import _GroupManager

    for group in _GroupManager.group_map_by_id.values():
        if group.process_group is process_group:
            return group
    return None


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

    rank, size = process_group.rank(), process_group.size()
    low, high = sorted((rank, peer))
    number = FIRST_NUMBER + (group_of(process_group).id * size + low) * size + high  # the same for both
    if number not in _pairs:
        shared = core.create_or_get_global_tcp_store()
        _pairs[number] = core.ProcessGroupGloo.create(shared, int(rank == high), 2, number)
    return _pairs[number], int(peer == high)
