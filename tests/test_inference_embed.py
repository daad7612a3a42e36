"""Vectors of texts: what each engine gives beside its slots, against the training forward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
import pytest
from family_cases import ENGINES, NAMES, Case, Maker, case, random_prefix

from utils.adapters.prefix import PrefixTuning
from utils.errors import UserError
from utils.inference import cached as cached_module
from utils.inference.engine import Engine

TOLERANCE = 1e-4
ROUNDING = 1e-5
EMBEDDING: dict[str, Maker] = {name: ENGINES[name] for name in ("plain", "inference")}


def vectors(engine: Engine, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """All at once."""
    making = engine.embed(texts)
    while True:
        try:
            next(making)
        except StopIteration as complete:
            found: np.ndarray = complete.value
            return found


def direct(one: Case, text: Sequence[int], prefix: PrefixTuning | None = None) -> np.ndarray:
    with paddle.no_grad():
        cache = None if prefix is None else prefix.cache(1)
        batch = {"input_ids": paddle.to_tensor([list(text)], dtype="int64")}
        return one.model.hidden(batch, cache).numpy()[0].mean(axis=0)


@pytest.mark.parametrize("engine_name", EMBEDDING)
@pytest.mark.parametrize("name", NAMES)
def test_the_mean_of_what_the_head_sees(name: str, engine_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = case(name)
    engine = EMBEDDING[engine_name](one)
    first, second = (row.tolist() for row in one.rows)
    texts = [first, second[1:], [*first[1:], *first[1:]], second]
    found = vectors(engine, texts)
    assert engine.embeds and found.dtype == np.float32
    wanted = np.stack([direct(one, text) for text in texts])
    assert np.abs(found - wanted).max() < TOLERANCE
    assert np.abs(vectors(engine, texts[2:3]) - found[2:3]).max() < TOLERANCE
    monkeypatch.setattr(cached_module, "CHUNK", 3)
    assert np.abs(vectors(engine, texts) - found).max() < ROUNDING  # in parts as well as whole


@pytest.mark.parametrize("engine_name", EMBEDDING)
@pytest.mark.parametrize("with_prefix", [False, True])
def test_texts_are_embedded_while_others_are_answered(
    engine_name: str, with_prefix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long ones piece by piece; slots stay as they are."""
    monkeypatch.setattr(cached_module, "CHUNK", 7)
    one = case("mistral")
    prefix = random_prefix(one.checkpoint) if with_prefix else None
    engine, undisturbed = (EMBEDDING[engine_name](one, prefix) for _ in range(2))
    text = np.random.default_rng(2).integers(3, 60, 25).tolist()
    for each in (engine, undisturbed):
        each.open([text[:5], text[:9]])
    making = engine.embed([text, text[:3], text[:20]])
    abandoned = engine.embed([text])
    for others in range(3):  # slots come and go in the middle of a text
        next(making)
        next(abandoned)
        for each in (engine, undisturbed):
            (new,), _ = each.open([text[others:9]])
            each.advance([new, 0], [[4], [5]])
            each.rewind(0, 1)
            each.free([new])
    abandoned.close()
    with pytest.raises(StopIteration) as complete:
        while True:
            next(making)
    found = complete.value.value
    wanted = [direct(one, part, prefix) for part in (text, text[:3], text[:20])]
    assert np.abs(found - np.stack(wanted)).max() < TOLERANCE
    after, expected = (each.advance([0, 1], [text[5:8], text[9:10]]).numpy() for each in (engine, undisturbed))
    assert np.abs(after - expected).max() < TOLERANCE
    engine.free([0, 1])
    assert vectors(engine, [text]).shape == (1, found.shape[1])


def test_texts_that_have_no_vector() -> None:
    engine = ENGINES["plain"](case("gpt2_tiny"))
    limit = engine.max_positions or 0
    for text, fault in (
        ([], "a text to embed has 0 tokens"),
        ([3] * (limit + 1), f"expected at least 1 and at most {limit}"),
        ([engine.vocabulary], "token ids outside the model's vocabulary"),
    ):
        with pytest.raises(UserError, match=fault):
            engine.embed([[3], text])


@pytest.mark.parametrize("name", ["static", "static inference"])
def test_an_exported_program_embeds_nothing(name: str) -> None:
    engine = ENGINES[name](case("mistral"))
    assert not engine.embeds
    with pytest.raises(UserError, match="an exported program computes logits alone"):
        engine.embed([[3]])
