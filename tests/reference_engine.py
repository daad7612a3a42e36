"""Engines without any cache: slow, obviously right, and the independent reference for all others."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import paddle

from utils.inference.engine import Engine, Kept, Logits


class TextEngine(Engine):
    """Keeps the tokens of each slot and computes every logit anew from the whole text.

    It checks how it is called, and counts: `read` tokens, `calls` as (method, tokens of each text).
    """

    def __init__(self, vocabulary: int, max_positions: int | None = None, shares_prefixes: bool = True) -> None:
        self.vocabulary = vocabulary
        self.max_positions = max_positions
        self.shares_prefixes = shares_prefixes
        self.texts: dict[int, list[int]] = {}
        self.read = 0
        self.most = 0
        self.calls: list[tuple[str, list[int]]] = []

    @abstractmethod
    def logits(self, text: Sequence[int], last: int) -> np.ndarray:
        """Logits [last, vocabulary] after each of the `last` tokens at the end of a text."""

    def open(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], Logits]:
        assert prompts and all(len(prompt) for prompt in prompts)
        self.calls.append(("open", [len(prompt) for prompt in prompts]))
        slots = [self._new(prompt) for prompt in prompts]
        self.read += sum(len(prompt) for prompt in prompts)
        return slots, self._rows([self.logits(prompt, 1) for prompt in prompts])

    def advance(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], *, last: bool = False) -> Logits:
        assert slots and len(set(slots)) == len(slots) == len(tokens) and all(len(each) for each in tokens)
        self.calls.append(("advance", [len(each) for each in tokens]))
        found = []
        for slot, each in zip(slots, tokens, strict=True):
            self.texts[slot] += [int(token) for token in each]
            self._check(self.texts[slot])
            found.append(self.logits(self.texts[slot], 1 if last else len(each)))
        self.read += sum(len(each) for each in tokens)
        return self._rows(found)

    def rewind(self, slot: int, count: int) -> None:
        assert 0 < count < len(self.texts[slot])
        del self.texts[slot][-count:]

    def fork(self, slot: int, count: int = 1) -> list[int]:
        return [self._new(self.texts[slot]) for _ in range(count)]

    def free(self, slots: Sequence[int]) -> None:
        for slot in slots:
            del self.texts[slot]

    def keep(self, slot: int, borders: Sequence[int]) -> list[Kept]:
        text = self.texts[slot]
        assert self.shares_prefixes and borders[0] >= 0 and borders[-1] <= len(text) and len(borders) > 1
        pieces = [text[start:end] for start, end in pairwise(borders)]
        assert all(pieces)
        return [Kept(piece, self.kept_bytes(slot, len(piece))) for piece in pieces]

    def kept_bytes(self, slot: int, count: int) -> int:
        return 10 * count

    def restore(self, prefixes: Sequence[Sequence[int]], kept: Sequence[Sequence[Kept]]) -> list[int]:
        assert prefixes
        self.calls.append(("restore", [len(prefix) for prefix in prefixes]))
        for prefix, pieces in zip(prefixes, kept, strict=True):
            tokens = [token for piece in pieces for token in piece.values]
            assert (
                len(prefix)
                and tokens[: len(prefix)] == list(prefix)
                and len(prefix) > len(tokens) - len(pieces[-1].values)
            )
        return [self._new(prefix) for prefix in prefixes]

    def _new(self, text: Sequence[int]) -> int:
        slot = next(number for number in range(len(self.texts) + 1) if number not in self.texts)
        self.texts[slot] = [int(token) for token in text]
        self._check(self.texts[slot])
        self.most = max(self.most, len(self.texts))
        return slot

    def _check(self, text: Sequence[int]) -> None:
        assert all(0 <= token < self.vocabulary for token in text)
        assert self.max_positions is None or len(text) <= self.max_positions

    def _rows(self, parts: Sequence[np.ndarray]) -> Logits:
        return Logits(paddle.to_tensor(np.concatenate(parts).astype(np.float32)))


class FunctionEngine(TextEngine):
    """Logits that a function gives for a text."""

    def __init__(self, function: Callable[[list[int]], np.ndarray], vocabulary: int, **settings: Any) -> None:
        super().__init__(vocabulary, **settings)
        self._function = function

    def logits(self, text: Sequence[int], last: int) -> np.ndarray:
        return np.stack([self._function(list(text[:end])) for end in range(len(text) - last + 1, len(text) + 1)])


def random_logits(vocabulary: int, seed: int, spread: float = 2.0) -> Callable[[list[int]], np.ndarray]:
    """A model by dice: each text has logits of its own, always the same ones."""

    def function(text: list[int]) -> np.ndarray:
        return np.random.default_rng([seed, *text]).normal(0, spread, vocabulary)

    return function


class ReferenceEngine(TextEngine):
    """A causal family's model as training computes it, one whole text at a time: no cache, no padding."""

    def __init__(self, family: Any, model: Any, max_positions: int | None = None, shares_prefixes: bool = True) -> None:
        shape = model.architecture.shape
        super().__init__(shape.vocabulary, max_positions or shape.positions, shares_prefixes)
        self._family, self._model = family, model
        self._known: dict[tuple[int, ...], np.ndarray] = {}

    def logits(self, text: Sequence[int], last: int) -> np.ndarray:
        return np.stack([self._after(tuple(text[:end])) for end in range(len(text) - last + 1, len(text) + 1)])

    def _after(self, text: tuple[int, ...]) -> np.ndarray:
        """float32 [vocabulary]; the same text gives the same numbers, so they are computed once."""
        if text not in self._known:
            with paddle.no_grad():
                hidden = self._model.hidden({"input_ids": paddle.to_tensor([list(text)])})
                found = self._model.logits(hidden[:, -1])
            self._known[text] = found.astype("float32").numpy()[0]
        return self._known[text]
