"""What a request may ask of its answer beyond sampling: biases, other ends, a form, figures of its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from letters import VOCABULARY, Letters, engine_of
from numpy.typing import NDArray
from reference_engine import FunctionEngine

from utils.errors import UserError
from utils.inference.generator import Completion, Generator
from utils.inference.grammar import Grammar
from utils.inference.sampling import SamplingOptions
from utils.inference.scheduler import Event, Scheduler

GREEDY = SamplingOptions(max_new_tokens=6)


def answer(
    options: SamplingOptions, prompt: Sequence[int] = (3, 4, 5), engine: FunctionEngine | None = None
) -> Completion:
    engine = engine_of() if engine is None else engine
    (found,) = Generator(engine, Letters()).generate([prompt], options)
    assert not engine.texts
    return found


def ladder(text: list[int]) -> NDArray[np.float64]:
    """After token n comes n + 1, then n + 2 is likeliest; after the last one the end."""
    values = np.zeros(VOCABULARY)
    for rank, token in enumerate(range(text[-1] + 1, text[-1] + 4)):
        values[token % VOCABULARY] = 9 - rank
    return values


# --- which tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
def test_a_bias_moves_greedy_answers_and_searches(beams: int) -> None:
    options = replace(GREEDY, num_beams=beams)
    (first, *_) = answer(options).tokens
    without = answer(replace(options, logit_bias=((first, -100),))).tokens
    assert first not in without
    assert set(answer(replace(options, logit_bias=((5, 100),))).tokens) == {5}


def test_a_bias_changes_odds_by_its_factor() -> None:
    """+ln 3 makes a token three times as likely as it was beside the others."""
    engine = FunctionEngine(lambda text: np.zeros(VOCABULARY), VOCABULARY)
    options = SamplingOptions(top_k=0, max_new_tokens=1, logit_bias=((5, float(np.log(3))),), logprobs=True)
    found = Generator(engine, Letters()).generate([[1]] * 4000, replace(options, seed=1), 50)
    share = np.mean([one.tokens == (5,) for one in found])
    assert abs(share - 3 / (VOCABULARY + 2)) < 4 * np.sqrt(share * (1 - share) / 4000)
    # log-probabilities are the model's own
    assert {round(one.logprobs[0], 5) for one in found if one.logprobs} == {round(-float(np.log(VOCABULARY)), 5)}


def test_other_tokens_end_an_answer_and_do_not_show() -> None:
    engine = FunctionEngine(ladder, VOCABULARY)
    found = answer(replace(GREEDY, stop_ids=(9,)), (5,), engine)
    assert (found.text, found.tokens, found.finish_reason) == ("fgh", (6, 7, 8, 9), "stop")
    later = answer(replace(GREEDY, stop_ids=(8,), min_new_tokens=4), (5,), engine)
    assert later.tokens[:3] == (6, 7, 9) and later.finish_reason == "length"


def test_an_answer_may_go_on_past_end_tokens() -> None:
    engine = FunctionEngine(ladder, VOCABULARY)
    ended = answer(GREEDY, (21,), engine)
    assert (ended.tokens, ended.finish_reason) == ((22, 23, 0), "stop")
    options = replace(GREEDY, ignore_eos=True)
    past = answer(options, (21,), engine)
    assert (past.tokens, past.text, past.finish_reason) == ((22, 23, 0, 1, 2, 3), "vwabc", "length")
    # the end token ends nothing, so a shortest length does not forbid it; other ends count as ever
    assert answer(replace(options, min_new_tokens=6), (21,), engine) == past
    assert answer(replace(options, stop_ids=(2,)), (21,), engine).tokens == (22, 23, 0, 1, 2)
    assert answer(replace(options, stop=("b",)), (21,), engine).text == "vwa"


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"logit_bias": ((VOCABULARY, 1.0),)}, "logit_bias has token ids outside the model's vocabulary of 24"),
        ({"stop_ids": (99,)}, "stop_ids has token ids outside the model's vocabulary of 24"),
        ({"grammar": Grammar("json_object")}, "grammar: answers of a given form are not available here"),
    ],
)
def test_what_this_model_cannot_do_is_an_error_of_the_request(options: dict, fault: str) -> None:
    found = answer(replace(GREEDY, **options))
    assert (found.finish_reason, found.error) == ("error", fault)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias is"),
        ({"logit_bias": ((1, float("nan")),)}, "logit_bias is"),
        ({"logit_bias": ((True, 1.0),)}, "logit_bias is"),
        ({"stop_ids": (1.5,)}, "stop_ids is"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0: expected at least 1"),
        ({"num_beams": 2, "grammar": Grammar("json_object")}, "num_beams is 2: expected 1 together with grammar"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        SamplingOptions(**options)


# --- a form --------------------------------------------------------------------------------------------


class Alternating:
    """Vowels and consonants take turns; so many letters, then nothing."""

    def __init__(self, letters: int) -> None:
        self.left = letters
        self.vowel = False

    @property
    def ended(self) -> bool:
        return self.left == 0

    def mask(self) -> NDArray[np.bool_]:
        if self.left == 13:
            raise UserError("no such form")
        vowels = np.isin(np.arange(VOCABULARY), [1, 5, 9, 15, 21])
        return vowels if self.vowel else ~vowels & (np.arange(VOCABULARY) > 0)

    def accept(self, token: int) -> None:
        assert self.mask()[token]
        self.left, self.vowel = self.left - 1, not self.vowel


def constrain(grammar: Grammar) -> Alternating:
    if not grammar.text.isdigit():
        raise UserError("the form is no number")
    return Alternating(int(grammar.text))


@pytest.mark.parametrize("top_k", [0, 1])
def test_answers_of_a_form(top_k: int) -> None:
    scheduler = Scheduler(engine_of(), Letters(), constrain=constrain)
    options = SamplingOptions(top_k=top_k, seed=1, temperature=3, max_new_tokens=9, prompt_lookup_num_tokens=2)
    formed = scheduler.submit([3], replace(options, grammar=Grammar("regex", "7")))
    free = scheduler.submit([3], options, number=1)
    unknown = scheduler.submit([3], replace(options, grammar=Grammar("regex", "x")))
    failing = scheduler.submit([3], replace(options, grammar=Grammar("regex", "13")))
    events: dict[object, list[Event]] = {}
    while scheduler.busy:
        for event in scheduler.step():
            events.setdefault(event.request, []).append(event)
    found = events[formed][-1].completion
    assert found and found.finish_reason == "stop" and len(found.text) == 7
    assert all((letter in "aeiou") == bool(place % 2) for place, letter in enumerate(found.text))
    errors = [events[one][-1].completion for one in (unknown, failing)]
    assert [one and one.error for one in errors] == ["the form is no number", "no such form"]
    assert events[free][-1].completion == answer(replace(options, seed=1), (3,)) or top_k == 0


# --- figures of the prompt, and events -----------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 128, 129, 130, 300])
def test_log_probabilities_of_a_prompt(length: int) -> None:
    prompt = np.random.default_rng(5).integers(1, VOCABULARY, length).tolist()
    options = replace(GREEDY, prompt_logprobs=True, logprobs=True, top_logprobs=2)
    found = answer(options, prompt)
    assert replace(found, prompt_logprobs=None, prompt_top_logprobs=None) == answer(
        replace(options, prompt_logprobs=False), prompt
    )
    assert found.prompt_logprobs is not None and found.prompt_top_logprobs is not None
    function = engine_of().logits
    for place in range(1, length):
        values = function(prompt[:place], 1)[0]
        logs = values - np.log(np.exp(values).sum())
        assert abs(found.prompt_logprobs[place - 1] - logs[prompt[place]]) < 1e-5
        best = np.argsort(-logs)[:2].tolist()
        assert [token for token, _ in found.prompt_top_logprobs[place - 1]] == best
    assert len(found.prompt_logprobs) == len(found.prompt_top_logprobs) == length - 1
    nothing = answer(replace(options, max_new_tokens=0, top_logprobs=0), prompt)
    assert (nothing.tokens, nothing.finish_reason, nothing.prompt_logprobs) == ((), "length", found.prompt_logprobs)
    assert nothing.prompt_top_logprobs is None


def test_log_probabilities_of_a_prompt_that_fills_the_model() -> None:
    engine = engine_of(max_positions=5)
    options = SamplingOptions(max_new_tokens=0, prompt_logprobs=True)
    assert len(answer(options, [1, 2, 3, 4, 5], engine).prompt_logprobs or ()) == 4
    error = answer(replace(options, max_new_tokens=1), [1, 2, 3, 4, 5], engine).error
    assert error and "leaves no room" in error
    whole = answer(options, [1, 2], engine_of(shares_prefixes=False))
    assert whole.error and "reads a prompt as a whole" in whole.error


def test_events_bring_each_token_with_its_log_probability() -> None:
    scheduler = Scheduler(engine_of(), Letters(), (), 2)
    options = replace(GREEDY, logprobs=True, top_logprobs=2)
    requests = [scheduler.submit([n], replace(options, num_beams=1 + n % 2)) for n in range(1, 6)]
    events: dict[object, list[Event]] = {request: [] for request in requests}
    while scheduler.busy:
        for event in scheduler.step():
            events[event.request].append(event)
    for own in events.values():
        assert [event.opened for event in own] == [True, *[False] * (len(own) - 1)]
        completion = own[-1].completion
        assert completion and completion.logprobs and completion.top_logprobs
        assert completion.tokens == tuple(token for event in own for token in event.tokens)
        assert completion.logprobs == tuple(value for event in own for value in event.logprobs)
        assert completion.top_logprobs == tuple(others for event in own for others in event.top_logprobs)
