"""The slots that one user of an engine has open, so that none is left open whatever goes wrong."""

from __future__ import annotations

from collections.abc import Sequence

from utils.inference.engine import Engine, Kept, Logits


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

    def advance(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], *, last: bool = False) -> Logits:
        """See `Engine.advance`."""
        return self.engine.advance(slots, tokens, last=last)

    def rewind(self, slot: int, count: int) -> None:
        """See `Engine.rewind`; a count of 0 does nothing."""
        if count:
            self.engine.rewind(slot, count)

    def fork(self, slot: int, count: int = 1) -> list[int]:
        """See `Engine.fork`."""
        copies = self.engine.fork(slot, count)
        self._open.update(copies)
        return copies

    def restore(self, prefixes: Sequence[Sequence[int]], kept: Sequence[Sequence[Kept]]) -> list[int]:
        """See `Engine.restore`."""
        slots = self.engine.restore(prefixes, kept)
        self._open.update(slots)
        return slots

    def free(self, slots: Sequence[int]) -> None:
        """See `Engine.free`; no slots at all are fine."""
        if slots:
            self._open.difference_update(slots)
            self.engine.free(slots)

    def close(self) -> None:
        """Frees whatever is still open."""
        self.free(sorted(self._open))
