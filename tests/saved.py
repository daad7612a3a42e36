"""Models and adapters of one process into folders, as a training run writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.checkpoints.locate import Checkpoint
from utils.parallel.peers import Alone
from utils.partition.parts import Parts
from utils.partition.tensor import Held
from utils.training.saving import Saver
from utils.training.trained import Lora, Prefix, Trained


def save_trained(folder: Path, trained: Trained) -> None:
    """Writes the result of a training."""
    from contextlib import nullcontext

    folder.mkdir(parents=True, exist_ok=True)
    Saver(Alone()).save(lambda: nullcontext(folder), [trained.piece()], trained.describe)


def held(base: Checkpoint) -> Held:
    """All of a model."""
    return Held(Parts(base.family, base.config), Alone())


def save_lora(folder: Path, adapted: Any, base: Checkpoint) -> None:
    """Writes an adapter's folder."""
    save_trained(folder, Lora(base, held(base), adapted))


def save_prefix(folder: Path, prefix: Any, base: Checkpoint) -> None:
    """Writes a prefix's folder."""
    save_trained(folder, Prefix(base, held(base), prefix))
