"""How prompts are read while answers run: who is next, how much at a time, and what a cancelled one leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from letters import VOCABULARY, Letters, engine_of

from utils.inference.generator import Completion, Generator
from utils.inference.request import Request
from utils.inference.sampling import SamplingOptions
from utils.inference.scheduler import Event, Scheduler

GREEDY = SamplingOptions(max_new_tokens=6)
LONG_ANSWER = SamplingOptions(max_new_tokens=200)


def prompt_of(length: int, seed: int = 0, head: Sequence[int] = ()) -> list[int]:
    return [*head, *np.random.default_rng(seed).integers(1, VOCABULARY, length).tolist()]


def finish(scheduler: Scheduler) -> dict[Request, list[Event]]:
    events: dict[Request, list[Event]] = {}
    while scheduler.busy:
        for event in scheduler.step():
            events.setdefault(event.request, []).append(event)
    return events


def alone(prompt: list[int], options: SamplingOptions) -> Completion:
    return Generator(engine_of(), Letters(), ()).generate([prompt], options)[0]


def test_a_long_prompt_makes_running_answers_wait_for_a_chunk_at_a_time() -> None:
    engine = engine_of()
    scheduler = Scheduler(engine, Letters(), (), 8, prefill_chunk=50)
    running = [scheduler.submit([n], LONG_ANSWER) for n in range(1, 5)]
    while not all(request.tokens for request in running):
        scheduler.step()
    before = len(engine.calls)
    long = scheduler.submit(prompt_of(1000), GREEDY)
    first = scheduler.step()
    assert [(event.request, event.opened) for event in first] == [(long, True)]
    while not long.tokens:
        scheduler.step()
    calls = engine.calls[before:]
    pieces = [tokens for _, tokens in calls if tokens != [1] * 4]
    assert pieces == [[50]] * 20
    assert all(one[1] == [1] * 4 or other[1] == [1] * 4 for one, other in pairwise(calls))
    events = finish(scheduler)
    assert events[long][-1].completion == alone(prompt_of(1000), GREEDY)
    for number, request in enumerate(running):
        assert events[request][-1].completion == alone([number + 1], LONG_ANSWER)


def test_short_prompts_take_turns_with_long_ones() -> None:
    """Each kind in the order in which it came; as many short ones together as a step may read."""
    engine = engine_of()
    scheduler = Scheduler(engine, Letters(), (), 9, prefill_chunk=30)
    lengths = {"long": 95, "a": 12, "longer": 140, "b": 14, "c": 9, "d": 30, "e": 5}
    names = {
        scheduler.submit(prompt_of(length, seed), replace(GREEDY, max_new_tokens=1)): name
        for seed, (name, length) in enumerate(lengths.items())
    }
    complete: list[list[str]] = []
    while scheduler.busy:
        complete.append([names[event.request] for event in scheduler.step() if event.completion])
    assert [tokens for _, tokens in engine.calls] == [
        [14, 12],  # as much as fits in 30
        [30],  # of the long one
        [9],  # the next does not fit beside it
        [30],
        [30],
        [30],
        [5],  # the last short one, and in the same step
        [5],  # what is left of the long one
        *[[30]] * 4,
        [20],
    ]
    assert [one for one in complete if one] == [["b", "a"], ["c"], ["d"], ["e", "long"], ["longer"]]


def test_a_common_head_is_read_in_chunks_too_and_once() -> None:
    engine, head = engine_of(), prompt_of(100, 9)
    scheduler = Scheduler(engine, Letters(), (), 8, prefill_chunk=40)
    prompts = [prompt_of(length, length, head) for length in (3, 50, 7)]
    requests = [scheduler.submit(prompt, GREEDY) for prompt in prompts]
    events = finish(scheduler)
    assert [tokens for _, tokens in engine.calls[:7]] == [[40], [40], [20], [40], [10], [7], [3]]
    found = [events[request][-1].completion for request in requests]
    assert found == [alone(prompt, GREEDY) for prompt in prompts]
    # the one that copies it first pays for the head
    assert sorted(one.cached_tokens for one in found if one) == [0, 100, 100] and not engine.texts


def test_log_probabilities_of_a_prompt_come_in_chunks_too() -> None:
    engine, prompt = engine_of(), prompt_of(50)
    options = replace(GREEDY, prompt_logprobs=True)
    scheduler = Scheduler(engine, Letters(), (), 2, prefill_chunk=20)
    request = scheduler.submit(prompt, options)
    events = finish(scheduler)
    assert [tokens for _, tokens in engine.calls[:4]] == [[1], [20], [20], [9]]
    assert events[request][-1].completion == alone(prompt, options)


def test_a_model_that_needs_the_whole_prompt_reads_it_whole() -> None:
    engine = engine_of(shares_prefixes=False)
    scheduler = Scheduler(engine, Letters(), (), 9, prefill_chunk=30)
    for length in (50, 12, 10, 14):
        scheduler.submit(prompt_of(length, length), GREEDY)
    finish(scheduler)
    assert [tokens for name, tokens in engine.calls if name == "open"] == [[50], [12, 10], [14]]


@pytest.mark.parametrize("steps", range(14))
@pytest.mark.parametrize("several", [False, True])
def test_a_cancelled_request_leaves_at_once_wherever_it_is(steps: int, several: bool) -> None:
    """Before its turn, in the middle of its prompt or of a head of it, and while it is answered."""
    engine, head = engine_of(), prompt_of(45, 9)
    scheduler = Scheduler(engine, Letters(), (), 4, prefill_chunk=20)
    running = [scheduler.submit([n], LONG_ANSWER) for n in (1, 2)]
    while not running[0].tokens:
        scheduler.step()
    prompt = prompt_of(30, 1, head)
    options = SamplingOptions(max_new_tokens=9, top_k=0, seed=5)
    leaving = [scheduler.submit(prompt, options, number=number) for number in range(3 if several else 1)]
    for _ in range(steps):
        scheduler.step()
    for request in leaving:
        scheduler.cancel(request)
    assert (scheduler.running, scheduler.waiting, len(engine.texts)) == (2, 0, 2)
    late = scheduler.submit(prompt_of(25, 2), options)
    events = finish(scheduler)
    assert set(events) == {*running, late} and not engine.texts
    assert events[late][-1].completion == alone(prompt_of(25, 2), options)
    for number, request in enumerate(running):
        assert events[request][-1].completion == alone([number + 1], LONG_ANSWER)


def test_one_of_several_answers_to_a_prompt_is_cancelled() -> None:
    """In each of the steps in turn; the other goes on as if alone, also with the head that both wait for."""
    options = SamplingOptions(max_new_tokens=5, top_k=0, seed=5)
    prompt = prompt_of(75, 1)
    for steps in range(12):
        engine = engine_of()
        scheduler = Scheduler(engine, Letters(), (), 4, prefill_chunk=20)
        first, second = (scheduler.submit(prompt, options, number=0) for _ in range(2))
        for _ in range(steps):
            scheduler.step()
        scheduler.cancel(first)
        events = finish(scheduler)
        assert second.finish_reason == "length" and not engine.texts
        assert second.tokens == list(alone(prompt, options).tokens)
        assert first not in events or not events[first][-1].completion
