"""The loop behind all answers: who joins when, shared heads, guesses, cancelling, and that no slot leaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import VOCABULARY, Letters, engine_of
from reference_engine import FunctionEngine, random_logits

from utils.inference import shared_prefixes
from utils.inference.engine import Logits
from utils.inference.generator import Completion, Generator
from utils.inference.lookup import Lookup
from utils.inference.request import Request
from utils.inference.sampling import SamplingOptions
from utils.inference.scheduler import Event, Scheduler, Speed

GREEDY = SamplingOptions(max_new_tokens=6)


def looping(text: list[int]) -> np.ndarray:
    """Mostly what followed the last two tokens before, so that greedy answers repeat themselves."""
    values = random_logits(VOCABULARY, 5, 1.0)(text[-6:])
    places = [place for place in range(2, len(text)) if text[place - 2 : place] == text[-2:]]
    if places and len(text) % 11:
        values[text[places[-1]]] += 6
    return values


def prompts_of(lengths: Sequence[int], head: Sequence[int] = ()) -> list[list[int]]:
    random = np.random.default_rng(3)
    return [[*head, *random.integers(1, VOCABULARY, length).tolist()] for length in lengths]


def run(scheduler: Scheduler) -> dict[Request, list[Event]]:
    events: dict[Request, list[Event]] = {}
    while scheduler.busy:
        for event in scheduler.step():
            events.setdefault(event.request, []).append(event)
    return events


def answer(engine: FunctionEngine, prompts: Sequence[list[int]], options: SamplingOptions, size: int = 4) -> list:
    found = Generator(engine, Letters()).generate(prompts, options, size)
    assert not engine.texts
    return found


# --- who runs when -----------------------------------------------------------------------------------


def test_the_next_prompt_takes_a_free_place_at_once() -> None:
    engine, lengths = engine_of(shares_prefixes=False), (2, 9, 3, 4, 5)
    scheduler = Scheduler(engine, Letters(), (), 2)
    requests = [scheduler.submit([7], replace(GREEDY, max_new_tokens=length)) for length in lengths]
    finished: list[tuple[int, int]] = []
    for _ in range(30):
        if not scheduler.busy:
            break
        for event in scheduler.step():
            if event.completion:
                finished.append((len(engine.calls), requests.index(event.request)))
        assert len(engine.texts) <= 2
    # row 0 ends with the second forward, the third opens row 2, which ends with the fifth, and so on
    assert finished == [(2, 0), (5, 2), (9, 3), (12, 1), (14, 4)]
    assert engine.calls[:4] == [("open", [1, 1]), ("advance", [1, 1]), ("open", [1]), ("advance", [1, 1])]
    assert not engine.texts and engine.most == 2


def test_requests_come_while_others_run() -> None:
    engine = engine_of()
    scheduler = Scheduler(engine, Letters(), None, 3)
    prompts = prompts_of([4, 7, 2, 5])
    first = scheduler.submit(prompts[0], GREEDY)
    assert [event.request for event in scheduler.step()] == [first]
    others = [scheduler.submit(prompt, GREEDY) for prompt in prompts[1:]]
    events = run(scheduler)
    found = [events[request][-1].completion for request in (first, *others)]
    assert found == answer(engine_of(), prompts, GREEDY, 1)
    assert scheduler.step() == [] and not engine.texts
    for request in others:  # tokens come with the events, each once
        assert [token for event in events[request] for token in event.tokens] == request.tokens


def test_streams_and_errors_side_by_side() -> None:
    engine = engine_of(max_positions=12)
    scheduler = Scheduler(engine, Letters(), (), 2)
    bad = scheduler.submit([], GREEDY)
    streamed = scheduler.submit([3, 4], GREEDY, stream=True)
    quiet = scheduler.submit(prompts_of([9])[0], GREEDY)
    events = run(scheduler)
    assert [event.completion and event.completion.error for event in events[bad]] == ["the prompt is empty"]
    whole = events[streamed][-1].completion
    assert whole and whole.text == "".join(event.text for event in events[streamed]) and len(whole.text) == 6
    assert all(event.text for event in events[streamed] if not event.opened) and not any(
        event.text for event in events[quiet]
    )
    cut = events[quiet][-1].completion
    assert cut and cut.note == "the answer was cut at 3 tokens: the model has 12 positions and the prompt takes 9"


def test_cancelled_requests_are_gone() -> None:
    engine = engine_of()
    scheduler = Scheduler(engine, Letters(), (), 2)
    prompts = prompts_of([4, 5, 6, 7])
    live, other, waiting, refused = [scheduler.submit(prompt, GREEDY) for prompt in [*prompts[:3], []]]
    scheduler.cancel(refused)
    assert [(event.request, event.opened) for event in scheduler.step()] == [(live, True), (other, True)]
    assert (scheduler.running, scheduler.waiting) == (2, 1) and not engine.texts
    scheduler.step()
    assert len(engine.texts) == 2
    for _ in range(2):
        scheduler.cancel(live)
        scheduler.cancel(waiting)
    assert len(engine.texts) == 1
    late = scheduler.submit(prompts[3], GREEDY)
    events = run(scheduler)
    assert set(events) == {other, late} and not engine.texts
    assert events[late][-1].completion == answer(engine_of(), [prompts[3]], replace(GREEDY))[0]
    scheduler.cancel(other)


def test_an_engine_that_fails_keeps_no_slots() -> None:
    class Failing(FunctionEngine):
        def advance(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], *, last: bool = False) -> Logits:
            if self.read > 60:
                raise MemoryError
            return super().advance(slots, tokens, last=last)

    engine = Failing(random_logits(VOCABULARY, 1), VOCABULARY)
    with pytest.raises(MemoryError):
        Generator(engine, Letters()).generate(prompts_of([3] * 6, range(1, 20)), replace(GREEDY, num_beams=2), 4)
    assert engine.calls and not engine.texts


def test_a_batch_needs_a_place() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        Scheduler(engine_of(), Letters(), (), 0)


# --- heads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 8])
def test_common_heads_are_read_once(size: int) -> None:
    head = np.random.default_rng(0).integers(1, VOCABULARY, 40).tolist()
    prompts = [*prompts_of([3, 9, 5, 7, 4], head), *prompts_of([6, 8]), [*head, 5], [*head, 5]]
    plain, shared = engine_of(shares_prefixes=False), engine_of()
    speed = Speed()
    generator = Generator(shared, Letters())
    generator.speed = speed
    assert generator.generate(prompts, GREEDY, size) == answer(plain, prompts, GREEDY, size)
    assert not shared.texts and shared.most <= size + 1  # the head takes no place of the batch
    assert plain.read - shared.read == 6 * 40 == speed.shared_tokens
    assert speed.prompt_tokens == sum(map(len, prompts))


def test_heads_within_heads() -> None:
    """A system prompt for all, and examples after it for some."""
    random = np.random.default_rng(0)
    system, shots = random.integers(1, VOCABULARY, 20).tolist(), random.integers(1, VOCABULARY, 30).tolist()
    prompts = [*prompts_of([9, 8, 7], system + shots), *prompts_of([35, 12, 3], system)]
    engine = engine_of()
    assert answer(engine, prompts, GREEDY, 8) == answer(engine_of(shares_prefixes=False), prompts, GREEDY, 8)
    opened = [tokens for name, tokens in engine.calls if name == "open"]
    assert opened == [[20]]
    prefill = 20 + 30 + sum((9, 8, 7, 35, 12, 3))
    assert engine.read == prefill + sum(len(tokens) for name, tokens in engine.calls[3:])


def test_few_common_tokens_are_not_worth_a_head() -> None:
    engine = engine_of()
    answer(engine, prompts_of([2, 2], range(1, 16)), GREEDY)
    assert engine.calls[0] == ("open", [17] * 2)


def test_many_heads_do_not_pile_up() -> None:
    """Pairs of prompts with heads of their own, all first ones before all second ones."""
    pairs = [prompts_of([2, 2], np.random.default_rng(n).integers(1, VOCABULARY, 20).tolist()) for n in range(9)]
    prompts = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    engine = engine_of()
    assert answer(engine, prompts, GREEDY, 1) == answer(engine_of(shares_prefixes=False), prompts, GREEDY)
    assert engine.most <= shared_prefixes.MOST + 2


def test_cancelling_the_last_that_waits_frees_the_head() -> None:
    engine = engine_of()
    scheduler = Scheduler(engine, Letters(), (), 1)
    first, second = [scheduler.submit(prompt, GREEDY) for prompt in prompts_of([2, 3], range(1, 20))]
    scheduler.step()
    scheduler.step()
    assert len(engine.texts) == 2
    scheduler.cancel(second)
    assert len(engine.texts) == 1
    assert set(run(scheduler)) == {first} and not engine.texts


# --- guesses -----------------------------------------------------------------------------------------


def test_a_draft_is_what_followed_the_latest_match() -> None:
    lookup = Lookup([1, 2, 3, 4, 9, 2, 3, 5, 6, 2, 3])
    assert lookup.draft(3) == [5, 6, 2]
    assert lookup.draft(0) == []
    lookup.accept(4)  # "2 3 4" occurred once, followed by 9
    assert lookup.draft(2) == [9, 2]
    lookup.accept(7)
    assert lookup.draft(2) == []
    assert Lookup([5]).draft(4) == Lookup([]).draft(4) == []
    assert Lookup([1, 2, 1, 2]).draft(9) == [1, 2]


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(),
        SamplingOptions(repetition_penalty=1.05, presence_penalty=0.1, frequency_penalty=0.05, logprobs=True),
        SamplingOptions(no_repeat_ngram_size=9, min_new_tokens=50),
        SamplingOptions(stop=("ab", "q")),
        SamplingOptions(top_k=0, temperature=0.8, seed=4, logprobs=True, top_logprobs=2),
        SamplingOptions(top_k=5, top_p=0.9, min_p=0.05, seed=9, stop=("k",)),
    ],
)
@pytest.mark.parametrize("drafted", [1, 3, 10])
def test_guesses_change_no_text(options: SamplingOptions, drafted: int) -> None:
    options = replace(options, max_new_tokens=60)
    prompts = prompts_of([8, 20, 3, 12])
    slow, fast = (FunctionEngine(looping, VOCABULARY, max_positions=75) for _ in range(2))
    generator = Generator(fast, Letters())
    found = generator.generate(prompts, replace(options, prompt_lookup_num_tokens=drafted), 3)
    wanted = answer(slow, prompts, options, 3)
    assert found == wanted and not fast.texts
    speed = generator.speed
    assert speed.drafted_tokens >= speed.accepted_tokens
    if not options.stop:
        assert speed.accepted_tokens > 3 and len(fast.calls) < len(slow.calls)
    assert speed.decode_tokens == sum(len(one.tokens) for one in wanted) - len(wanted)


def test_guesses_save_forwards() -> None:
    """A model that copies its prompt: 30 tokens in 6 forwards of 1 + 5 tokens."""
    prompt = [*range(1, 21), 1, 2]

    def copying(text: list[int]) -> np.ndarray:
        return np.eye(VOCABULARY)[prompt[len(text) % 20]]

    engine = FunctionEngine(copying, VOCABULARY)
    generator = Generator(engine, Letters())
    options = SamplingOptions(max_new_tokens=31, prompt_lookup_num_tokens=5)
    (found,) = generator.generate([prompt], options)
    assert list(found.tokens) == [prompt[place % 20] for place in range(22, 53)]
    assert [tokens for _, tokens in engine.calls[1:]] == [[6]] * 5
    assert (generator.speed.drafted_tokens, generator.speed.accepted_tokens) == (25, 25)


# --- everything together -----------------------------------------------------------------------------

REQUESTS = st.tuples(
    st.integers(0, 8),  # the step in which it comes
    st.integers(1, 6),  # own tokens
    st.booleans(),  # with the common head
    st.sampled_from([1, 1, 2, 3]),  # beams
    st.sampled_from([0, 4]),  # guesses
    st.sampled_from([1, 0]),  # top_k
    st.integers(1, 9),  # longest answer
    st.one_of(st.none(), st.integers(0, 6)),  # cancelled that many steps later
)


@given(st.lists(REQUESTS, min_size=1, max_size=7), st.integers(1, 5), st.sampled_from([None, 1, 4, 7, 20]))
@settings(max_examples=100, deadline=None)
def test_any_mixture_gives_each_request_its_own_answer(plans: list[tuple], size: int, chunk: int | None) -> None:
    head = [1 + n % 7 for n in range(18)]
    engine = FunctionEngine(looping, VOCABULARY)
    scheduler = Scheduler(engine, Letters(), None, size, prefill_chunk=chunk)
    requests: dict[int, Request] = {}
    found: dict[int, Completion] = {}
    asked = {}
    for number, (_, own, headed, beams, guesses, top_k, longest, _) in enumerate(plans):
        prompt = prompts_of([own], head if headed else [number + 1])[0]
        extra = {"num_beams": beams} if beams > 1 else {"prompt_lookup_num_tokens": guesses, "top_k": top_k}
        asked[number] = (prompt, SamplingOptions(max_new_tokens=longest, seed=3, **extra))
    for step in range(400):
        for number, plan in enumerate(plans):
            if plan[0] == step:
                requests[number] = scheduler.submit(*asked[number], number=number)
            if plan[-1] is not None and plan[0] + plan[-1] == step:
                scheduler.cancel(requests[number])
        if step > 15 and not scheduler.busy:
            break
        for event in scheduler.step():
            number = next(n for n, request in requests.items() if request is event.request)
            assert number not in found
            if event.completion:
                found[number] = event.completion
        assert len(engine.texts) <= max(size, 3) + shared_prefixes.MOST
    assert not engine.texts
    for number, plan in enumerate(plans):
        if plan[-1] is None:
            assert number in found
    for number, completion in found.items():
        alone = Generator(FunctionEngine(looping, VOCABULARY), Letters())
        prompt, options = asked[number]
        assert completion == alone.generate([prompt], options, numbers=[number])[0]


def test_stop_words_are_read_once_for_all_answers_that_have_them() -> None:
    """It takes time between two steps: a request has up to 64 answers."""
    read = []

    class Counting(Letters):
        def encode(self, text: str) -> list[int]:
            read.append(text)
            return super().encode(text)

    scheduler = Scheduler(FunctionEngine(looping, VOCABULARY), Counting())
    for number in range(3):
        scheduler.submit([3, 4], SamplingOptions(stop=("ab", "q")), number=number)
    assert read == ["ab", "q"]
