"""Prefixes that outlive their requests: what is found again, what goes first, and that memory has a bound."""

from __future__ import annotations

import gc
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_cases import ENGINES, case
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import VOCABULARY, Letters, engine_of

from utils import runtime
from utils.inference.generator import Generator
from utils.inference.kept import BLOCK, KeptPrefixes
from utils.inference.request import Completion, Request
from utils.inference.sampling import SamplingOptions
from utils.inference.scheduler import Scheduler
from utils.inference.shared_prefixes import MOST, SHORTEST, common_length
from utils.inference.slots import Slots

GREEDY = SamplingOptions(max_new_tokens=6)
TOKEN = 10  # bytes in the reference engine


def tokens_of(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, VOCABULARY, count).tolist()


class Keeping:
    """Kept prefixes over an engine that checks what is restored."""

    def __init__(self, limit: int) -> None:
        self.engine = engine_of()
        self.slots = Slots(self.engine)
        self.prefixes = KeptPrefixes(self.slots, limit * TOKEN)

    def store(self, text: list[int]) -> None:
        (slot,), _ = self.slots.open([text])
        self.prefixes.store(slot, text)
        self.slots.free([slot])
        self.check()

    def find(self, prompt: list[int]) -> int:
        """Length of the known prefix, which is restored."""
        known = self.prefixes.find(prompt)
        self.check()
        if known is None:
            return 0
        (slot,) = self.slots.restore([prompt[: known.length]], [known.states])
        assert self.engine.texts[slot] == prompt[: known.length]
        self.slots.free([slot])
        return known.length

    def check(self) -> None:
        check(self.prefixes)


def check(prefixes: KeptPrefixes) -> None:
    """The bytes are those of the blocks, which hang together."""
    blocks = list(prefixes._blocks)
    assert prefixes.nbytes == sum(block.state.nbytes for block in blocks if block.state) <= prefixes.limit
    assert all(len(block.tokens) == BLOCK or not block.children for block in blocks)
    assert all(block.parent and block.parent.children[block.tokens] is block for block in blocks)
    assert all(child in prefixes._blocks for block in [prefixes._root, *blocks] for child in block.children.values())


def test_a_text_that_goes_on_is_known_to_its_last_token() -> None:
    keeping, chat = Keeping(10_000), tokens_of(0, 500)
    for length in (40, 41, 75, 96, 97, 300, 301):
        keeping.store(chat[:length])
        assert keeping.prefixes.nbytes == TOKEN * length  # nothing is there twice
        assert keeping.find(chat) == length
        assert keeping.find(chat[:length]) == length - 1  # one token is read for its logits
    keeping.store(chat[:120])
    assert keeping.prefixes.nbytes == TOKEN * 301
    assert keeping.find(chat[:SHORTEST]) == 0 and keeping.find(chat[: SHORTEST + 1]) == SHORTEST


def test_texts_that_part_share_what_is_before() -> None:
    keeping, system = Keeping(10_000), tokens_of(0, 100)
    for seed in (1, 2):
        keeping.store([*system, *tokens_of(seed, 50)])
    assert keeping.prefixes.nbytes == TOKEN * (150 + 50 + 100 % BLOCK)
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
    assert nothing.prefixes.nbytes == 0 and nothing.find(text) == 0


def test_everything_can_be_forgotten() -> None:
    keeping, text = Keeping(1000), tokens_of(1, 100)
    keeping.store(text)
    keeping.prefixes.clear()
    keeping.check()
    assert keeping.prefixes.nbytes == 0 and keeping.find(text) == 0


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


# --- in a scheduler ----------------------------------------------------------------------------------


def finish(scheduler: Scheduler) -> dict[Request, Completion]:
    found = {}
    while scheduler.busy:
        found.update({event.request: event.completion for event in scheduler.step() if event.completion})
    return found


def alone(
    prompt: list[int], options: SamplingOptions, number: int = 0, ends: Collection[int] | None = ()
) -> Completion:
    return Generator(engine_of(), Letters(), ends).generate([prompt], options, numbers=[number])[0]


@pytest.mark.parametrize("chunk", [None, 20])
def test_the_next_turn_of_a_chat_reads_what_is_new(chunk: int | None) -> None:
    engine = engine_of()
    scheduler = Scheduler(engine, Letters(), (), 2, prefill_chunk=chunk, prompt_cache_bytes=10_000)
    history, known = tokens_of(0, 50), 0
    for _ in range(4):
        before = engine.read
        request = scheduler.submit(history, GREEDY)
        (found,) = finish(scheduler).values()
        assert found == replace(alone(history, GREEDY), cached_tokens=known) and not engine.texts
        assert engine.read - before == len(history) - known + len(found.tokens) - 1
        known = len(history) + len(found.tokens) - 1
        assert scheduler.cache_bytes == TOKEN * known
        history = [*history, *request.tokens, *tokens_of(len(history), 20)]
    assert (
        scheduler.speed.shared_tokens == sum((0, 55, 81, 107)) and scheduler.speed.prompt_tokens == 50 + 76 + 102 + 128
    )
    scheduler.close()
    assert scheduler.cache_bytes == 0


@pytest.mark.parametrize("chunk", [None, 30])
def test_prompts_that_come_together_begin_with_what_is_kept(chunk: int | None) -> None:
    """A common system prompt is kept; what several have in common beyond it is read once for all."""
    engine, system, shots = engine_of(), tokens_of(1, 100), tokens_of(2, 50)
    scheduler = Scheduler(engine, Letters(), (), 4, prefill_chunk=chunk, prompt_cache_bytes=100_000)
    scheduler.submit([*system, 5], GREEDY)
    finish(scheduler)
    before = engine.read
    prompts = [*([*system, *shots, *tokens_of(seed, 9)] for seed in (3, 4, 5)), [*system, *tokens_of(6, 30)]]
    requests = [scheduler.submit(prompt, GREEDY) for prompt in prompts]
    found = finish(scheduler)
    new = 50 + 3 * 9 + 30
    assert engine.read - before == new + 4 * 5
    assert scheduler.speed.shared_tokens == sum(map(len, prompts)) - new
    assert [found[request].cached_tokens for request in requests] == [100, 150, 150, 100]
    for request, prompt in zip(requests, prompts, strict=True):
        assert found[request].tokens == alone(prompt, GREEDY).tokens
    assert not engine.texts


def test_a_prompt_that_is_cancelled_half_way_leaves_nothing() -> None:
    engine = engine_of()
    scheduler = Scheduler(engine, Letters(), (), 2, prefill_chunk=10, prompt_cache_bytes=10_000)
    for steps in (0, 1, 3):
        request = scheduler.submit(tokens_of(1, 50), GREEDY)
        for _ in range(steps):
            scheduler.step()
        scheduler.cancel(request)
        assert not engine.texts and not scheduler.busy and scheduler.cache_bytes == 0


def test_without_a_bound_nothing_outlives_a_request() -> None:
    engine = engine_of()
    scheduler = Scheduler(engine, Letters(), (), 2)
    for _ in range(2):
        scheduler.submit(tokens_of(1, 50), GREEDY)
        finish(scheduler)
    assert engine.read == 2 * 55 and scheduler.cache_bytes == 0


@pytest.mark.parametrize(("chunk", "limit"), [(None, 200), (7, 400), (40, 3000)])
def test_hundreds_of_requests_and_cancels_at_random(chunk: int | None, limit: int) -> None:
    """Slots, bytes and answers hold after every step."""
    random, engine, size = np.random.default_rng(limit), engine_of(), 4
    scheduler = Scheduler(engine, Letters(), None, size, prefill_chunk=chunk, prompt_cache_bytes=limit * TOKEN)
    kept: Any = scheduler._kept
    texts = [tokens_of(seed, 150) for seed in range(4)]  # chats that grow and begin anew
    asked: dict[Request, tuple[list[int], SamplingOptions, int]] = {}
    cancelled: set[Request] = set()
    found: dict[Request, Completion] = {}
    while len(asked) < 700 or scheduler.busy:
        if len(asked) < 700 and random.random() < 0.5:
            chat = texts[random.integers(4)]
            prompt = [*chat[: random.integers(1, len(chat) + 1)], *tokens_of(int(random.integers(9)), 5)]
            sampled = {"top_k": 0, "seed": 3} if random.random() < 0.3 else {}
            options = replace(GREEDY, max_new_tokens=int(random.integers(1, 9)), **sampled)
            if random.random() < 0.1:
                options = SamplingOptions(max_new_tokens=4, num_beams=2)
            elif random.random() < 0.05:
                options = replace(options, prompt_logprobs=True)
            for number in range(random.choice([1, 1, 3])):  # several answers to one prompt
                asked[scheduler.submit(prompt, options, number=number)] = (prompt, options, number)
        if asked and random.random() < 0.1:
            request = list(asked)[-int(random.integers(1, min(9, len(asked)) + 1))]
            scheduler.cancel(request)
            cancelled.add(request)
        for event in scheduler.step():
            assert event.request not in found and event.request not in cancelled
            if event.completion:
                found[event.request] = event.completion
                chat = texts[random.integers(4)]
                chat[:] = [*event.request.prompt, *event.completion.tokens][-200:] if len(chat) < 400 else chat[:100]
        check(kept)
        assert len(engine.texts) <= size + MOST
    assert not engine.texts and set(found) | cancelled == set(asked)
    for request, completion in found.items():
        assert replace(completion, cached_tokens=0) == alone(*asked[request], ends=None)
        assert 0 <= completion.cached_tokens < len(request.prompt)
    hits = sum(completion.cached_tokens for completion in found.values())
    assert hits > 0.2 * sum(len(request.prompt) for request in found)


@pytest.mark.slow
def test_memory_is_flat_over_a_thousand_requests() -> None:
    """Of a real engine, whose kept prefixes have gone and come again many times."""
    scheduler = Scheduler(
        ENGINES["inference"](case("llama_tiny")), Letters(), (), 4, prefill_chunk=16, prompt_cache_bytes=2**20
    )
    limit, used = 2**20, []
    for number in range(1000):
        scheduler.submit([*tokens_of(number % 7, 20), *tokens_of(1000 + number, 20)], GREEDY)
        if number % 4 == 3:
            finish(scheduler)
            assert scheduler.cache_bytes <= limit
        if number % 100 == 99:
            used.append(memory())
    assert scheduler.cache_bytes > 0.9 * limit
    assert max(used[6:]) < 1.02 * max(used[3:6])  # the bound is reached after a third


def memory() -> int:
    """Bytes that this process has in use, freed ones given back."""
    gc.collect()
    runtime.give_back_freed_memory()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
