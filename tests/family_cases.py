"""The cases of the common suite, every folder of tests/fixtures with a reference.npz, and all engines."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from utils.adapters.prefix import PrefixTuning
from utils.checkpoints import Checkpoint, locate
from utils.checkpoints.load import load_model
from utils.inference.cached import CachedEngine, DynamicProgram, Program
from utils.inference.engine import Engine
from utils.inference.export import save_program
from utils.inference.loading import Prepared, load_program
from utils.inference.manifest import FORMAT, Manifest, paddle_version
from utils.inference.static import StaticProgram
from utils.parallel.process_group import ProcessGroup
from utils.training.answers import engine_over

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


def hidden_logits(
    family: Any,
    model: Any,
    ids: np.ndarray,
    prefix: PrefixTuning | None = None,
    positions: Sequence[int] | None = None,
) -> np.ndarray:
    """Logits [batch, length, vocabulary] of the training forward; the tokens may stand at positions of one's choice."""
    import paddle

    batch = {"input_ids": paddle.to_tensor(np.asarray(ids, dtype=np.int64))}
    if positions is not None:
        batch["position_ids"] = paddle.to_tensor(np.array([positions]))
    with paddle.no_grad():
        hidden = model.hidden(batch, None if prefix is None else prefix.cache(len(ids)))
        return model.logits(hidden).numpy()


# --- engines ------------------------------------------------------------------------------------------


def plain_engine(checkpoint: Checkpoint, model: Any, prefix: PrefixTuning | None = None) -> CachedEngine:
    """Over a model that is there already."""
    return engine_over(checkpoint.family, model, checkpoint.config, ProcessGroup(), prefix=prefix)


def plain(case: Case, prefix: PrefixTuning | None = None) -> CachedEngine:
    return plain_engine(case.checkpoint, case.model, prefix)


@cache
def step_layer(name: str, inference_model: bool) -> Any:
    """One step of a case's model, fused or plain."""
    return load_program(_prepared(name, inference_model), "cpu")[0]


@cache
def exported(name: str, inference_model: bool) -> StaticProgram:
    """The same as a static program; exported once per session, for all batches and lengths."""
    layer = step_layer(name, inference_model)
    folder = Path(_exports().name) / f"{name}-{inference_model}"
    folder.mkdir()
    save_program(layer, folder, "float32")
    about = (layer.inputs, layer.architecture.position_parts, layer.cache_shape)
    manifest = Manifest(FORMAT, paddle_version(), inference_model, "float32", *about, 0, name, {})
    return StaticProgram(folder, manifest, "cpu")


@cache
def _exports() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def _prepared(name: str, inference_model: bool) -> Prepared:
    # without a tokenizer: most cases have none, and no program needs one
    return Prepared(case(name).checkpoint, None, None, "float32", inference_model=inference_model)  # type: ignore[arg-type]


def cached(
    case: Case, prefix: PrefixTuning | None = None, *, static: bool = False, inference_model: bool = False
) -> CachedEngine:
    family, config = case.checkpoint.family, case.checkpoint.config
    program: Program
    program = exported(case.name, inference_model) if static else DynamicProgram(step_layer(case.name, inference_model))
    rotary = family.architecture(config).rotary if inference_model else None
    array = None if prefix is None else prefix.array(None if rotary is None else rotary.order)
    return CachedEngine(family, config, program, dtype="float32", prefix=array)


# Makes an engine in float32, behind a prefix if there is one: maker(case, prefix=None).
Maker = Callable[..., Engine]
ENGINES: dict[str, Maker] = {
    "plain": plain,
    "inference": partial(cached, inference_model=True),
    "static": partial(cached, static=True),
    "static inference": partial(cached, static=True, inference_model=True),
}


def _one_per_family() -> list[str]:
    """The first case of every family that brings its tokenizer: trained and asked, not only computed."""
    chosen: dict[str, str] = {}
    for name in NAMES:
        if has_tokenizer(name):
            chosen.setdefault(case(name).checkpoint.family.name, name)
    return sorted(chosen.values())


WITH_TOKENIZER = _one_per_family()
