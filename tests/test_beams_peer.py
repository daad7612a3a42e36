"""Beam search against the answers of Hugging Face transformers, see fixtures/make_beams.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from family_cases import FIXTURES, cached, case

from utils.checkpoints import embedded
from utils.inference.generator import Generator
from utils.inference.loading import load, prepare
from utils.inference.sampling import SamplingOptions


def stored(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / name).read_text("utf-8"))


def options_of(search: dict[str, Any], max_new_tokens: int) -> SamplingOptions:
    names = ("num_beams", "length_penalty", "early_stopping")
    return SamplingOptions(max_new_tokens=max_new_tokens, **{name: search[name] for name in names})


class Numbers:
    """Tokens without texts."""

    def __init__(self, end_ids: Sequence[int]) -> None:
        self.eos_ids = tuple(end_ids)

    def decode(self, ids: Sequence[int]) -> str:
        return ""


def test_searches_of_a_tiny_model_end_where_theirs_do() -> None:
    """Many end tokens: what ends a search is in play in each, and each setting has answers of its own."""
    peer = stored("beams_tiny.json")
    generator = Generator(cached(case("llama_tiny"), inference_model=True), Numbers(peer["end_ids"]))
    prompts = [prompt for _ in peer["searches"] for prompt in peer["prompts"]]
    each = [options_of(search, peer["max_new_tokens"]) for search in peer["searches"] for _ in peer["prompts"]]
    wanted = [tuple(tokens) for search in peer["searches"] for tokens in search["tokens"]]
    found = generator.generate(prompts, each, 64)
    for prompt, options, one, tokens in zip(prompts, each, found, wanted, strict=True):
        assert one.tokens == tokens, (prompt, options)
    lengths = [len(tokens) for tokens in wanted]
    assert {1, peer["max_new_tokens"]} < set(lengths) and 0.2 < lengths.count(peer["max_new_tokens"]) / len(
        lengths
    ) < 0.6


def test_searches_of_the_embedded_model_have_the_same_texts() -> None:
    peer = stored("beams.json")
    prepared = prepare(embedded.NAME, device="cpu", dtype="float32", inference_model=True)
    prompts = [prepared.tokenizer.encode(prompt) for prompt in peer["prompts"]]
    assert prompts == peer["ids"]
    searches = peer["searches"]
    found = load(prepared, "cpu").generate(
        [prompts[search["prompt"]] for search in searches],
        [options_of(search, peer["max_new_tokens"]) for search in searches],
        32,
    )
    for search, one in zip(searches, found, strict=True):
        assert list(one.tokens) == search["tokens"], search
        assert one.text == search["text"], search
    by_prompt: dict[int, set[str]] = {}
    for search in searches:
        by_prompt.setdefault(search["prompt"], set()).add(search["text"])
    assert len(by_prompt) >= 12
    assert sum(len(texts) > 1 for texts in by_prompt.values()) >= 4  # the settings matter


@pytest.mark.parametrize(("width", "settings"), [(2, 8), (3, 8), (4, 8)])
def test_the_stored_searches_are_of_all_settings(width: int, settings: int) -> None:
    searches = [search for search in stored("beams_tiny.json")["searches"] if search["num_beams"] == width]
    assert len({(search["length_penalty"], search["early_stopping"]) for search in searches}) == settings
