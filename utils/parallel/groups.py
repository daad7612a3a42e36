"""The groups of ranks within a hybrid layout, and the random numbers that their ranks share. Paddle loads when used."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any

from utils.parallel.topology import Layout

# outermost first: fleet's ranks are then those of Layout.coordinates; it wants "sep" named, of 1 rank here
ORDER = ["dp", "pp", "sharding", "sep", "mp"]


@dataclass(frozen=True)
class Groups:
    """This rank's groups, each a Paddle Group, or None where it would have one rank.

    Attributes:
        tensor: ranks that hold parts of the same layers.
        pipeline: stages of one model, in their order.
        ends: the first and the last of them.
        sharding: ranks that share the optimizer's state, and perhaps gradients and parameters.
        data: ranks with the same part of a model in different copies of it.
        readers: ranks with the same part of a model and different rows: sharding and data together. Gradients
            are summed over it. With data parallel alone it is the group of all ranks, as is `data`.
    """

    tensor: Any = None
    pipeline: Any = None
    ends: Any = None
    sharding: Any = None
    data: Any = None
    readers: Any = None


def create(layout: Layout) -> Groups:
    """The groups of this rank, after `init_parallel_env`; all ranks must come.

    Fleet makes those of tensor, pipeline and sharded parallel; data parallel alone needs none but the default.
    """
    if layout.tensor * layout.pipeline * layout.sharding == 1:
        from paddle.distributed.collective import _get_default_group

        everyone = _get_default_group() if layout.world > 1 else None
        return Groups(data=everyone, readers=everyone)
    from paddle.distributed import fleet

    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {
        "dp_degree": layout.data,
        "pp_degree": layout.pipeline,
        "sharding_degree": layout.sharding,
        "mp_degree": layout.tensor,
        "order": ORDER,
    }
    with redirect_stderr(io.StringIO()):
        fleet.init(is_collective=True, strategy=strategy, log_level="ERROR")
    hybrid = fleet.get_hybrid_communicate_group()
    data = hybrid.get_data_parallel_group() if layout.data > 1 else None
    sharding = hybrid.get_sharding_parallel_group() if layout.sharding > 1 else None
    pipeline = hybrid.get_pipe_parallel_group() if layout.pipeline > 1 else None
    return Groups(
        tensor=hybrid.get_model_parallel_group() if layout.tensor > 1 else None,
        pipeline=pipeline,
        ends=_ends(layout) if layout.pipeline > 2 else pipeline,
        sharding=sharding,
        data=data,
        readers=_readers(layout) if data and sharding else data or sharding,
    )


def _readers(layout: Layout) -> Any:
    """The group of data and sharding together, which fleet does not make."""
    return _group_by(layout, range(layout.world), lambda place: (place[1], place[3]))


def _ends(layout: Layout) -> Any:
    """The group of the first and the last stage; None on the others."""
    ends = (0, layout.pipeline - 1)
    ranks = [rank for rank in range(layout.world) if layout.coordinates(rank)[1] in ends]
    return _group_by(layout, ranks, lambda place: (place[0], place[2], place[3]))


def _group_by(layout: Layout, ranks: Iterable[int], key: Callable[[tuple[int, int, int, int]], Any]) -> Any:
    """This rank's group among those of ranks whose coordinates have the same key; None if it is in none."""
    import paddle.distributed as dist

    members: dict[Any, list[int]] = {}
    for rank in ranks:
        members.setdefault(key(layout.coordinates(rank)), []).append(rank)
    groups = [dist.new_group(one) for one in members.values()]  # every rank makes every group, in the same order
    mine = (group for group, one in zip(groups, members.values(), strict=True) if layout.rank in one)
    return next(mine, None)


def seed_everything(seed: int, layout: Layout) -> None:
    """Seeds Python, numpy and Paddle so that dropout fits the layout.

    - Readers of different rows and pipeline stages draw different numbers.
    - Ranks of one tensor parallel group draw the same numbers where each has the whole activation: Paddle's
      default generator, and "global_seed" of fleet's tracker.
    - They draw different ones where each has its part: "local_seed", and "model_parallel_rng" in which fleet's
      layers draw new weights.

    With data parallel alone the default generator of rank r starts with `seed` + r.
    """
    import numpy as np
    import paddle

    _, stage, _, part = layout.coordinates(layout.rank)
    place, places = layout.reader(layout.rank) * layout.pipeline + stage, layout.readers * layout.pipeline
    split = place * layout.tensor + part
    random.seed(seed + place)
    np.random.seed((seed + place) % 2**32)
    paddle.seed(seed + place)
    if layout.tensor * layout.pipeline * layout.sharding == 1:
        return
    from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker

    tracker = get_rng_state_tracker()
    tracker.reset()
    first = seed + places  # seeds of a tracker must differ: one range for each name
    tracker.add("global_seed", first + place)
    tracker.add("local_seed", first + places + split)
    tracker.add("model_parallel_rng", first + places + layout.world + split)


_rings: set[int] = set()  # that `open_ring` has opened


def open_ring(group: Any, number: int) -> None:
    """Connects the ranks of a group for the exchanges inside of programs; all must come.

    Args:
        number: of the group when the programs were traced.
    """
    import paddle
    from paddle.base import core

    from utils.parallel.cpu.stores import own_store

    gpu = paddle.is_compiled_with_cuda()
    if number in _rings or (number == group.id and not gpu):  # Paddle connects gloo groups for programs too
        return
    _rings.add(number)
    store, contexts, key = core.create_or_get_global_tcp_store(), core.CommContextManager, str(number)
    if not gpu:
        store = own_store(store, f"ring {number}", group.rank == 0)
        contexts.create_gloo_comm_context(store, key, group.rank, group.nranks)
        return
    create: Any = getattr(contexts, "create_nccl_comm_context")  # noqa: B009 - builds for CPUs have none
    contexts.set_device_id(paddle.distributed.ParallelEnv().device_id)
    create(store, key, group.rank, group.nranks, f"ring {number}")
