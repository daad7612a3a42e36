"""How prompts are read while answers run: who is next, how much at a time, and what a cancelled one leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from letters import VOCABULARY, Letters, engine_of

from utils.inference.generator import Generator
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


def alone(prompt: list[int], options: SamplingOptions) -> object:
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
