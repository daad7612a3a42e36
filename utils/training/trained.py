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
from utils.partition.tensor import Held
from utils.training.saving import Piece


class Trained(ABC):
    """The trained part of a model: everything (SFT), LoRA layers, or a prefix.

    Attributes:
        held: what this rank has of it.
    """

    def __init__(self, base: Checkpoint, held: Held) -> None:
        self.base, self.held = base, held

    @abstractmethod
    def parameters(self) -> Mapping[str, Any]:
        """The trained parameters that this rank has a part of, by the names in files, in their order."""

    @abstractmethod
    def piece(self, *, result: bool = True) -> Piece:
        """The weights, to be written.

        Args:
            result: of the run; else for a checkpoint of it.
        """

    @abstractmethod
    def describe(self, folder: Path) -> None:
        """Writes the configuration that belongs beside the weights."""

    @abstractmethod
    def restore(self, folder: Path) -> None:
        """Fills the weights from a folder of `piece` and `describe`."""

    def _piece(self, stem: str, **options: Any) -> Piece:
        tensors = [self.held.whole(name, parameter) for name, parameter in self.held.written(self.parameters()).items()]
        return Piece(stem, tensors, writes=self.held.writes, **options)


class FullModel(Trained):
    """All weights of a model.

    Args:
        in_shards: checkpoints of a tensor-parallel run are to hold a shard per rank, which saves joining them.
    """

    def __init__(self, base: Checkpoint, held: Held, model: Any, *, in_shards: bool = False) -> None:
        super().__init__(base, held)
        self.model, self.in_shards = model, in_shards and held.parts.degree > 1

    def parameters(self) -> Mapping[str, Any]:
        found = dict(self.model.named_parameters())
        names = (weight.parameter for weight in self.base.family.weights(self.base.config))
        return {name: found[name] for name in names if name in found}

    def piece(self, *, result: bool = True) -> Piece:
        if result or not self.in_shards:
            return self._piece("model")
        layout = self.held.peers.layout
        _, pipeline, _, tensor = layout.coordinates(layout.rank)
        stage = f"_pp{pipeline:02d}" if layout.pipeline > 1 else ""
        tensors = [self.held.shard(name, parameter) for name, parameter in self.parameters().items()]
        return Piece(f"model.tp{tensor:02d}{stage}", tensors, writes=layout.reader(layout.rank) == 0, own=True)

    def describe(self, folder: Path) -> None:
        dtype = str(max(self.parameters().values(), key=lambda value: value.size).dtype).removeprefix("paddle.")
        # beside shards it says how many there must be: the last ones could be missing unnoticed
        degree = self.held.parts.degree if shard_files(folder) else 1
        describe_model(folder, self.base.family, self.base.config, "paddle", dtype, tensor_parallel_degree=degree)

    def restore(self, folder: Path) -> None:
        if shard_files(folder):
            shards = open_shards(folder)
            sources = {weight.parameter: tensor for weight, tensor in shards.tensors}
            fill_model(self.model, shards.checkpoint, sources, held=self.held)
        else:
            fill_model(self.model, locate(folder, allow_network=False), held=self.held)


class Lora(Trained):
    def __init__(self, base: Checkpoint, held: Held, adapted: Any) -> None:
        super().__init__(base, held)
        self.adapted = adapted

    def parameters(self) -> Mapping[str, Any]:
        return {name: value for name, value in self.adapted.model.named_parameters() if not value.stop_gradient}

    def piece(self, *, result: bool = True) -> Piece:
        return self._piece(WEIGHTS[LORA_CONFIG], single=True)

    def describe(self, folder: Path) -> None:
        describe_lora(folder, self.adapted, self.base)

    def restore(self, folder: Path) -> None:
        restore_lora(self.adapted, read_lora(folder, self.base), self.held)


class Prefix(Trained):
    def __init__(self, base: Checkpoint, held: Held, prefix: PrefixTuning) -> None:
        super().__init__(base, held)
        self.prefix = prefix

    def parameters(self) -> Mapping[str, Any]:
        return dict(self.prefix.encoder.named_parameters())

    def piece(self, *, result: bool = True) -> Piece:
        return self._piece(WEIGHTS[PREFIX_CONFIG], single=True)

    def describe(self, folder: Path) -> None:
        describe_prefix(folder, self.prefix, self.base)

    def restore(self, folder: Path) -> None:
        restore_prefix(self.prefix, folder)
