"""A vocabulary that can be read with the eye, and engines over it: models by dice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reference_engine import FunctionEngine, random_logits

VOCABULARY = 24


class Letters:
    """Token i is the i-th letter; token 0 ends an answer and shows no text."""

    eos_ids = (0,)

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(96 + token) for token in ids if token)


def engine_of(seed: int = 1, **settings: Any) -> FunctionEngine:
    return FunctionEngine(random_logits(VOCABULARY, seed), VOCABULARY, **settings)
