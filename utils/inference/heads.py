"""Prompts that begin alike (a system prompt, examples): the common head is read once and copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from utils.inference.slots import Slots

# A head shorter than this is read again each time: a copy costs about as much.
SHORTEST = 16
# Most heads that are kept at a time: each holds memory like an answer in the making. Of more, the one
# that was used least recently goes.
MOST = 4
# How many of the waiting prompts are compared with one that is opened, so that a file of many
# thousand rows costs no time per row.
WINDOW = 256


@dataclass(eq=False)
class Head:
    """The beginning of some prompts, read into a slot of its own."""

    tokens: tuple[int, ...]
    slot: int

    def begins(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt begins with this head and goes on after it."""
        length = len(self.tokens)
        return len(prompt) > length and tuple(prompt[:length]) == self.tokens


class Heads:
    """The heads that are kept at the moment.

    Attributes:
        read: tokens that were read into heads so far.
    """

    def __init__(self, slots: Slots) -> None:
        self.read = 0
        self._slots = slots
        self._heads: list[Head] = []

    def find(self, prompt: Sequence[int], others: Sequence[Sequence[int]]) -> Head | None:
        """The longest head of a prompt that is kept already or that others have in common with it.

        A head may begin with a shorter one: few-shot examples after a common system prompt.

        Args:
            prompt: to be opened now.
            others: prompts that are opened with it or wait.
        """
        kept = [head for head in self._heads if head.begins(prompt)]
        found = max(kept, key=lambda head: len(head.tokens), default=None)
        known = len(found.tokens) if found else 0
        lengths = []
        while (common := _shared(prompt, others, known)) > known:
            lengths.append(known := common)
        for length in lengths:
            found = self._add(tuple(prompt[:length]), found)
        if found is not None:
            self._heads.remove(found)
            self._heads.append(found)  # used most recently
        return found

    def release(self, waiting: Sequence[Sequence[int]]) -> None:
        """Frees the heads that no waiting prompt begins with, and those beyond the most that are kept."""
        kept = [head for head in self._heads if any(head.begins(prompt) for prompt in waiting)][-MOST:]
        unused = [head.slot for head in self._heads if head not in kept]
        self._heads = kept
        self._slots.free(unused)

    def forget(self) -> None:
        """Knows no heads any more; their slots are freed by who closes all."""
        self._heads = []

    def _add(self, tokens: tuple[int, ...], parent: Head | None) -> Head:
        if parent is None:
            (slot,), _ = self._slots.open([tokens])
            self.read += len(tokens)
        else:
            (slot,) = self._slots.fork(parent.slot)
            rest = tokens[len(parent.tokens) :]
            self._slots.advance([slot], [rest], last=True)
            self.read += len(rest)
        head = Head(tokens, slot)
        self._heads.append(head)
        return head


def _shared(prompt: Sequence[int], others: Sequence[Sequence[int]], known: int) -> int:
    """Length of the next longer head that a prompt shares with others; `known` if there is none."""
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
