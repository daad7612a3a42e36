"""Sharded training (ZeRO) by fleet's classes: the ranks of a group share optimizer state, gradients, weights.

Stage 1 is `DygraphShardingOptimizer`: each parameter's state lies on one rank, which updates the parameter and
sends it to the others. Stage 2 is `GroupShardedOptimizerStage2` with `GroupShardedStage2`: the same for gradients,
which are summed onto their rank during the backward pass. Stage 3 is `GroupShardedStage3`, in `utils.parallel.zero3`:
every rank keeps a slice of every parameter.

Fleet averages gradients over the group and works out norms by itself. Here they are sums, and whoever trains scales
and clips what the `Share` that `wrap` returns has of them; nothing else needs to know how a run is sharded.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor, nn

from utils.parallel.states import OptimizerStates, host


@dataclass(frozen=True)
class Accumulator:
    """One tensor of the optimizer's state, as a run on one process has it.

    Attributes:
        parameter: its name in the model.
        name: as in optimizer files: "moment1_0", "fp32_master_0_moment1_0", "master", ...
        shape: of the whole tensor.
    """

    parameter: str
    name: str
    shape: tuple[int, ...]


class Share(ABC):
    """What this rank has of the model's training, and how it gets at the rest.

    `exchange`, `whole` and `read` exchange tensors: every rank of the group calls them, in the same order. Names are
    those of `model.named_parameters()`; a tied parameter has one.

    Attributes:
        stage: 1, 2 or 3.
        group: the sharding group.
        rank: of this process in `group`.
        trained: parameters that are trained.
    """

    stage: int

    def __init__(self, model: nn.Layer, optimizer: Any, group: Any) -> None:
        self.group = group
        self.rank: int = group.rank
        self.trained: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if not p.stop_gradient}
        self.states = OptimizerStates(optimizer)
        # fleet divides all parameters among the ranks: frozen ones would leave some with nothing to train
        optimizer._parameter_list = optimizer._param_groups = self._order()

    def _order(self) -> list[Tensor]:
        """The trained parameters in the order in which fleet gives each to the rank that has least.

        The largest come first, which divides most evenly; before them those that several pipeline stages have, so
        that they have the same owner on all of these.
        """

        def place(parameter: Tensor) -> tuple[bool, bool, int]:
            over = getattr(parameter, "summed_over", ())
            return "pipeline" not in over, "ends" not in over, -parameter.size

        return sorted(self.trained.values(), key=place)

    # --- gradients -----------------------------------------------------------------------------------

    @abstractmethod
    def exchange(self) -> None:
        """Once a step, after the last backward pass: makes the gradients of this rank's share sums over the
        group. Those of other shares have no meaning afterwards."""

    @abstractmethod
    def owned(self) -> list[tuple[Tensor, Tensor]]:
        """(parameter of the model, gradient of this rank's share of it): what the optimizer will read.

        All of them have to be scaled and clipped, and added up over copies of the model. Each element counts on
        one rank of the group, but that parameters which are whole on every rank (stage 3) carry the mark
        `counted` = False on all ranks but the first.
        """

    # --- weights -------------------------------------------------------------------------------------

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A block in which all weights are whole on every rank, and may be replaced; ranks need no other
        in there to run the model."""
        yield

    def take_weights(self) -> None:
        """Makes the optimizer's float32 copies those of the model's weights, after these were replaced."""
        for name in self.trained:
            if (kept := self._kept(name)) is not None:
                self.states.take_weights(*kept)

    # --- the optimizer's state -----------------------------------------------------------------------

    def accumulators(self) -> list[Accumulator]:
        """All of the state, of every rank, in the same order on every rank."""
        return [
            Accumulator(name, accumulator, (1,) if "pow" in accumulator else tuple(parameter.shape))
            for name, parameter in self.trained.items()
            for accumulator in self.states.accumulators(parameter.dtype)
        ]

    @abstractmethod
    def _kept(self, name: str) -> tuple[str, Tensor] | None:
        """(fleet's name of this rank's share of a parameter, the share itself), None without a share."""

    @abstractmethod
    def read(self, accumulator: Accumulator) -> np.ndarray:
        """The whole tensor, on every rank of the group."""

    @abstractmethod
    def write(self, accumulator: Accumulator, value: np.ndarray) -> None:
        """Takes this rank's share from a whole tensor; nothing where it has none."""


class _ByParameter(Share):
    """Stages 1 and 2: each parameter belongs to one rank."""

    owner: Mapping[str, int]  # fleet's name of a parameter -> rank in the group

    def owned(self) -> list[tuple[Tensor, Tensor]]:
        return [(p, p.grad) for p in self.trained.values() if self.owner[p.name] == self.rank and p.grad is not None]

    def _kept(self, name: str) -> tuple[str, Tensor] | None:
        parameter = self.trained[name]
        return (parameter.name, parameter) if self.owner[parameter.name] == self.rank else None

    def read(self, accumulator: Accumulator) -> np.ndarray:
        kept = self._kept(accumulator.parameter)
        if kept is None:
            value = paddle.zeros(accumulator.shape, dtype="float32")
        else:
            value = paddle.to_tensor(host(self.states.get(*kept, accumulator.name)))  # some lie on the host
        dist.broadcast(value, self.group.ranks[self.owner[self.trained[accumulator.parameter].name]], self.group)
        return host(value)

    def write(self, accumulator: Accumulator, value: np.ndarray) -> None:
        kept = self._kept(accumulator.parameter)
        if kept is not None:
            self.states.set(*kept, accumulator.name, value)


class StateShare(_ByParameter):
    """Stage 1: the optimizer's state is divided; gradients are whole until they are exchanged."""

    stage = 1

    def __init__(self, model: nn.Layer, optimizer: Any, group: Any) -> None:
        from paddle.distributed import fleet
        from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer import DygraphShardingOptimizer

        super().__init__(model, optimizer, group)
        if fleet.fleet._user_defined_strategy is None:  # it reads how to fuse from there, even if not at all
            fleet.fleet._user_defined_strategy = fleet.DistributedStrategy()
        self.hybrid = _Hybrid(group)
        with _environment(FLAGS_sharding_sort_parameters="0"):  # they are sorted
            self.optimizer = DygraphShardingOptimizer(optimizer, self.hybrid)
        self.owner = self.optimizer._param2rank

    @paddle.no_grad()
    def exchange(self) -> None:
        # parameters without a gradient would get one of zeros and decay
        reached = [parameter for parameter in self.trained.values() if parameter.grad is not None]
        self.optimizer.reduce_gradients(reached, self.hybrid)  # means
        for parameter in reached:
            own = self.owner[parameter.name] == self.rank
            parameter.grad.scale_(float(self.group.nranks) if own else 0.0)
            if not own:
                parameter.grad.zero_()  # 0 times an infinity is none


@dataclass(frozen=True)
class _Hybrid:
    """As much of fleet's groups as stage 1 asks for."""

    group: Any

    def get_sharding_parallel_group(self) -> Any:
        return self.group

    def get_sharding_parallel_world_size(self) -> int:
        return int(self.group.nranks)

    def get_sharding_parallel_rank(self) -> int:
        return int(self.group.rank)


class GradientShare(_ByParameter):
    """Stage 2: optimizer state and gradients are divided.

    Fleet sums a gradient onto its owner as soon as the backward pass has it, and frees it on all others. The owner
    adds the next micro-batch's own part to the sum, and the exchange adds the others' parts: exact.
    """

    stage = 2

    def __init__(self, model: nn.Layer, optimizer: Any, group: Any) -> None:
        from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_optimizer_stage2 import (
            GroupShardedOptimizerStage2,
        )
        from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_stage2 import GroupShardedStage2

        super().__init__(model, optimizer, group)
        common = {"group": group, "device": device_kind()}
        self.optimizer = GroupShardedOptimizerStage2(
            optimizer._parameter_list, optimizer, pretrain_sync_models=False, **common
        )
        # Without a buffer (0) each gradient is exchanged by itself. In buffers they would wait for all their
        # neighbours, also for one that no loss reaches, and keep the memory of other ranks' gradients.
        self.fleet = GroupShardedStage2(model, self.optimizer, buffer_max_size=0, **common)
        self.fleet._world_size_scaling = 1.0  # sums
        # The wrapper's `forward` would only prepare these hooks, and count exchanges so that there is one per
        # forward pass. Pipelines have several under way, and a parameter inside and outside of a recomputed
        # block has several exchanges, each of what has been added since the one before.
        self.fleet._fresh_trainable()
        self.fleet._grad_reduced = _Always()
        self.owner = self.optimizer.param2rank

    @paddle.no_grad()
    def exchange(self) -> None:
        for name, parameter in self.trained.items():
            if self.owner[parameter.name] != self.rank and parameter.grad is not None:
                raise RuntimeError(f"the gradient of {name} has not been sent to its rank")


class _Always:
    """In the place of stage 2's list of gradients that may be exchanged: every one, at any time."""

    def __getitem__(self, index: int) -> bool:
        return True

    def __setitem__(self, index: int, value: bool) -> None:
        pass

    def __iter__(self) -> Iterator[bool]:
        return iter(())


def wrap(
    model: nn.Layer,
    optimizer: Any,
    stage: int,
    group: Any,
    *,
    borrowed: Mapping[nn.Layer, Sequence[Tensor]] | None = None,
) -> tuple[Any, Share]:
    """Divides a model's training among the ranks of a group; returns (the optimizer to call, the share).

    The model is the same object afterwards, with the same names; its forward and backward passes do what the stage
    needs by themselves. Its weights must be alike on all ranks, of the type in which they are trained (after
    `paddle.amp.decorate`), and filled: float32 copies are made of them now (see `Share.take_weights`).

    Args:
        optimizer: AdamW that has not stepped yet, without clipping.
        stage: 1, 2 or 3.
        group: the sharding group, of several ranks.
        borrowed: stage 3: parameters that a layer's forward pass reads and that belong to other layers.
    """
    if optimizer._grad_clip is not None:
        raise ValueError("a sharded optimizer sees parts of the gradients: clip before it")
    share: Share
    if stage == 1:
        share = StateShare(model, optimizer, group)
        return share.optimizer, share
    if stage == 2:
        share = GradientShare(model, optimizer, group)
        return share.optimizer, share
    from utils.parallel.zero3 import Zero3

    share = Zero3(model, optimizer, group, borrowed or {})
    return share.optimizer, share


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def device_kind() -> str:
    """ "cpu", "gpu", ...: how fleet calls the device of this process."""
    return paddle.device.get_device().split(":")[0]
