"""The library's model as an engine: a cache that grows by concatenation, one row per slot."""

from __future__ import annotations

from collections.abc import Container, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray

from utils.families import FamilySpec, Layers
from utils.families.text import NOWHERE, Ints, Text, places
from utils.inference.engine import Engine, Kept, Logits, Prefix, Vectors, alike, unused_slots
from utils.kernels.arrays import copied
from utils.kernels.split import gathered

CHUNK = 512  # tokens of a text to embed at a time, and of several texts together: bounds the memory of scores
_SPARSE = 0.75  # columns of the cache that no row needs are taken out below this share of live ones


@dataclass
class _Rows:
    """Texts that are computed together.

    Attributes:
        slots: of each row.
        keys: int64 [rows, cached], see `utils.families.text.Places`.
        cache: see `FamilySpec.decode`; None without rows.
    """

    slots: list[int]
    keys: Ints
    cache: Layers | None

    def take(self, rows: Sequence[int]) -> _Rows:
        """Some rows. Their columns begin together again when others' tokens have torn them apart."""
        chosen = copied(rows)
        cache = [(key.index_select(chosen), value.index_select(chosen)) for key, value in self.cache or ()]
        taken = _Rows([self.slots[row] for row in rows], self.keys[list(rows)], cache if rows else None)
        return taken.without_gaps()

    def join(self, other: _Rows) -> _Rows:
        """Both, the shorter cache filled up with places where no token is."""
        if not self.slots or not other.slots:
            return self if self.slots else other
        width = max(self.keys.shape[1], other.keys.shape[1])
        keys = [
            np.pad(one.keys, ((0, 0), (0, width - one.keys.shape[1])), constant_values=NOWHERE) for one in (self, other)
        ]
        layers = [[_filled(tensor, width) for layer in one.cache or () for tensor in layer] for one in (self, other)]
        joined = [paddle.concat(pair) for pair in zip(*layers, strict=True)]
        cache = list(zip(joined[::2], joined[1::2], strict=True))
        return _Rows(self.slots + other.slots, np.concatenate(keys), cache)

    def without_gaps(self) -> _Rows:
        """The same without the columns in which no row has a token, if they are many."""
        live = np.flatnonzero((self.keys != NOWHERE).any(axis=0))
        if not self.slots or live.size >= _SPARSE * self.keys.shape[1]:
            return self
        chosen = copied(live)
        cache = [(key.index_select(chosen, 1), value.index_select(chosen, 1)) for key, value in self.cache or ()]
        return _Rows(self.slots, self.keys[:, live], cache)


def _filled(tensor: paddle.Tensor, width: int) -> paddle.Tensor:
    """[rows, cached, ...] with zeros up to [rows, width, ...]."""
    batch, cached, *rest = tensor.shape
    if cached == width:
        return tensor
    return paddle.concat([tensor, paddle.zeros([batch, width - cached, *rest], dtype=tensor.dtype)], axis=1)


class EagerEngine(Engine):
    """PaddleNLP's model as it is, whose Linears may be LoRA layers, in evaluation mode."""

    embeds = True

    def __init__(
        self,
        family: FamilySpec,
        model: Any,
        config: Mapping[str, Any],
        *,
        prefix: Prefix | None = None,
        vocabulary_group: Any = None,
    ) -> None:
        """
        Args:
            family, config: of `model`; the config.json of its checkpoint, in either layout.
            prefix: of prefix tuning; its positions do not count.
            vocabulary_group: the tensor-parallel ranks that share the vocabulary of the head, or None.
        """
        shape = family.shape(config)
        self.vocabulary, self.max_positions = shape.vocabulary, shape.positions
        self.shares_heads = family.shares_heads(config)
        self._family, self._model, self._config, self._prefix = family, model, config, prefix
        self._window, self._vocabulary_group = family.window(config), vocabulary_group
        self._texts: dict[int, Text] = {}
        # rows that were last computed together stay together: the cache of a row that waits is not touched
        self._groups: list[_Rows] = []

    @paddle.no_grad()
    def open(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], Logits]:
        if self._model.training:
            raise RuntimeError("the model is in training mode; call model.eval() before generating")
        slots = self._unused(len(prompts))
        texts = [self._family.text(self._config, prompt) for prompt in prompts]
        rows = self._empty(slots)
        counts = [len(prompt) for prompt in prompts]
        hidden = self._forward(rows, texts, [text.positions() for text in texts], counts)
        self._groups.append(rows)
        self._texts.update(zip(slots, texts, strict=True))
        return slots, self._logits(hidden, [[count - 1] for count in counts])

    @paddle.no_grad()
    def advance(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], *, last: bool = False) -> Logits:
        wanted = dict(zip(slots, tokens, strict=True))
        rows = self._together(wanted)
        order = [rows.slots.index(slot) for slot in slots]
        texts = [self._texts[slot].copy() for slot in rows.slots]  # an interrupted call leaves them as they were
        positions = [text.append(wanted[slot]) for slot, text in zip(rows.slots, texts, strict=True)]
        counts = [len(wanted[slot]) for slot in rows.slots]
        hidden = self._forward(rows, texts, positions, counts)
        self._texts.update(zip(rows.slots, texts, strict=True))
        return self._logits(hidden, [[count - 1] if last else range(count) for count in counts], order)

    def _together(self, slots: Container[int]) -> _Rows:
        """The group of exactly these slots; made of parts of others, if need be."""
        named = [[row for row, slot in enumerate(group.slots) if slot in slots] for group in self._groups]
        parts = [(group, rows) for group, rows in zip(self._groups, named, strict=True) if rows]
        group, rows = parts[0]
        if len(parts) == 1 and len(rows) == len(group.slots):
            return group
        joined = _Rows([], np.zeros((0, 0), dtype=np.int64), None)
        kept = [group for group, rows in zip(self._groups, named, strict=True) if not rows]
        for group, rows in parts:
            others = [row for row in range(len(group.slots)) if row not in rows]
            joined = joined.join(group.take(rows) if others else group)
            if others:
                kept.append(group.take(others))
        self._groups = [*kept, joined]
        return joined

    def rewind(self, slot: int, count: int) -> None:
        text = self._texts[slot]
        text.truncate(len(text.ids) - count)
        place, row = self._find(slot)
        keys = self._groups[place].keys[row]
        keys[keys >= len(text.ids)] = NOWHERE
        self._groups[place] = self._groups[place].without_gaps()

    @paddle.no_grad()
    def fork(self, slot: int, count: int = 1) -> list[int]:
        new = self._unused(count)
        place, row = self._find(slot)
        copied = self._groups[place].take([row] * count)
        copied.slots = list(new)
        self._texts.update((number, self._texts[slot].copy()) for number in new)
        self._groups.append(copied)
        return new

    @paddle.no_grad()
    def keep(self, slot: int, borders: Sequence[int]) -> list[Kept]:
        place, row = self._find(slot)
        group = self._groups[place]
        keys = group.keys[row]
        chosen = copied(np.flatnonzero((keys >= borders[0]) & (keys < borders[-1])))
        # [2 * layers, tokens, kv_heads, head_dim]
        values = paddle.stack([tensor[row].index_select(chosen) for layer in group.cache or () for tensor in layer])
        sizes = [end - start for start, end in pairwise(borders)]
        # parts may be views, and all of the memory would stay as long as one of them
        parts = [part.contiguous() for part in values.split(sizes, axis=1)] if len(sizes) > 1 else [values]
        return [Kept(part, part.size * part.element_size()) for part in parts]

    def kept_bytes(self, slot: int, count: int) -> int:
        place, _ = self._find(slot)
        tensors = [tensor for layer in self._groups[place].cache or () for tensor in layer]
        return count * sum(tensor.shape[2] * tensor.shape[3] * tensor.element_size() for tensor in tensors)

    @paddle.no_grad()
    def restore(self, heads: Sequence[Sequence[int]], kept: Sequence[Sequence[Kept]]) -> list[int]:
        slots, width = self._unused(len(heads)), max(map(len, heads))
        rows = self._empty(slots)
        keys = np.full((len(slots), width), NOWHERE, dtype=np.int64)
        restored = []
        for row, (head, pieces) in enumerate(zip(heads, kept, strict=True)):
            keys[row, : len(head)] = np.arange(len(head))
            values = [piece.values for piece in pieces]
            restored.append(_filled(paddle.concat(values, axis=1)[:, : len(head)], width))
        tensors = list(paddle.stack(restored, axis=1))  # of each layer in turn
        layers = list(zip(tensors[::2], tensors[1::2], strict=True))
        if rows.cache is not None:
            layers = [
                (paddle.concat([old_key, key], axis=1), paddle.concat([old_value, value], axis=1))
                for (old_key, old_value), (key, value) in zip(rows.cache, layers, strict=True)
            ]
        rows.keys, rows.cache = np.concatenate([rows.keys, keys], axis=1), layers
        self._groups.append(rows)
        texts = [self._family.text(self._config, head) for head in heads]
        self._texts.update(zip(slots, texts, strict=True))
        return slots

    def _empty(self, slots: list[int]) -> _Rows:
        """Rows without tokens, which see the prefix."""
        if self._prefix is None:
            return _Rows(slots, np.zeros((len(slots), 0), dtype=np.int64), None)
        before = np.arange(-self._prefix.length, 0, dtype=np.int64)
        return _Rows(slots, np.tile(before, (len(slots), 1)), self._prefix.cache(len(slots)))

    def _embed(self, prompts: Sequence[Sequence[int]]) -> Vectors:
        found: dict[int, NDArray[np.float32]] = {}
        for group in alike([len(prompt) for prompt in prompts], CHUNK):
            means = yield from self._means([self._family.text(self._config, prompts[number]) for number in group])
            found.update(zip(group, means, strict=True))
        return np.stack([found[number] for number in range(len(prompts))])

    def _means(self, texts: Sequence[Text]) -> Generator[None, None, list[NDArray[np.float32]]]:
        """Reads texts; the mean of the hidden states of each. Only one that is alone is longer than a part."""
        rows = self._empty(list(range(len(texts))))
        sums: list[Any] = [0.0] * len(texts)
        longest = max(len(text.ids) for text in texts)
        step = longest if any(text.context for text in texts) else CHUNK
        for start in range(0, longest, step):
            read = [text.copy() for text in texts]
            for text in read:
                text.truncate(start + step)
            counts = [len(text.ids) - start for text in read]
            positions = [text.positions(start)[:, :count] for text, count in zip(texts, counts, strict=True)]
            with paddle.no_grad():
                values = self._forward(rows, read, positions, counts).astype("float32").numpy()
            for row, count in enumerate(counts):
                sums[row] = sums[row] + values[row, :count].sum(axis=0)
            yield
        return [total / np.float32(len(text.ids)) for total, text in zip(sums, texts, strict=True)]

    def free(self, slots: Sequence[int]) -> None:
        for slot in slots:
            del self._texts[slot]
        groups, self._groups = self._groups, []
        for group in groups:
            kept = [row for row, slot in enumerate(group.slots) if slot in self._texts]
            if kept:
                self._groups.append(group if len(kept) == len(group.slots) else group.take(kept))

    def _find(self, slot: int) -> tuple[int, int]:
        """(number of its group, row in it)."""
        return next((place, group.slots.index(slot)) for place, group in enumerate(self._groups) if slot in group.slots)

    def _unused(self, number: int) -> list[int]:
        return unused_slots(self._texts, number)

    def _forward(
        self, rows: _Rows, texts: Sequence[Text], positions: Sequence[Ints], counts: Sequence[int]
    ) -> paddle.Tensor:
        """Hidden states [rows, length, hidden] of new tokens (the last `counts` of each text); fills `rows`."""
        batch, length = len(texts), max(counts)
        ids = np.zeros((batch, length), dtype=np.int64)
        placed = np.zeros((positions[0].shape[0], batch, length), dtype=np.int64)
        order = np.full((batch, length), NOWHERE, dtype=np.int64)
        for row, (text, number) in enumerate(zip(texts, counts, strict=True)):
            ids[row, :number] = text.ids[-number:]
            placed[:, row, :number] = positions[row]
            order[row, :number] = np.arange(len(text.ids) - number, len(text.ids))
        keys = np.concatenate([rows.keys, order], axis=1)
        context = np.array([text.context for text in texts], dtype=np.int64)
        stretch = np.array([text.stretch for text in texts], dtype=np.float32)
        # a padding query sees what comes first, not nothing: softmax over nothing is not a number
        known = places(placed, np.where(order == NOWHERE, 0, order), keys, context, stretch, self._window)
        hidden, rows.cache = self._family.decode(self._model, copied(ids), known, rows.cache)
        rows.keys = keys
        return hidden

    def _logits(
        self, hidden: paddle.Tensor, places: Sequence[Iterable[int]], order: Sequence[int] | None = None
    ) -> Logits:
        """Logits at places of each row, the rows in `order` (theirs by default)."""
        batch, length, width = hidden.shape
        chosen = [row * length + place for row in order or range(batch) for place in places[row]]
        states = hidden.reshape([batch * length, width]).index_select(copied(chosen))
        logits = self._family.logits(self._model, states)
        return Logits(logits if self._vocabulary_group is None else gathered(logits, self._vocabulary_group))
