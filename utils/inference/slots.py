"""The slots that one user of an engine has open, so that none is left open whatever goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from utils.inference.engine import Engine, Logits

# `advance` returns logits after every token; no more numbers than these in one call when reading.
READ_VALUES = 2**26


class Slots:
    """An engine's slots as `Engine` offers them, with a record of those that are open.

    Attributes:
        engine: what the slots belong to.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._open: set[int] = set()

    def open(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], Logits]:
        """See `Engine.open`."""
        slots, logits = self.engine.open(prompts)
        self._open.update(slots)
        return slots, logits

    def advance(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Logits:
        """See `Engine.advance`."""
        return self.engine.advance(slots, tokens)

    def read(self, slots: Sequence[int], texts: Sequence[Sequence[int]]) -> list[tuple[list[int], Logits]]:
        """Appends long texts to slots, in portions that keep small what nobody asks for: inner logits.

        Returns:
            Groups of (indices into `slots`, the logits after the last token of each of these texts).
        """
        most = max(1, READ_VALUES // self.engine.vocabulary)
        found: list[tuple[list[int], Logits]] = []
        group: list[int] = []
        rests = []
        for slot, text in zip(slots, texts, strict=True):
            start = 0
            while len(text) - start > most:
                self.advance([slot], [text[start : start + most]])
                start += most
            rests.append(text[start:])
        for index in range(len(slots) + 1):
            full = index == len(slots) or sum(len(rests[i]) for i in group) + len(rests[index]) > most
            if group and full:
                logits = self.advance([slots[i] for i in group], [rests[i] for i in group])
                ends = [end - 1 for end in accumulate(len(rests[i]) for i in group)]
                found.append((group, logits.take(ends)))
                group = []
            group = [*group, index]
        return found

    def rewind(self, slot: int, count: int) -> None:
        """See `Engine.rewind`; a count of 0 does nothing."""
        if count:
            self.engine.rewind(slot, count)

    def fork(self, slot: int) -> int:
        """See `Engine.fork`."""
        copied = self.engine.fork(slot)
        self._open.add(copied)
        return copied

    def free(self, slots: Sequence[int]) -> None:
        """See `Engine.free`; no slots at all are fine."""
        if slots:
            self._open.difference_update(slots)
            self.engine.free(slots)

    def close(self) -> None:
        """Frees whatever is still open."""
        self.free(sorted(self._open))
