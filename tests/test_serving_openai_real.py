"""The official client against the embedded model: what it says must make sense."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai_cases import Client, said, streamed
from serving_processes import ServerProcess

from utils.checkpoints.embedded import NAME

PARIS = "What is the capital of France?"


@pytest.fixture(scope="module")
def real(real_server: ServerProcess) -> Client:
    return Client(real_server, NAME)


def test_a_chat(real: Client) -> None:
    answer = real.chat(PARIS, max_tokens=None)
    (choice,) = answer.choices
    assert "Paris" in said(answer) and choice.message.role == "assistant"
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
    assert answer.usage.completion_tokens == len(real.ids(said(answer))) + 1  # the end token counts
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream(real: Client) -> None:
    chunks = list(real.chat(PARIS, stream=True))
    assert streamed(chunks) == said(real.chat(PARIS)) and len(chunks) > 4


def test_what_was_said_before_counts(real: Client) -> None:
    messages = [
        {"role": "user", "content": "My name is Zoltan."},
        {"role": "assistant", "content": "Nice to meet you, Zoltan."},
        {"role": "user", "content": "What is my name?"},
    ]
    assert "Zoltan" in said(real.chat(messages, max_tokens=24))


@pytest.mark.parametrize("stop", ["France", ["nothing", "France"], ["ranc"]])
def test_a_stop_word_ends_the_answer_and_is_no_part_of_it(real: Client, stop: Any) -> None:
    whole = said(real.chat(PARIS))
    answer = real.chat(PARIS, stop=stop)
    word = stop if isinstance(stop, str) else stop[-1]
    assert said(answer) == whole[: whole.index(word)] and answer.choices[0].finish_reason == "stop"
    assert streamed(real.chat(PARIS, stop=stop, stream=True)) == said(answer)


def test_a_bias_forbids_and_forces_tokens(real: Client) -> None:
    (paris,), (river,) = real.ids(" Paris"), real.ids(" river")
    assert "Paris" not in said(real.chat(PARIS, logit_bias={str(paris): -100}))
    assert said(real.chat(PARIS, logit_bias={str(river): 100}, max_tokens=3)) == " river river river"


def test_going_on_with_an_answer(real: Client) -> None:
    whole = said(real.chat(PARIS))
    begun = [{"role": "user", "content": PARIS}, {"role": "assistant", "content": whole[:14]}]
    assert whole[:14] + said(real.chat(begun, extra_body={"continue_final_message": True})) == whole


def test_log_probabilities(real: Client) -> None:
    answer = real.chat(PARIS, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == said(answer)
    for entry in content:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token  # greedy
        scores = [other.logprob for other in entry.top_logprobs]
        assert scores == sorted(scores, reverse=True) and sum(map(math.exp, scores)) <= 1.0001


def test_the_prompt_of_an_echo_has_its_probabilities(real: Client) -> None:
    likely = real.complete("The capital of France is Paris", echo=True, logprobs=0, max_tokens=0)
    unlikely = real.complete("The capital of France is purple", echo=True, logprobs=0, max_tokens=0)
    assert said(likely) == "The capital of France is Paris" and likely.usage.completion_tokens == 0
    assert sum(likely.choices[0].logprobs.token_logprobs[1:]) > sum(unlikely.choices[0].logprobs.token_logprobs[1:])


def test_a_template_that_is_applied_by_the_client(real: Client) -> None:
    messages = [{"role": "user", "content": PARIS}]
    _, applied = real.server.json("POST", "/apply-template", {"messages": messages})
    answer = real.complete(applied["prompt"], max_tokens=16, extra_body={"parse_special": True})
    assert said(answer) == said(real.chat(PARIS))
    assert said(real.complete(applied["tokens"], max_tokens=16)) == said(real.chat(PARIS))


def test_requests_at_the_same_time_get_their_own_answers(real: Client) -> None:
    asked = [f"Write a sentence with the word {word}." for word in ("red", "blue", "green", "three")]
    alone = [said(real.chat(text)) for text in asked]
    with ThreadPoolExecutor(len(asked)) as threads:
        assert list(threads.map(lambda text: streamed(real.chat(text, stream=True)), asked)) == alone


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_of_a_schema(real: Client, stream: bool) -> None:
    person = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": person, "strict": True}}
    answer = real.chat("Describe a person as JSON.", response_format=form, max_tokens=60, stream=stream)
    found = json.loads(streamed(answer) if stream else said(answer))
    assert set(found) == {"name", "age"} and isinstance(found["age"], int)


def test_texts_that_mean_the_same_are_near(real: Client) -> None:
    texts = ["A cat sleeps on the sofa.", "A kitten is sleeping on the couch.", "Interest rates rose by two percent."]
    cat, kitten, rates = (item.embedding for item in real.official.embeddings.create(model=NAME, input=texts).data)
    near, far = (sum(a * b for a, b in zip(cat, other, strict=True)) for other in (kitten, rates))
    assert near > far


def test_a_prompt_that_is_too_long(real: Client) -> None:
    text = "river " * 8300
    for call, field in ((real.chat, "messages"), (real.complete, "prompt")):
        error = real.fault(call, text)
        assert (error.status_code, error.code, error.param) == (400, "context_length_exceeded", field)
        assert "8192" in error.message and "83" in error.message
    answer = real.chat(text, max_tokens=1, extra_body={"truncate_prompt_tokens": 40})
    assert 30 < answer.usage.prompt_tokens <= 40
