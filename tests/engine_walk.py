"""A random walk over everything that an engine can do; each answer is compared with one training forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from family_cases import Case, hidden_logits

from utils.adapters.prefix import PrefixTuning
from utils.inference.engine import Engine, Kept

TOLERANCE = 1e-4
LONGEST = 40  # tokens of a text
ORDINARY = (3, 60)  # no special token of any case is among these ids


class Walk:
    """Opens, advances, rewinds, copies, keeps, restores and frees slots at random.

    What a slot should hold is kept here as a list of tokens; logits must be those of the training forward,
    which knows neither slots nor a cache.
    """

    def __init__(self, case: Case, engine: Engine, seed: int, prefix: PrefixTuning | None = None, slots: int = 5):
        """
        Args:
            prefix: that of the engine.
            slots: most that are open at once.
        """
        self.case, self.engine, self.prefix, self.slots = case, engine, prefix, slots
        self.random = np.random.default_rng(seed)
        self.longest = min(LONGEST, engine.max_positions or LONGEST)
        self.texts: dict[int, list[int]] = {}
        self.least: dict[int, int] = {}  # tokens that stay when a slot is rewound
        self.kept: list[tuple[list[int], list[int], list[Kept]]] = []  # texts, where they were cut, the pieces
        self.most_open = 0
        self.history: list[str] = []

    def run(self, moves: int) -> None:
        for _ in range(moves):
            found = self.possible()
            weights = np.array([weight for _, weight in found], dtype=float)
            found[self.random.choice(len(found), p=weights / weights.sum())][0]()
        self.advance(self.growing())  # what nobody named for long is still as it was
        self.free(list(self.texts))
        self.open()  # and an engine that was emptied works

    def possible(self) -> list[tuple[Callable[[], None], float]]:
        """(move, how often it should be made)."""
        found: list[tuple[Callable[[], None], float]] = []
        if len(self.texts) < self.slots:
            found.append((self.open, 3))
            if self.texts:
                found.append((self.fork, 3))
            if self.kept:
                found.append((self.restore, 3))
        if self.growing():
            found.append((lambda: self.advance(self.some(self.growing())), 8))
        if self.shrinking():
            found.append((self.rewind, 3))
        if self.texts and self.engine.shares_prefixes:
            found.append((self.keep, 2))
        if self.texts:
            found.append((lambda: self.free(self.some(list(self.texts))), 1.5))
        return found

    # --- moves ----------------------------------------------------------------------------------------

    def open(self) -> None:
        prompts = [self.prompt() for _ in range(self.random.integers(1, 1 + min(3, self.slots - len(self.texts))))]
        slots, logits = self.engine.open(prompts)
        self.note(f"open({prompts}) -> {slots}")
        assert len(set(slots)) == len(prompts) and not set(slots) & set(self.texts), self.history
        for slot, prompt in zip(slots, prompts, strict=True):
            self.hold(slot, prompt, len(prompt))
        self.compare(logits.numpy(), [(slot, 1) for slot in slots])

    def advance(self, slots: Sequence[int]) -> None:
        tokens = [self.ordinary(self.random.integers(1, 5))[: self.longest - len(self.texts[slot])] for slot in slots]
        self.note(f"advance({list(slots)}, {tokens})")
        logits = self.engine.advance(slots, tokens).numpy()
        for slot, added in zip(slots, tokens, strict=True):
            self.texts[slot] += added
        self.compare(logits, [(slot, len(added)) for slot, added in zip(slots, tokens, strict=True)])

    def rewind(self) -> None:
        slot = self.one(self.shrinking())
        count = int(self.random.integers(1, 1 + len(self.texts[slot]) - self.least[slot]))
        self.note(f"rewind({slot}, {count})")
        self.engine.rewind(slot, count)
        del self.texts[slot][-count:]

    def fork(self) -> None:
        slot = self.one(self.texts)
        count = int(self.random.integers(1, 1 + min(2, self.slots - len(self.texts))))
        new = self.engine.fork(slot, count)
        self.note(f"fork({slot}, {count}) -> {new}")
        assert len({*new} - {*self.texts}) == count, self.history
        for copy in new:
            self.hold(copy, self.texts[slot], self.least[slot])

    def keep(self) -> None:
        slot = self.one(self.texts)
        length = len(self.texts[slot])
        cuts = self.random.integers(1, length, self.random.integers(0, 3)).tolist() if length > 1 else []
        borders = sorted({0, *cuts, length})
        pieces = self.engine.keep(slot, borders[:2]) + (self.engine.keep(slot, borders[1:]) if borders[2:] else [])
        self.note(f"keep({slot}, {borders})")
        assert sum(piece.nbytes for piece in pieces) == self.engine.kept_bytes(slot, length) > 0
        self.kept = [*self.kept[-3:], (list(self.texts[slot]), borders, pieces)]

    def restore(self) -> None:
        """The beginnings of texts whose slots may have gone on or be free by now."""
        heads, kept = [], []
        for _ in range(self.random.integers(1, 1 + min(2, self.slots - len(self.texts)))):
            text, borders, pieces = self.kept[self.random.integers(len(self.kept))]
            heads.append(text[: self.random.integers(1, 1 + len(text))])
            kept.append(pieces[: sum(border < len(heads[-1]) for border in borders)])
        slots = self.engine.restore(heads, kept)
        self.note(f"restore({heads}) -> {slots}")
        assert not {*slots} & {*self.texts}, self.history
        for slot, head in zip(slots, heads, strict=True):
            self.hold(slot, head, len(head))

    def free(self, slots: Sequence[int]) -> None:
        self.note(f"free({list(slots)})")
        self.engine.free(slots)
        for slot in slots:
            del self.texts[slot]

    # --- what they need -------------------------------------------------------------------------------

    def hold(self, slot: int, text: Sequence[int], least: int) -> None:
        self.texts[slot] = list(text)
        self.least[slot] = 1 if self.engine.shares_prefixes else least
        self.most_open = max(self.most_open, len(self.texts))
        assert slot < self.most_open, self.history  # numbers of freed slots are used again

    def compare(self, found: np.ndarray, last: Iterable[tuple[int, int]]) -> None:
        """Checks logits of the last `count` tokens of each (slot, count)."""
        family, model = self.case.checkpoint.family, self.case.model
        wanted = [
            hidden_logits(family, model, np.array([self.texts[slot]]), self.prefix)[0, -count:] for slot, count in last
        ]
        difference = np.abs(found - np.concatenate(wanted)).max()
        assert difference < TOLERANCE, (difference, self.history)

    def note(self, move: str) -> None:
        self.history.append(move)

    def growing(self) -> list[int]:
        return [slot for slot, text in self.texts.items() if len(text) < self.longest]

    def shrinking(self) -> list[int]:
        return [slot for slot, text in self.texts.items() if len(text) > self.least[slot]]

    def some(self, slots: Sequence[int]) -> list[int]:
        """At least one of them, in any order."""
        return [int(slot) for slot in self.random.permutation(slots)[: self.random.integers(1, len(slots) + 1)]]

    def one(self, slots: Iterable[int]) -> int:
        return int(self.random.choice(list(slots)))

    def ordinary(self, count: int) -> list[int]:
        return [int(token) for token in self.random.integers(*ORDINARY, count)]

    def prompt(self) -> list[int]:
        """Of any length; with the special tokens that the case's own prompts have."""
        row = self.case.rows[self.random.integers(2)].tolist()
        return [*self.ordinary(self.random.integers(0, 6)), *row[self.random.integers(0, 3) :]]
