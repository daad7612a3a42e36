"""Sixteen answers at once, their prompts read in chunks, are the answers to each prompt alone: every family."""

from __future__ import annotations

import numpy as np
import pytest
from family_cases import ENGINES, WITH_TOKENIZER, case
from letters import Letters

from utils.inference.generator import Generator
from utils.inference.sampling import SamplingOptions
from utils.inference.scheduler import Event, Scheduler

OPTIONS = SamplingOptions(max_new_tokens=8)
ENGINE_NAMES = ("plain", "inference")


@pytest.mark.parametrize("engine_name", ENGINE_NAMES)
@pytest.mark.parametrize("name", WITH_TOKENIZER)
def test_sixteen_at_once_are_each_as_alone(name: str, engine_name: str) -> None:
    one = case(name)
    engine = ENGINES[engine_name](one)
    random = np.random.default_rng(1)
    row = one.rows[0].tolist()
    head = random.integers(3, 60, 20).tolist()
    # of many lengths, some behind a common head; the special tokens of the family come last
    own = [random.integers(3, 60, length).tolist() for length in random.integers(1, 40, 18)]
    prompts = [[*(head if number % 3 == 0 else []), *text, *row[-6:]] for number, text in enumerate(own)]
    limit = engine.max_positions or 99
    prompts = [prompt[-(limit - OPTIONS.max_new_tokens) :] for prompt in prompts]
    alone = [Generator(engine, Letters(), ()).generate([prompt], OPTIONS, 1)[0] for prompt in prompts]
    scheduler = Scheduler(engine, Letters(), (), 16, prefill_chunk=11)
    requests = []
    events: list[Event] = []
    for prompt in prompts:  # they come while others run
        requests.append(scheduler.submit(prompt, OPTIONS))
        events += scheduler.step()
    while scheduler.busy:
        events += scheduler.step()
    found = {event.request: event.completion for event in events if event.completion}
    assert [found[request] for request in requests] == alone
