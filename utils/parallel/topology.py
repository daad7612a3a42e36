"""The layout of a run: how many processes there are and what each of them does. No Paddle."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, raise_if

if TYPE_CHECKING:
    from utils.model.architecture import ModelShape


def world_size(environment: Mapping[str, str] | None = None) -> int:
    """The number of processes that the launcher started; 1 without a launcher."""
    return int((os.environ if environment is None else environment).get("PADDLE_TRAINERS_NUM") or 1)


@dataclass(frozen=True)
class Layout:
    """How the processes of a run share its work.

    Ranks are numbered as fleet numbers them: tensor-parallel neighbours first, then sharding, pipeline
    stages, and data parallel outermost, so that what talks most lies on one machine.

    Attributes:
        world, rank: processes in all, and the number of this one.
        local_size, local_rank: the same on this machine.
        tensor, pipeline, sharding: processes over which each of them splits a model; 1 for none.
        stage: what sharding splits: 1 the optimizer's state, 2 gradients too, 3 weights too; 0 without it.
        virtual: parts that each pipeline stage has of the layers, see `utils.partition.stages`.
    """

    world: int = 1
    rank: int = 0
    local_size: int = 1
    local_rank: int = 0
    tensor: int = 1
    pipeline: int = 1
    sharding: int = 1
    stage: int = 0
    virtual: int = 1

    @classmethod
    def of(cls, args: Any, environment: Mapping[str, str] | None = None) -> Layout:
        """The layout that the arguments ask for and the launcher has started.

        Raises:
            UserError: degrees that do not divide the number of processes.
        """
        env = os.environ if environment is None else environment
        world = world_size(env)
        tensor, pipeline = max(1, args.tensor_parallel_degree), max(1, args.pipeline_parallel_degree)
        sharding = 1
        if args.sharding and world > 1:  # without a degree it takes what tensor and pipeline leave
            degree = args.sharding_parallel_degree
            sharding = degree if degree > 0 else max(1, world // (tensor * pipeline))
        split = tensor * pipeline * sharding
        if world % split:
            raise UserError(
                f"tensor_parallel_degree {tensor} times pipeline_parallel_degree {pipeline} times "
                f"sharding_parallel_degree {sharding} is {split}, which does not divide the {world} processes"
            )
        return cls(
            world=world,
            rank=int(env.get("PADDLE_TRAINER_ID") or 0),
            local_size=int(env.get("PADDLE_LOCAL_SIZE") or world),
            local_rank=int(env.get("PADDLE_RANK_IN_NODE") or 0),
            tensor=tensor,
            pipeline=pipeline,
            sharding=sharding,
            stage=int(args.sharding[len("stage")]) if sharding > 1 else 0,
            virtual=args.virtual_pp_degree if pipeline > 1 else 1,
        )

    @classmethod
    def of_prediction(cls, environment: Mapping[str, str] | None = None) -> Layout:
        """All processes that the launcher has started share one model, tensor parallel."""
        whole = SimpleNamespace(tensor_parallel_degree=world_size(environment), pipeline_parallel_degree=1, sharding="")
        return cls.of(whole, environment)

    @property
    def data(self) -> int:
        """How many whole models there are, each trained on rows of its own."""
        return self.world // (self.tensor * self.pipeline * self.sharding)

    @property
    def readers(self) -> int:
        """How many different parts of a batch there are: data and sharding groups read their own rows."""
        return self.data * self.sharding

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """(data, pipeline, sharding, tensor) place of a rank."""
        rest, tensor = divmod(rank, self.tensor)
        rest, sharding = divmod(rest, self.sharding)
        data, pipeline = divmod(rest, self.pipeline)
        return data, pipeline, sharding, tensor

    def reader(self, rank: int) -> int:
        """Which part of a batch a rank reads, 0 to `readers` - 1."""
        data, _, sharding, _ = self.coordinates(rank)
        return data * self.sharding + sharding

    @property
    def counts(self) -> bool:
        """Whether this rank's losses and tokens are the ones that count: ranks that share a model have the same."""
        _, pipeline, _, tensor = self.coordinates(self.rank)
        return pipeline == self.pipeline - 1 and tensor == 0

    def global_batch(self, args: Any) -> int:
        """Rows of one update, all ranks and micro-batches together."""
        return int(args.per_device_train_batch_size * args.gradient_accumulation_steps * self.readers)

    # --- checks ------------------------------------------------------------------------------------

    def check_device(self, args: Any) -> None:
        """Refuses a numbered device for several processes.

        Raises:
            UserError: the launcher gives every process a device of its own.
        """
        kind, _, index = args.device.partition(":")
        if self.world > 1 and index:
            raise UserError(
                f"{args.where('device')}: the launcher gives every process a device of its own; write {kind}"
            )

    def check_model(self, shape: ModelShape) -> None:
        """Refuses degrees by which a model cannot be split.

        Raises:
            UserError: names every such degree.
        """
        raise_if(list(self._unfit(shape)))

    def _unfit(self, shape: ModelShape) -> Iterator[str]:
        if shape.heads % self.tensor or shape.intermediate % self.tensor:
            sizes = (shape.heads, shape.intermediate)
            fit = [str(n) for n in range(2, shape.heads + 1) if not any(size % n for size in sizes)]
            advice = f"{' or '.join(fit)} would" if fit else "none above 1 does"
            yield (
                f"tensor_parallel_degree {self.tensor} (in prediction and export, the number of processes) does not "
                f"divide both the model's {shape.heads} attention heads and the {shape.intermediate} columns of its "
                f"MLP; {advice}"
            )
        if self.pipeline * self.virtual > shape.layers:
            times = f" times virtual_pp_degree {self.virtual}" if self.virtual > 1 else ""
            yield f"pipeline_parallel_degree {self.pipeline}{times} is more than the model's {shape.layers} layers"
