"""Prompts that begin alike (a system prompt, examples): the common prefix is read once and copied."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from utils.inference.slots import Slots

# A prefix shorter than this is read again each time: a copy costs about as much.
SHORTEST = 16
# Most prefixes that are kept at a time: each holds memory like an answer in the making. Of more, the one
# that was used least recently goes.
MOST = 4
# How many of the waiting prompts are compared with one that is opened, so that a file of many
# thousand rows costs no time per row.
WINDOW = 256


@dataclass(eq=False)
class SharedPrefix:
    """The beginning of some prompts, which is read into a slot of its own.

    Attributes:
        parent: the shorter prefix that it begins with.
        slot: None before it is read.
        known: how many of its tokens were not read, as they were kept before.
    """

    tokens: tuple[int, ...]
    parent: SharedPrefix | None = None
    slot: int | None = None
    known: int = 0
    _is_claimed: bool = False

    def begins(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt begins with this prefix and goes on after it."""
        length = len(self.tokens)
        return len(prompt) > length and tuple(prompt[:length]) == self.tokens

    def claim(self) -> int:
        """How many of its tokens were read for the one that copies it now: of the first one all but what others
        have claimed with its parents, then none."""
        if self._is_claimed:
            return 0
        self._is_claimed = True
        if self.known:
            return len(self.tokens) - self.known
        shorter = (0, 0) if self.parent is None else (len(self.parent.tokens), self.parent.claim())
        return len(self.tokens) - shorter[0] + shorter[1]


class SharedPrefixes:
    """The prefixes that are kept at the moment, and those that are to be read."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._prefixes: list[SharedPrefix] = []
        self._new: list[SharedPrefix] = []

    def find(self, prompt: Sequence[int], others: Sequence[Sequence[int]], known: int = 0) -> SharedPrefix | None:
        """The longest prefix of a prompt that is here already or that others have in common with it.

        Of the latter nothing is read yet, see `found_anew`. A prefix may begin with a shorter one: few-shot examples
        after a common system prompt.

        Args:
            prompt: of which nothing is read yet.
            others: prompts of which nothing is read either.
            known: tokens of the prompt that need not be read in any case.
        """
        kept = [prefix for prefix in self._prefixes if prefix.begins(prompt)]
        found = max(kept, key=lambda prefix: len(prefix.tokens), default=None)
        known = max(known, len(found.tokens) if found else 0)
        lengths = []
        while (common := _shared(prompt, others, known)) > known:
            lengths.append(known := common)
        for length in lengths:
            found = SharedPrefix(tuple(prompt[:length]), found)
            self._prefixes.append(found)
            self._new.append(found)
        if found is not None:
            self._prefixes.remove(found)
            self._prefixes.append(found)  # used most recently
        return found

    def found_anew(self) -> list[SharedPrefix]:
        """The prefixes that were found since the last call, in the order in which they can be read."""
        new, self._new = self._new, []
        return new

    def has(self, prefix: SharedPrefix) -> bool:
        """Whether it is still needed."""
        return prefix in self._prefixes

    def release(self, waiting: Sequence[Sequence[int]], starting: Collection[SharedPrefix] = ()) -> None:
        """Frees the prefixes that no waiting prompt begins with, and those beyond the most that are kept.

        Args:
            starting: prefixes that will be copied next. They stay.
        """
        needed = set(starting)
        for prefix in reversed(self._prefixes):  # a parent comes before those that begin with it
            if prefix in needed and prefix.slot is None and prefix.parent is not None:
                needed.add(prefix.parent)
        useful = [prefix for prefix in self._prefixes if any(prefix.begins(prompt) for prompt in waiting)][-MOST:]
        kept = [prefix for prefix in self._prefixes if prefix in needed or prefix in useful]
        unused = [prefix.slot for prefix in self._prefixes if prefix not in kept and prefix.slot is not None]
        self._prefixes = kept
        self._slots.free(unused)

    def forget(self) -> None:
        """Knows no prefixes any more; their slots are freed by who closes all."""
        self._prefixes, self._new = [], []


def _shared(prompt: Sequence[int], others: Sequence[Sequence[int]], known: int) -> int:
    """Length of the next longer prefix that a prompt shares with others; `known` if there is none."""
    enough = known + SHORTEST
    start = list(prompt[:enough])
    # Every prompt keeps a token to itself, since logits come from tokens that are read.
    mates = [other for other in others if len(other) > enough and list(other[:enough]) == start]
    if not mates or len(prompt) <= enough:
        return known
    return min(len(prompt) - 1, *(min(common_length(prompt, other), len(other) - 1) for other in mates))


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # comparing slices is much faster than comparing tokens one by one
        middle = (low + high + 1) // 2
        if list(one[low:middle]) == list(other[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low
