"""The face of every engine: a model, its cache, and slots that hold the texts it is working on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Generator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray

from utils.errors import UserError
from utils.kernels.arrays import copied

Vectors = Generator[None, None, NDArray[np.float32]]
_ALIKE = 0.75  # texts are read together where padding fills less than a quarter


class Logits:
    """Logits [rows, vocabulary] that stay on the device until they are asked for.

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

    def take(self, rows: Sequence[int]) -> Logits:
        """Some of the rows, in the order given; nothing leaves the device."""
        if len(rows) == self._values.shape[0] and list(rows) == list(range(len(rows))):
            return self
        return Logits(self._values.index_select(copied(rows)))


def alike(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Groups of texts that are read together: of similar lengths, no more than `most` tokens in all."""
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        group = groups[-1] if groups else []
        if group and lengths[number] >= _ALIKE * lengths[group[0]] and (len(group) + 1) * lengths[group[0]] <= most:
            group.append(number)
        else:
            groups.append([number])
    return groups


def unused_slots(used: Container[int], number: int) -> list[int]:
    """The lowest numbers of so many slots that are not open."""
    return list(islice((slot for slot in count() if slot not in used), number))


@dataclass(frozen=True)
class Kept:
    """A copy of what a slot holds of some consecutive tokens; it outlives the slot.

    Attributes:
        values: keys and values [2 * layers, kv_heads, tokens, head_dim], on the device or in memory.
        nbytes: memory that it takes.
    """

    values: Any
    nbytes: int


class Engine(ABC):
    """A model with slots. A slot holds one text: its tokens so far and what the model keeps of them.

    Slots are opened, advanced, rewound, copied and freed one by one, in any order; what one holds
    never depends on the others. The numbers of freed slots are used again.

    Attributes:
        vocabulary: number of logits; token ids are below it.
        max_positions: most tokens (prompt and answer) of one text; None has no limit.
        shares_prefixes: whether texts that begin alike may be opened as copies of one slot. Not so where
            the whole prompt decides what its beginning means (prefix language models).
        embeds: whether `embed` works.
    """

    vocabulary: int
    max_positions: int | None
    shares_prefixes: bool
    embeds = False

    def embed(self, prompts: Sequence[Sequence[int]]) -> Vectors:
        """A vector of each prompt: the mean over its tokens of the last hidden state, which the head would turn into
        logits. Slots stay as they are.

        Returns:
            A generator that pauses after each part of the work, for the engine to be used otherwise, and returns
            float32 [prompts, hidden]. One that is not wanted any more must be closed.

        Raises:
            UserError: a prompt that is empty, too long or of unknown ids; an engine that does not embed.
        """
        if not self.embeds:
            raise UserError("this model gives no embeddings: an exported program computes logits alone")
        limit = self.max_positions
        for prompt in prompts:
            if not len(prompt) or (limit is not None and len(prompt) > limit):
                most = "any number of" if limit is None else f"at most {limit}"
                raise UserError(f"a text to embed has {len(prompt)} tokens: expected at least 1 and {most}")
            if not 0 <= min(prompt) <= max(prompt) < self.vocabulary:
                raise UserError(f"a text to embed has token ids outside the model's vocabulary of {self.vocabulary}")
        return self._embed(prompts)

    def _embed(self, prompts: Sequence[Sequence[int]]) -> Vectors:
        """What `embed` returns, where `embeds` is true."""
        raise NotImplementedError

    @abstractmethod
    def open(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], Logits]:
        """Opens a slot for each prompt (none empty) and reads it.

        Returns:
            The slots, and the logits after the last token of each prompt.
        """

    @abstractmethod
    def advance(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], *, last: bool = False) -> Logits:
        """Appends tokens (at least one each) to distinct open slots; slots not named stay as they are.

        Returns:
            The logits after every token: those of the first slot's tokens in order, then of the next. With
            `last` only those after the last token of each slot.
        """

    @abstractmethod
    def rewind(self, slot: int, count: int) -> None:
        """Forgets the last `count` tokens of a slot; at least one stays, and where prefixes are not shared the
        whole prompt."""

    @abstractmethod
    def fork(self, slot: int, count: int = 1) -> list[int]:
        """Opens slots that hold what this one holds, all at once, as room for them is made once; returns them."""

    @abstractmethod
    def keep(self, slot: int, borders: Sequence[int]) -> list[Kept]:
        """Copies what a slot holds of some of its tokens. Only where prefixes are shared.

        Args:
            borders: rising numbers of tokens. A piece has the tokens from one border up to the next.
        """

    @abstractmethod
    def kept_bytes(self, slot: int, count: int) -> int:
        """Memory that pieces of so many tokens of this slot take together."""

    @abstractmethod
    def restore(self, prefixes: Sequence[Sequence[int]], kept: Sequence[Sequence[Kept]]) -> list[int]:
        """Opens a slot for each prefix without reading it.

        Args:
            prefixes: the first tokens of texts.
            kept: for each of them the pieces of a text that begins with it, the first one from token 0 on. The last
                piece may go further than the prefix.
        """

    @abstractmethod
    def free(self, slots: Sequence[int]) -> None:
        """Closes slots."""
