"""Models by dice over real tokenizers, whose answers close what they open and end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from reference_engine import FunctionEngine, random_logits

from utils.families.token_bytes import token_bytes
from utils.families.tokenizers import Tokenizer
from utils.inference.constraint import Constrainer
from utils.inference.generator import Generator

MORE = 5  # logits beyond the tokenizer's vocabulary


def dice(tokenizer: Tokenizer, seed: int = 1) -> Callable[[list[int]], NDArray[np.float64]]:
    """A model by dice that likes to close what is open and to end, so that its answers are not long."""
    vocabulary = tokenizer.vocabulary + MORE
    closing = {b'"', b"}", b"]"}
    bonus = np.array([4.0 if token_bytes(tokenizer, place).strip() in closing else 0.0 for place in range(vocabulary)])
    bonus[list(tokenizer.eos_ids)] = 4.0
    function = random_logits(vocabulary, seed)
    return lambda text: function(text) + bonus


def generator_of(tokenizer: Tokenizer, function: Callable[[list[int]], NDArray[np.float64]]) -> Generator:
    engine = FunctionEngine(function, tokenizer.vocabulary + MORE)
    return Generator(engine, tokenizer, None, Constrainer(tokenizer, engine.vocabulary, tokenizer.eos_ids).start)
