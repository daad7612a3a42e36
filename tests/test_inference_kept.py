"""Heads that outlive their requests: what is found again, what goes first, and that memory has a bound."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_engine import FunctionEngine, random_logits

from utils.inference.heads import SHORTEST, common_length
from utils.inference.kept import BLOCK, KeptHeads
from utils.inference.slots import Slots

VOCABULARY = 24
TOKEN = 10  # bytes in the reference engine


def tokens_of(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, VOCABULARY, count).tolist()


class Keeping:
    """Kept heads over an engine that checks what is restored."""

    def __init__(self, limit: int) -> None:
        self.engine = FunctionEngine(random_logits(VOCABULARY, 1), VOCABULARY)
        self.slots = Slots(self.engine)
        self.heads = KeptHeads(self.slots, limit * TOKEN)

    def store(self, text: list[int]) -> None:
        (slot,), _ = self.slots.open([text])
        self.heads.store(slot, text)
        self.slots.free([slot])
        self.check()

    def find(self, prompt: list[int]) -> int:
        """Length of the known head, which is restored."""
        known = self.heads.find(prompt)
        self.check()
        if known is None:
            return 0
        (slot,) = self.slots.restore([prompt[: known.length]], [known.states])
        assert self.engine.texts[slot] == prompt[: known.length]
        self.slots.free([slot])
        return known.length

    def check(self) -> None:
        """The bytes are those of the blocks, which hang together."""
        heads = self.heads
        blocks = list(heads._blocks)
        assert heads.nbytes == sum(block.state.nbytes for block in blocks if block.state) <= heads.limit
        assert all(len(block.tokens) == BLOCK or not block.children for block in blocks)
        assert all(block.parent and block.parent.children[block.tokens] is block for block in blocks)
        assert all(child in heads._blocks for block in [heads._root, *blocks] for child in block.children.values())


def test_a_text_that_goes_on_is_known_to_its_last_token() -> None:
    keeping, chat = Keeping(10_000), tokens_of(0, 500)
    for length in (40, 41, 75, 96, 97, 300, 301):
        keeping.store(chat[:length])
        assert keeping.heads.nbytes == TOKEN * length  # nothing is there twice
        assert keeping.find(chat) == length
        assert keeping.find(chat[:length]) == length - 1  # one token is read for its logits
    keeping.store(chat[:120])
    assert keeping.heads.nbytes == TOKEN * 301
    assert keeping.find(chat[:SHORTEST]) == 0 and keeping.find(chat[: SHORTEST + 1]) == SHORTEST


def test_texts_that_part_share_what_is_before() -> None:
    keeping, system = Keeping(10_000), tokens_of(0, 100)
    for seed in (1, 2):
        keeping.store([*system, *tokens_of(seed, 50)])
    assert keeping.heads.nbytes == TOKEN * (150 + 50 + 100 % BLOCK)
    assert keeping.find([*system, *tokens_of(1, 90)]) == 150
    assert keeping.find([*system, *tokens_of(3, 90)]) in range(100, 103)
    assert keeping.find([tokens_of(9, 1)[0] + 1, *system]) == 0


def test_what_was_used_least_recently_goes_first() -> None:
    keeping = Keeping(300)
    first, second, third = (tokens_of(seed, 96) for seed in (1, 2, 3))
    for text in (first, second, third):
        keeping.store(text)
    keeping.find([*first, 1])
    keeping.store(tokens_of(4, 64))  # the end of the second makes room for it
    assert [keeping.find([*text, 1]) for text in (first, third, second)] == [96, 96, 32]
    keeping.store(tokens_of(5, 200))  # and of a long one the first blocks stay
    assert [keeping.find([*text, 1]) for text in (tokens_of(5, 200), second, first)] == [200, 32, 0]


def test_a_text_longer_than_the_bound_does_not_displace_itself() -> None:
    keeping, text = Keeping(100), tokens_of(1, 500)
    for _ in range(2):
        keeping.store(text)
        assert keeping.find(text) == 96
    nothing = Keeping(BLOCK - 1)
    nothing.store(text)
    assert nothing.heads.nbytes == 0 and nothing.find(text) == 0


def test_counts_are_of_tokens() -> None:
    keeping, text = Keeping(1000), tokens_of(1, 100)
    keeping.find(text)
    keeping.store(text)
    keeping.find([*text[:50], 0, 0])
    assert (keeping.heads.queries, keeping.heads.hits) == (152, 50)
    keeping.heads.clear()
    keeping.check()
    assert keeping.heads.nbytes == 0 and keeping.find(text) == 0


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 90), st.integers(0, 70)), max_size=40),
    st.integers(0, 400),
)
@settings(max_examples=150, deadline=None)
def test_any_texts_within_any_bound(moves: list[tuple[bool, int, int, int]], limit: int) -> None:
    """What is found is never longer than what was stored, and without a lack of room as long."""
    keeping, stored = Keeping(limit), []
    for stores, seed, shared, own in moves:
        text = [*tokens_of(0, 90)[:shared], *tokens_of(seed, own), 1]
        if stores:
            keeping.store(text)
            stored.append(text)
            continue
        best = max((min(common_length(text, other), len(text) - 1) for other in stored), default=0)
        found = keeping.find(text)
        assert found <= best
        if sum(map(len, stored)) <= limit:
            assert found == (best if best >= SHORTEST else 0)
