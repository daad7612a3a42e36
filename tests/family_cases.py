"""The cases of the common suite, every folder of tests/fixtures with a reference.npz, and all engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from utils.adapters.prefix import PrefixTuning
from utils.checkpoints import Checkpoint, locate
from utils.checkpoints.load import load_model
from utils.families import Layers
from utils.families.text import places
from utils.inference.eager import EagerEngine
from utils.inference.engine import Engine, Prefix

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


def random_prefix(checkpoint: Checkpoint, length: int = 5) -> PrefixTuning:
    """A prefix that moves every logit."""
    import paddle

    paddle.seed(3)
    prefix = PrefixTuning(checkpoint.family, checkpoint.family.shape(checkpoint.config), length)
    prefix.encoder[0].weight.set_value(paddle.normal(0.0, 0.5, prefix.encoder[0].weight.shape))
    return prefix


def hidden_logits(family: Any, model: Any, ids: np.ndarray, prefix: PrefixTuning | None = None) -> np.ndarray:
    """Logits [batch, length, vocabulary] of the training forward."""
    import paddle

    batch = {"input_ids": paddle.to_tensor(np.asarray(ids, dtype=np.int64))}
    with paddle.no_grad():
        hidden = family.forward_hidden(model, batch, None if prefix is None else prefix.cache(len(ids)))
        return family.logits(model, hidden).numpy()


def placed_logits(
    family: Any, model: Any, ids: Sequence[int], positions: Sequence[int], cache: Layers | None = None
) -> tuple[np.ndarray, Layers]:
    """(logits [length, vocabulary], cache) of one causal text whose tokens stand at positions of one's choice.

    They see all of the cache, which comes before them.
    """
    import paddle

    cached = 0 if cache is None else cache[0][0].shape[1]
    keys = np.arange(cached + len(ids))[None]
    standing = np.array(positions)[None, None]
    known = places(standing, keys[:, cached:], keys, np.zeros(1, np.int64), np.ones(1, np.float32), None)
    with paddle.no_grad():
        hidden, cache = family.decode(model, paddle.to_tensor([list(ids)], dtype="int64"), known, cache)
        return family.logits(model, hidden).numpy()[0], cache


# --- engines ------------------------------------------------------------------------------------------


def eager(case: Case, prefix: Prefix | None = None) -> Engine:
    return EagerEngine(case.checkpoint.family, case.model, case.checkpoint.config, prefix=prefix)


# Makes an engine in float32, behind a prefix if there is one: maker(case, prefix=None).
Maker = Callable[..., Engine]
ENGINES: dict[str, Maker] = {"eager": eager}


def _one_per_family() -> list[str]:
    """The first case of every family that brings its tokenizer: trained and asked, not only computed."""
    chosen: dict[str, str] = {}
    for name in NAMES:
        if has_tokenizer(name):
            chosen.setdefault(case(name).checkpoint.family.name, name)
    return sorted(chosen.values())


WITH_TOKENIZER = _one_per_family()
