"""What a run trains, and how exactly that part is written and read back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.adapters.check import LORA_CONFIG, PREFIX_CONFIG, WEIGHTS
from utils.adapters.lora import describe_lora, restore_lora
from utils.adapters.lora_files import read_lora
from utils.adapters.prefix import PrefixTuning, describe_prefix, restore_prefix
from utils.checkpoints.load import fill_model
from utils.checkpoints.locate import Checkpoint, locate, shard_files
from utils.checkpoints.merge_tp import open_shards
from utils.checkpoints.save import describe_model
from utils.partition.tensor import ShardPlan
from utils.training.saving import CheckpointShard


class Trained(ABC):
    """The trained part of a model: everything (SFT), LoRA layers, or a prefix.

    Attributes:
        shard_plan: what this rank has of it.
    """

    def __init__(self, base: Checkpoint, shard_plan: ShardPlan) -> None:
        self.base, self.shard_plan = base, shard_plan

    @abstractmethod
    def parameters(self) -> Mapping[str, Any]:
        """The trained parameters that this rank has a part of, by the names in files, in their order."""

    @abstractmethod
    def checkpoint_shard(self, *, result: bool = True) -> CheckpointShard:
        """The weights, to be written.

        Args:
            result: of the run; else for a checkpoint of it.
        """

    @abstractmethod
    def describe(self, folder: Path) -> None:
        """Writes the configuration that belongs beside the weights."""

    @abstractmethod
    def restore(self, folder: Path) -> None:
        """Fills the weights from a folder of `checkpoint_shard` and `describe`."""

    def _checkpoint_shard(self, stem: str, **options: Any) -> CheckpointShard:
        tensors = [
            self.shard_plan.whole(name, parameter)
            for name, parameter in self.shard_plan.written(self.parameters()).items()
        ]
        return CheckpointShard(stem, tensors, writes=self.shard_plan.writes, **options)


class FullModel(Trained):
    """All weights of a model.

    Args:
        in_shards: checkpoints of a tensor-parallel run are to hold a shard per rank, which saves joining them.
    """

    def __init__(self, base: Checkpoint, shard_plan: ShardPlan, model: Any, *, in_shards: bool = False) -> None:
        super().__init__(base, shard_plan)
        self.model, self.in_shards = model, in_shards and shard_plan.parts.degree > 1

    def parameters(self) -> Mapping[str, Any]:
        found = dict(self.model.named_parameters())
        names = (weight.parameter for weight in self.base.family.weights(self.base.config))
        return {name: found[name] for name in names if name in found}

    def checkpoint_shard(self, *, result: bool = True) -> CheckpointShard:
        if result or not self.in_shards:
            return self._checkpoint_shard("model")
        layout = self.shard_plan.processes.layout
        _, pipeline, _, tensor = layout.coordinates(layout.rank)
        stage = f"_pp{pipeline:02d}" if layout.pipeline > 1 else ""
        tensors = [self.shard_plan.shard(name, parameter) for name, parameter in self.parameters().items()]
        return CheckpointShard(
            f"model.tp{tensor:02d}{stage}", tensors, writes=layout.reader(layout.rank) == 0, own=True
        )

    def describe(self, folder: Path) -> None:
        dtype = str(max(self.parameters().values(), key=lambda value: value.size).dtype).removeprefix("paddle.")
        # beside shards it says how many there must be: the last ones could be missing unnoticed
        degree = self.shard_plan.parts.degree if shard_files(folder) else 1
        describe_model(folder, self.base.family, self.base.config, "paddle", dtype, tensor_parallel_degree=degree)

    def restore(self, folder: Path) -> None:
        if shard_files(folder):
            shards = open_shards(folder)
            sources = {weight.parameter: tensor for weight, tensor in shards.tensors}
            fill_model(self.model, shards.checkpoint, sources, shard_plan=self.shard_plan)
        else:
            fill_model(self.model, locate(folder, allow_network=False), shard_plan=self.shard_plan)


class Lora(Trained):
    def __init__(self, base: Checkpoint, shard_plan: ShardPlan, adapted: Any) -> None:
        super().__init__(base, shard_plan)
        self.adapted = adapted

    def parameters(self) -> Mapping[str, Any]:
        return {name: value for name, value in self.adapted.model.named_parameters() if not value.stop_gradient}

    def checkpoint_shard(self, *, result: bool = True) -> CheckpointShard:
        return self._checkpoint_shard(WEIGHTS[LORA_CONFIG], single=True)

    def describe(self, folder: Path) -> None:
        describe_lora(folder, self.adapted, self.base)

    def restore(self, folder: Path) -> None:
        restore_lora(self.adapted, read_lora(folder, self.base), self.shard_plan)


class Prefix(Trained):
    def __init__(self, base: Checkpoint, shard_plan: ShardPlan, prefix: PrefixTuning) -> None:
        super().__init__(base, shard_plan)
        self.prefix = prefix

    def parameters(self) -> Mapping[str, Any]:
        return dict(self.prefix.encoder.named_parameters())

    def checkpoint_shard(self, *, result: bool = True) -> CheckpointShard:
        return self._checkpoint_shard(WEIGHTS[PREFIX_CONFIG], single=True)

    def describe(self, folder: Path) -> None:
        describe_prefix(folder, self.prefix, self.base)

    def restore(self, folder: Path) -> None:
        restore_prefix(self.prefix, folder)
