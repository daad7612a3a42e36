"""What a run trains, and how exactly that part is written and read back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from utils.adapters.lora import restore_lora, save_lora
from utils.adapters.prefix import PrefixTuning, restore_prefix, save_prefix
from utils.checkpoints.load import fill_model
from utils.checkpoints.locate import Checkpoint, locate
from utils.checkpoints.save import save_model


class Trained(ABC):
    """The trained part of a model: everything (SFT), LoRA layers, or a prefix."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the weights and their configuration into an existing folder."""

    @abstractmethod
    def restore(self, folder: Path) -> None:
        """Fills the weights from what `save` wrote."""


class FullModel(Trained):
    def __init__(self, base: Checkpoint, model: Any) -> None:
        super().__init__(base)
        self.model = model

    def save(self, folder: Path) -> None:
        save_model(folder, self.model, self.base.family, self.base.config)

    def restore(self, folder: Path) -> None:
        fill_model(self.model, locate(folder, allow_network=False))


class Lora(Trained):
    def __init__(self, base: Checkpoint, adapted: Any) -> None:
        super().__init__(base)
        self.adapted = adapted

    def save(self, folder: Path) -> None:
        save_lora(folder, self.adapted, self.base)

    def restore(self, folder: Path) -> None:
        restore_lora(self.adapted, folder)


class Prefix(Trained):
    def __init__(self, base: Checkpoint, prefix: PrefixTuning) -> None:
        super().__init__(base)
        self.prefix = prefix

    def save(self, folder: Path) -> None:
        save_prefix(folder, self.prefix, self.base)

    def restore(self, folder: Path) -> None:
        restore_prefix(self.prefix, folder)
