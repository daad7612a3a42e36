"""Engines: a model, its cache and the rows it is working on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import paddle
from numpy.typing import NDArray

from utils.families import FamilySpec


class Logits:
    """Next-token logits [rows, vocabulary] that stay on the device until they are asked for.

    Greedy decoding needs one number per row, not the vocabulary's worth: at 8 rows of 49,152 the
    copy to numpy takes twice as long as finding the maximum in place.
    """

    def __init__(self, values: paddle.Tensor) -> None:
        self._values = values

    def argmax(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(the likeliest token of each row, its logit), each [rows]; the logit of a bad row is not finite."""
        best, highest = self._values.argmax(axis=-1), self._values.max(axis=-1)
        return best.numpy(), highest.astype("float32").numpy()

    def numpy(self) -> NDArray[np.float32]:
        """All logits, float32 [rows, vocabulary]."""
        return self._values.astype("float32").numpy()


class Prefix(Protocol):
    """A trained prefix that every row sees before its first token."""

    length: int

    def cache(self, batch_size: int) -> Any:
        """The prefix as a cache of the family's layout, for that many rows."""


class Engine(ABC):
    """A model with rows in flight. The order of rows is the order in which they were added.

    Attributes:
        vocabulary: number of logits; token ids are below it.
        max_positions: most tokens (prompt and answer) of one row; None has no limit.
    """

    vocabulary: int
    max_positions: int | None

    @abstractmethod
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Logits:
        """Adds one row per prompt (none empty) and returns the logits after each prompt's last token.

        Raises:
            RuntimeError: rows are in flight and this engine cannot add to them.
        """

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> Logits:
        """Appends one token to every row in flight and returns the logits after it."""

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """Frees all rows but these (ascending numbers); the kept ones move up."""

    @abstractmethod
    def reset(self) -> None:
        """Frees all rows."""


class EagerEngine(Engine):
    """PaddleNLP's model as it is: left-padded prompts and a cache that grows by concatenation.

    Rows cannot join a running batch: their cache would have to be padded to the others' length.
    """

    def __init__(
        self,
        family: FamilySpec,
        model: Any,
        *,
        pad_id: int,
        prefix: Prefix | None = None,
        max_positions: int | None = None,
    ) -> None:
        """
        Args:
            family: the family of `model`.
            model: the library's model, whose Linears may be LoRA layers, in evaluation mode.
            pad_id: what fills the places before a shorter prompt; never seen by the model's attention.
            prefix: of prefix tuning; its positions do not count.
            max_positions: None takes what the model's configuration says, if it says something.
        """
        self._family = family
        self._model = model
        self._pad_id = pad_id
        self._prefix = prefix
        self.vocabulary = int(model.config.vocab_size)
        self.max_positions = max_positions or getattr(model.config, "max_position_embeddings", None)
        self._cache: Any = None
        self._lengths = np.zeros(0, dtype=np.int64)  # real tokens of each row
        self._seen = np.zeros((0, 0), dtype=np.int64)  # [rows, cached], 1 where attention may look

    @paddle.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Logits:
        if len(self._lengths):
            raise RuntimeError("the eager engine cannot add rows to a running batch")
        if self._model.training:
            raise RuntimeError("the model is in training mode; call model.eval() before generating")
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        rows, width = len(prompts), int(lengths.max())
        ids = np.full((rows, width), self._pad_id, dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
        padding = width - lengths[:, None]
        places = np.arange(width, dtype=np.int64)[None]
        seen = (places >= padding).astype(np.int64)
        if self._prefix is not None:
            seen = np.concatenate([np.ones((rows, self._prefix.length), dtype=np.int64), seen], axis=1)
        cache = self._prefix.cache(rows) if self._prefix is not None else None
        self._lengths, self._seen = lengths, seen
        return self._forward(ids, np.maximum(places - padding, 0), cache)

    def decode(self, tokens: Sequence[int]) -> Logits:
        ids = np.asarray(tokens, dtype=np.int64)[:, None]
        positions = self._lengths[:, None]
        self._lengths = self._lengths + 1
        self._seen = np.concatenate([self._seen, np.ones_like(ids)], axis=1)
        return self._forward(ids, positions, self._cache)

    def keep(self, rows: Sequence[int]) -> None:
        chosen = np.asarray(rows, dtype=np.int64)
        self._lengths, self._seen = self._lengths[chosen], self._seen[chosen]
        self._cache = self._family.cache_select(self._cache, paddle.to_tensor(chosen))

    def reset(self) -> None:
        self._cache = None
        self._lengths, self._seen = self._lengths[:0], self._seen[:0]

    @paddle.no_grad()
    def _forward(self, ids: NDArray[np.int64], positions: NDArray[np.int64], cache: Any) -> Logits:
        logits, self._cache = self._family.step(
            self._model,
            input_ids=paddle.to_tensor(ids),
            attention_mask=paddle.to_tensor(self._seen),
            position_ids=paddle.to_tensor(positions),
            cache=cache,
        )
        return Logits(logits)
