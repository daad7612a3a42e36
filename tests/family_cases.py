"""The cases of the common suite: every folder of tests/fixtures with a reference.npz."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from utils.checkpoints import Checkpoint, locate
from utils.checkpoints.load import load_model

FIXTURES = Path(__file__).resolve().parent / "fixtures"
NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/reference.npz"))
TOKENIZERS = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.json")


@dataclass(frozen=True)
class Case:
    """A tiny checkpoint as published, and what an independent implementation computes with it.

    Attributes of `reference`: ids, mask [2, length] with the second row left padded, logits [2, length,
    vocabulary], next_ids [2] and next_logits [2, vocabulary] after them.
    """

    name: str

    @property
    def folder(self) -> Path:
        return FIXTURES / self.name

    @cached_property
    def reference(self) -> dict[str, np.ndarray]:
        return dict(np.load(self.folder / "reference.npz"))

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return locate(self.folder)

    @cached_property
    def model(self) -> Any:
        """In float32 and evaluation mode, shared by all tests; they change nothing in it."""
        return load_model(self.checkpoint, "float32")

    @property
    def rows(self) -> list[np.ndarray]:
        """The ids of each row without padding."""
        found = self.reference
        return [ids[mask == 1] for ids, mask in zip(found["ids"], found["mask"], strict=True)]


@cache
def case(name: str) -> Case:
    return Case(name)


def has_tokenizer(name: str) -> bool:
    return any(path for pattern in TOKENIZERS for path in (FIXTURES / name).glob(pattern))


def hidden_logits(family: Any, model: Any, ids: np.ndarray) -> np.ndarray:
    """Logits [batch, length, vocabulary] of the training forward."""
    import paddle

    with paddle.no_grad():
        hidden = family.forward_hidden(model, {"input_ids": paddle.to_tensor(np.asarray(ids, dtype=np.int64))})
        return family.logits(model, hidden).numpy()


def step_logits(
    family: Any, model: Any, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, cache: Any = None
) -> tuple[np.ndarray, Any]:
    """(logits [batch, vocabulary], cache) of one inference forward."""
    import paddle

    tensors = (paddle.to_tensor(np.ascontiguousarray(values, dtype=np.int64)) for values in (ids, mask, positions))
    with paddle.no_grad():
        logits, cache = family.step(model, *tensors, cache)
    return logits.numpy(), cache


def _one_per_family() -> list[str]:
    """The first case of every family that brings its tokenizer: trained and asked, not only computed."""
    chosen: dict[str, str] = {}
    for name in NAMES:
        if has_tokenizer(name):
            chosen.setdefault(case(name).checkpoint.family.name, name)
    return sorted(chosen.values())


WITH_TOKENIZER = _one_per_family()
