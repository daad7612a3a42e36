"""The engine above every program, plain, fused or exported: rows of one cache, steps over new tokens."""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor

from utils import runtime
from utils.families import FamilySpec
from utils.families.text import NOWHERE, Ints, Text, attention_inputs
from utils.inference.engine import Engine, Kept, Logits, Vectors, alike, unused_slots
from utils.kernels.arrays import copied
from utils.kernels.precision import activation_dtype
from utils.model.cache import Cache, DeviceCache, HostCache

if TYPE_CHECKING:
    from utils.model.fused import FusedDecoder
    from utils.model.plain import PlainDecoder

CHUNK = 512  # tokens of a prompt at a time, and of several prompts together: bounds the memory of scores
_FEW = 16  # new tokens of a row: of an answer, and guessed ones


class Program(Protocol):
    """One step of a model over new tokens.

    Attributes:
        cache_shape: layers, heads of keys and values, and width of a head, of its cache.
        heads_first: the layout of its cache, see `Cache`.
        embeds: whether `states` works.
    """

    cache_shape: tuple[int, int, int]
    heads_first: bool
    embeds: bool

    def __call__(self, inputs: Mapping[str, Tensor], cache: Sequence[Tensor]) -> Tensor:
        """As `utils.model.fused.FusedDecoder.forward`: writes into the cache, returns logits.

        Args:
            inputs: all that a model may need, by name.
        """

    def states(self, inputs: Mapping[str, Tensor], cache: Sequence[Tensor]) -> Tensor:
        """The same, but the hidden states [n, hidden] that the head would turn into logits."""


class DynamicProgram:
    """A decoder, operator by operator."""

    embeds = heads_first = True

    def __init__(self, decoder: FusedDecoder | PlainDecoder) -> None:
        self._decoder, self.cache_shape = decoder, decoder.cache_shape

    def states(self, inputs: Mapping[str, Tensor], cache: Sequence[Tensor]) -> Tensor:
        return self._decoder.states({name: inputs[name] for name in self._decoder.inputs}, cache)

    def __call__(self, inputs: Mapping[str, Tensor], cache: Sequence[Tensor]) -> Tensor:
        logits: Tensor = self._decoder([inputs[name] for name in self._decoder.inputs], cache)[0]
        return logits


@dataclass
class _Row:
    """A text and the row of the cache that holds it."""

    slot: int
    text: Text
    length: int = 0  # tokens that are in the cache


class CachedEngine(Engine):
    """Slots over one cache whose rows are packed: those in use come first."""

    def __init__(
        self,
        family: FamilySpec,
        config: Mapping[str, Any],
        program: Program,
        *,
        dtype: str,
        prefix: NDArray[np.float32] | None = None,
    ) -> None:
        """
        Args:
            family, config: of the model.
            dtype: of the weights.
            prefix: keys and values of prefix tuning as the program turns them, [2 * layers, kv_heads,
                length, head_dim], of the layers and heads of its cache; every text sees them.
        """
        shape = family.shape(config)
        self.vocabulary, self.max_positions = shape.vocabulary, shape.positions
        self.shares_prefixes, self.embeds = family.shares_prefixes(config), program.embeds
        self._family, self._config, self._program = family, config, program
        self._window = family.window(config)
        self._prefix = prefix
        self._before = 0 if prefix is None else prefix.shape[2]
        dtype = activation_dtype(dtype)
        on_host = paddle.get_device() == "cpu" and dtype == "float32"
        kind: Callable[..., Cache] = HostCache if on_host else DeviceCache
        self.cache = kind(*program.cache_shape, dtype, heads_first=program.heads_first)
        self._rows: list[_Row] = []

    # --- slots --------------------------------------------------------------------------------------

    @paddle.no_grad()
    def open(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], Logits]:
        slots = self._unused(len(prompts))
        new = [_Row(slot, self._family.text(self._config, prompt)) for slot, prompt in zip(slots, prompts, strict=True)]
        found: dict[int, Tensor] = {}
        before = len(self._rows)
        self.cache.reserve(before + len(new), self._before)
        try:
            for group in alike([len(prompt) for prompt in prompts], CHUNK):
                rows = [new[number] for number in group]
                found.update(zip(group, self._read(rows), strict=True))
        except BaseException:  # also an interrupt: nothing was opened
            del self._rows[before:]
            raise
        return [row.slot for row in new], Logits(paddle.concat([found[number] for number in range(len(new))]))

    def _read(self, rows: list[_Row]) -> list[Tensor]:
        """Reads the prompts of new rows, which are added; the last logits [1, vocabulary] of each."""
        first = self._add(rows)
        return self._feed(rows, first, [row.text.ids for row in rows], _step_of(rows))

    def _add(self, rows: list[_Row]) -> int:
        """Adds rows of which nothing but the prefix is in the cache; returns the place of the first."""
        first = len(self._rows)
        self._rows += rows
        if self._prefix is not None:
            for number in range(first, first + len(rows)):
                self.cache.put(number, 0, [self._prefix])
        return first

    def _feed(self, rows: list[_Row], first: int, texts: Sequence[Sequence[int]], step: int) -> list[Tensor]:
        """Computes texts piece by piece; the last logits [1, vocabulary] of each."""
        last: list[Any] = [None] * len(rows)
        ends_at = max(row.length + len(text) for row, text in zip(rows, texts, strict=True))
        self.cache.reserve(len(self._rows), self._before + ends_at)  # once: each time all that is there is copied
        for start in range(0, max(map(len, texts)), step):
            parts = [text[start : start + step] for text in texts]
            ends = [len(part) - 1 for part in parts]
            logits = self._step(rows, first, parts, [[max(end, 0)] for end in ends])
            for number, end in enumerate(ends):
                if end >= 0:
                    last[number] = logits[number : number + 1]
        return last

    @paddle.no_grad()
    def advance(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], *, last: bool = False) -> Logits:
        wanted = dict(zip(slots, tokens, strict=True))
        first = self._together(wanted)
        rows = self._rows[first : first + len(wanted)]
        before = [(row.text, row.length) for row in rows]
        try:
            for row in rows:
                row.text = row.text.copy()
                row.text.append(wanted[row.slot])
            parts = [list(wanted[row.slot]) for row in rows]
            if last:
                values = paddle.concat(self._feed(rows, first, parts, CHUNK))
            else:
                values = self._step(rows, first, parts, [range(len(part)) for part in parts])
        except BaseException:  # also an interrupt: nothing was advanced
            for row, state in zip(rows, before, strict=True):
                row.text, row.length = state
            raise
        starts = np.cumsum([0, *(1 if last else len(part) for part in parts)])
        at = {row.slot: range(starts[n], starts[n + 1]) for n, row in enumerate(rows)}
        order = [number for slot in slots for number in at[slot]]
        if order != list(range(len(order))):
            values = values.index_select(copied(order))
        return Logits(values)

    def _embed(self, prompts: Sequence[Sequence[int]]) -> Vectors:
        found: dict[int, NDArray[np.float32]] = {}
        for group in alike([len(prompt) for prompt in prompts], CHUNK):
            means = yield from self._means([self._family.text(self._config, prompts[number]) for number in group])
            found.update(zip(group, means, strict=True))
        return np.stack([found[number] for number in range(len(prompts))])

    def _means(self, texts: Sequence[Text]) -> Generator[None, None, list[NDArray[np.float32]]]:
        """Reads texts, in slots of their own; the mean of the hidden states of each. Only one that is alone is longer
        than a part, so that a pause takes none of several from beside the others."""
        slots = self._unused(len(texts))
        rows = [_Row(slot, text) for slot, text in zip(slots, texts, strict=True)]
        sums: list[Any] = [0.0] * len(rows)
        step, longest = _step_of(rows), max(len(text.ids) for text in texts)
        self.cache.reserve(len(self._rows) + len(rows), self._before + longest)
        try:
            self._add(rows)
            for start in range(0, longest, step):
                parts = [text.ids[start : start + step] for text in texts]
                wanted = [range(len(part)) for part in parts]
                with paddle.no_grad():
                    states = self._step(rows, self._find(slots[0]), parts, wanted, self._program.states)
                values, ends = states.astype("float32").numpy(), np.cumsum([len(part) for part in parts])
                for number, (part, end) in enumerate(zip(parts, ends, strict=True)):
                    sums[number] = sums[number] + values[end - len(part) : end].sum(axis=0)
                yield
        finally:
            self.free(slots[::-1])  # the last one first, which moves nothing
        return [total / np.float32(len(text.ids)) for total, text in zip(sums, texts, strict=True)]

    def _together(self, slots: Container[int]) -> int:
        """Makes the rows of these slots follow one another, with as few exchanges as can be; the first one's place."""
        named = [row.slot in slots for row in self._rows]
        count = sum(named)
        first = max(range(len(named) - count + 1), key=lambda start: sum(named[start : start + count]))
        places = range(first, first + count)
        away = [number for number, is_named in enumerate(named) if is_named and number not in places]
        others = [number for number in places if not named[number]]
        for one, other in zip(away, others, strict=True):
            self._swap(one, other)
        return first

    def rewind(self, slot: int, count: int) -> None:
        row = self._rows[self._find(slot)]
        row.text.truncate(len(row.text.ids) - count)
        row.length = len(row.text.ids)

    def fork(self, slot: int, count: int = 1) -> list[int]:
        source = self._find(slot)
        row, new, before = self._rows[source], self._unused(count), len(self._rows)
        self.cache.reserve(before + count, self._before + row.length)
        for place in range(before, before + count):
            self.cache.copy_row(source, place)
        self._rows += [_Row(number, row.text.copy(), row.length) for number in new]
        return new

    @paddle.no_grad()
    def keep(self, slot: int, borders: Sequence[int]) -> list[Kept]:
        number = self._find(slot)
        pieces = self.cache.take(number, [self._before + border for border in borders])
        return [Kept(piece, self.kept_bytes(slot, piece.shape[2])) for piece in pieces]

    def kept_bytes(self, slot: int, count: int) -> int:
        return count * self.cache.place_bytes

    @paddle.no_grad()
    def restore(self, prefixes: Sequence[Sequence[int]], kept: Sequence[Sequence[Kept]]) -> list[int]:
        new, before = self._unused(len(prefixes)), len(self._rows)
        self.cache.reserve(before + len(prefixes), self._before + max(map(len, prefixes)))
        for number, (prefix, pieces) in enumerate(zip(prefixes, kept, strict=True), before):
            if self._prefix is not None:
                self.cache.put(number, 0, [self._prefix])
            values = [piece.values for piece in pieces]
            over = sum(piece.shape[2] for piece in values) - len(prefix)
            if over:
                values[-1] = values[-1][:, :, :-over]
            self.cache.put(number, self._before, values)
        texts = [self._family.text(self._config, prefix) for prefix in prefixes]
        self._rows += [_Row(slot, text, len(text.ids)) for slot, text in zip(new, texts, strict=True)]
        return new

    def _find(self, slot: int) -> int:
        """The row of the cache that holds a slot."""
        return next(number for number, row in enumerate(self._rows) if row.slot == slot)

    def _unused(self, number: int) -> list[int]:
        return unused_slots({row.slot for row in self._rows}, number)

    def free(self, slots: Sequence[int]) -> None:
        for slot in slots:
            number = self._find(slot)
            if number < len(self._rows) - 1:  # the last row takes its place
                self.cache.copy_row(len(self._rows) - 1, number)
            *rest, last = self._rows
            self._rows = [*rest[:number], last, *rest[number + 1 :]] if number < len(rest) else rest
        self._shrink()

    def _shrink(self) -> None:
        """Gives back memory that no row needs."""
        if self._rows:
            self.cache.shrink(self._before + max(row.length for row in self._rows))
        else:
            self.cache.clear()

    def _swap(self, one: int, other: int) -> None:
        """Exchanges two rows of the cache, by way of a row behind the last."""
        spare, done = len(self._rows), 0
        self.cache.reserve(spare + 1, 0)
        moves = ((one, spare), (other, one), (spare, other))  # each may be made twice
        try:
            while done < len(moves):
                self.cache.copy_row(*moves[done])
                done += 1
        finally:
            if done:  # an interrupt between them must not leave one row twice
                for source, target in moves[done:]:
                    self.cache.copy_row(source, target)
                self._rows[one], self._rows[other] = self._rows[other], self._rows[one]

    # --- a step -------------------------------------------------------------------------------------

    def _step(
        self,
        rows: Sequence[_Row],
        first: int,
        parts: Sequence[Sequence[int]],
        wanted: Sequence[Sequence[int] | range],
        compute: Callable[[Mapping[str, Tensor], Sequence[Tensor]], Tensor] | None = None,
    ) -> Tensor:
        """Computes new tokens of consecutive rows.

        Args:
            first: the place of the first of them in the cache.
            parts: the new tokens of each row; they are in its text already.
            wanted: the tokens of each part whose logits are returned, one after another.
            compute: what gives something else of these tokens; None is the program itself.
        """
        batch, length = len(rows), max(map(len, parts))
        counts = [len(part) for part in parts]
        ids = np.zeros((batch, length), dtype=np.int64)
        order = np.full((batch, length), NOWHERE, dtype=np.int64)
        positions = np.zeros((rows[0].text.positions(len(rows[0].text.ids)).shape[0], batch, length), dtype=np.int64)
        for number, (row, part) in enumerate(zip(rows, parts, strict=True)):
            end = row.length + len(part)
            ids[number, : len(part)] = part
            order[number, : len(part)] = np.arange(row.length, end)
            positions[:, number, : len(part)] = row.text.positions(row.length)[:, : len(part)]
        starts = self._before + np.array([row.length for row in rows], dtype=np.int64)
        self._make_room(int(starts.max()) + length, length)
        # of one token the program looks at all places
        seen = self.cache.capacity if length == 1 else int(starts.max()) + length
        where = attention_inputs(
            positions,
            np.where(order == NOWHERE, 0, order),
            self._places(starts + counts, seen),
            np.array([row.text.context for row in rows], dtype=np.int64),
            np.array([row.text.stretch for row in rows], dtype=np.float32),
            self._window,
        )
        chosen = [number * length + place for number, places_ in enumerate(wanted) for place in places_]
        inputs = {
            "ids": copied(ids),
            "positions": where.positions,
            "keys": where.keys,
            "visible": where.visible,
            "targets": copied(starts[:, None] + np.arange(length)),  # padding goes behind the text
            "stretch": where.stretch,
            "chosen": copied(chosen),
        }
        found = (compute or self._program)(inputs, self.cache.tensors(batch, first))
        for row, number in zip(rows, counts, strict=True):
            row.length += number
        return found

    def _make_room(self, places: int, new: int) -> None:
        """Room for so many places of every row, the last `new` of which come now.

        Where an answer outgrows the cache, rows that are free by now go, and what the smaller cache and the prompts
        leave, into which nothing fits that comes. Not between the parts of a long prompt, each of which takes the
        same again.
        """
        outgrown = 0 < self.cache.capacity < places and new <= _FEW
        self.cache.reserve(len(self._rows), places, only=outgrown)
        if outgrown:
            runtime.give_back_freed_memory()

    def _places(self, ends: Ints, seen: int) -> Ints:
        """[rows, seen]: the place in its text of each of the first places of the cache, see `AttentionInputs.keys`.

        Args:
            ends: of each row, the place behind its last token.
        """
        place = np.arange(seen, dtype=np.int64)[None]
        return np.where(place < ends[:, None], place - self._before, NOWHERE)


def _step_of(rows: Sequence[_Row]) -> int:
    """How many tokens of new texts are read at a time: all, where the whole prompt decides what its tokens mean."""
    return max(len(row.text.ids) for row in rows) if any(row.text.context for row in rows) else CHUNK
