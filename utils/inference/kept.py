"""Prefixes of texts that outlive their requests: a system prompt, or a chat so far, is read once and then copied.

They are kept outside of the engine's cache: every step looks at all places of its longest row, and computes all rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from utils.inference.engine import Kept
from utils.inference.shared_prefixes import SHORTEST, common_length
from utils.inference.slots import Slots

BLOCK = 32  # tokens


@dataclass(eq=False)
class _Block:
    """Some tokens of a text behind those of its parents. Only a block without children has fewer than `BLOCK`."""

    tokens: tuple[int, ...] = ()
    parent: _Block | None = None
    state: Kept | None = None
    children: dict[tuple[int, ...], _Block] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """The beginning of a prompt that need not be read.

    Attributes:
        length: its tokens; at least one token of the prompt follows.
        states: for `Engine.restore`.
    """

    length: int
    states: list[Kept]


class KeptPrefixes:
    """States of prefixes in blocks of tokens. Blocks that texts share are kept once; the least recently used go first.

    Processes that share a model keep as many bytes of a token each, so that all forget the same blocks.

    Attributes:
        limit: most bytes.
        nbytes: bytes in use, never more than that.
    """

    def __init__(self, slots: Slots, limit: int) -> None:
        """
        Args:
            slots: of an engine that shares prefixes.
        """
        self.limit = limit
        self.nbytes = 0
        self._slots = slots
        self._root = _Block()
        # The least recently used first. A block's parents are used after it, so that none comes before its children:
        # the first one has none.
        self._blocks: OrderedDict[_Block, None] = OrderedDict()

    def find(self, prompt: Sequence[int]) -> Known | None:
        """The longest known prefix of a prompt; None if it is not worth a copy."""
        chain, length = self._chain(prompt)
        rest = tuple(prompt[length : length + BLOCK])
        alike = [block for tokens, block in chain[-1].children.items() if tokens[:1] == rest[:1]]
        if alike:
            nearest = max(alike, key=lambda block: common_length(block.tokens, rest))
            length += common_length(nearest.tokens, rest)
            chain.append(nearest)
        length = min(length, len(prompt) - 1)  # logits come from tokens that are read
        if length < SHORTEST:
            return None
        self._use(chain)
        blocks = chain[1 : 1 - (-length // BLOCK)]
        return Known(length, [block.state for block in blocks if block.state is not None])

    def store(self, slot: int, tokens: Sequence[int]) -> None:
        """Keeps what is not known yet of the first tokens of a slot, as far as there is room for it."""
        chain, length = self._chain(tokens)
        self._use(chain)
        pieces = [tuple(tokens[start : start + BLOCK]) for start in range(length, len(tokens), BLOCK)]
        if not pieces:
            return
        for other in list(chain[-1].children.values()):
            if other.tokens[: len(pieces[0])] == pieces[0]:  # goes on where this text ends
                self._use([*chain, other])
                return
            if pieces[0][: len(other.tokens)] == other.tokens:  # ended where this text goes on
                self._drop(other)
        pieces = pieces[: self._fitting(slot, pieces, chain)]
        if not pieces:
            return
        borders = [length, *(length + BLOCK * number + len(piece) for number, piece in enumerate(pieces))]
        for piece, state in zip(pieces, self._slots.engine.keep(slot, borders), strict=True):
            block = _Block(piece, chain[-1], state)
            chain[-1].children[piece] = block
            self._blocks[block] = None
            self.nbytes += state.nbytes
            chain.append(block)
        self._use(chain)

    def clear(self) -> None:
        """Forgets everything."""
        self._root.children.clear()
        self._blocks.clear()
        self.nbytes = 0

    def _chain(self, tokens: Sequence[int]) -> tuple[list[_Block], int]:
        """(the root and the blocks that a text begins with, their tokens)."""
        chain, length = [self._root], 0
        while (block := chain[-1].children.get(tuple(tokens[length : length + BLOCK]))) is not None:
            chain.append(block)
            length += len(block.tokens)
        return chain, length

    def _use(self, chain: Sequence[_Block]) -> None:
        for block in reversed(chain[1:]):
            self._blocks.move_to_end(block)

    def _fitting(self, slot: int, pieces: Sequence[Sequence[int]], chain: Sequence[_Block]) -> int:
        """For how many more blocks there is room, once those that were used less recently have gone."""
        used, tokens = set(chain), 0
        for number, piece in enumerate(pieces):
            tokens += len(piece)
            size = self._slots.engine.kept_bytes(slot, tokens)
            while self.nbytes + size > self.limit:
                oldest = next(iter(self._blocks), self._root)
                if oldest in used:
                    return number
                self._drop(oldest)
        return len(pieces)

    def _drop(self, block: _Block) -> None:
        """Forgets a block without children."""
        del self._blocks[block]
        if block.parent is not None and block.state is not None:
            del block.parent.children[block.tokens]
            self.nbytes -= block.state.nbytes
