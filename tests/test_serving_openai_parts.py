"""Parts of OpenAI's API that need no model: what requests may say, reasonings, log-probabilities."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from serving_fake import FakeClient
from tiny_models import write_tiny_llama
from tiny_tokenizers import write_bpe, write_sentencepiece

from utils.arguments import ServeArguments
from utils.families.tokenizers import Tokenizer, load_tokenizer
from utils.inference.loading import prepare
from utils.inference.sampling import log_softmax
from utils.serving.app import create_app
from utils.serving.bodies import faults_of, load_json
from utils.serving.context import Served
from utils.serving.errors import ApiError
from utils.serving.http import places
from utils.serving.metrics import Metrics
from utils.serving.openai.embeddings import unit
from utils.serving.openai.logprobs import LOWEST, CompletionLogprobs, chat_entries
from utils.serving.openai.schema import ChatRequest, CompletionRequest, Generation, Request
from utils.serving.openai.thoughts import Thoughts

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    bpe, pieces = tmp_path_factory.mktemp("bpe"), tmp_path_factory.mktemp("pieces")
    return {
        "bpe": load_tokenizer(bpe, write_bpe(bpe)),
        "pieces": load_tokenizer(pieces, write_sentencepiece(pieces)),
    }


def faults(model: type[Request], body: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    return dict(faults_of(caught.value, body))


# --- what requests may say ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "place", "text"),
    [
        ({"messages": 5}, "messages", "expected a valid list, found 5"),
        ({"messages": []}, "messages", "expected at least 1 item, found an empty list"),
        ({"messages": ["a"]}, "messages.0", 'expected an object, found "a"'),
        ({"messages": [{"content": "a"}]}, "messages.0.role", "is missing"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content", "valid string or a valid list"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "messages.0.content.0.type", "is missing"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "messages.0.role", "'system', 'developer', 'user'"),
        ({"temperature": "1"}, "temperature", 'expected a valid number, found "1"'),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": True}, "temperature", "expected a valid number, found true"),
        ({"n": 1.5}, "n", "expected a valid integer"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"stream": "true"}, "stream", "expected a valid boolean"),
        ({"stop": ["a"] * 17}, "stop", "at most 16 items"),
        ({"stop": ["a", ""]}, "stop.1", "at least 1 character"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "less than or equal to 100"),
        ({"top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "is missing"),
        ({"tool_choice": "maybe"}, "tool_choice", "'none', 'auto' or 'required' or an object"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0", "greater than or equal to 0"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(fields: dict[str, Any], place: str, text: str) -> None:
    found = faults(ChatRequest, {**HELLO, **fields})
    assert list(found) == [place] and text in found[place]


def test_all_wrong_fields_are_named_at_once() -> None:
    found = faults(ChatRequest, {**HELLO, "n": 0, "seed": "a", "top_p": 2})
    assert set(found) == {"n", "seed", "top_p"}


def test_null_is_the_same_as_a_field_left_out() -> None:
    nulls = {name: None for name in ChatRequest.model_fields if name != "messages"}
    assert ChatRequest.model_validate({**HELLO, **nulls}) == ChatRequest.model_validate(HELLO)


def test_a_whole_number_may_be_written_with_a_point() -> None:
    body = load_json(json.dumps({**HELLO, "max_tokens": 5.0, "temperature": 1.5}), "the body")
    request = ChatRequest.model_validate(body)
    assert request.max_tokens == 5 and request.temperature == 1.5


@pytest.mark.parametrize(
    ("model", "body", "name", "harmless"),
    [
        (ChatRequest, HELLO, "functions", []),
        (ChatRequest, HELLO, "audio", None),
        (ChatRequest, HELLO, "modalities", ["text"]),
        (ChatRequest, HELLO, "prediction", None),
        (ChatRequest, HELLO, "web_search_options", None),
        (ChatRequest, HELLO, "store", False),
        (ChatRequest, HELLO, "use_beam_search", False),
        (CompletionRequest, {"prompt": "a"}, "suffix", ""),
        (CompletionRequest, {"prompt": "a"}, "length_penalty", 1),
    ],
)
def test_what_cannot_be_served_is_named(model: type[Request], body: dict[str, Any], name: str, harmless: Any) -> None:
    model.model_validate({**body, name: harmless})
    for value in ("x", {"a": 1}, True):
        with pytest.raises(ApiError) as caught:
            model.model_validate({**body, name: value})
        assert (caught.value.status, caught.value.param) == (400, name) and name in caught.value.message


@pytest.mark.parametrize("prompt", ["", "a", ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_a_prompt_is_a_text_its_ids_or_a_list_of_either(prompt: Any) -> None:
    assert CompletionRequest.model_validate({"prompt": prompt}).prompt == prompt


@pytest.mark.parametrize("prompt", [1, None, ["a", 1], [[1], "a"], [["a"]], {"a": 1}, [1.5], [2**40]])
def test_nothing_else_is_a_prompt(prompt: Any) -> None:
    assert all(name.startswith("prompt") for name in faults(CompletionRequest, {"prompt": prompt}))


def test_every_field_of_the_official_client_is_known() -> None:
    from openai.types.chat import completion_create_params as chats
    from openai.types.completion_create_params import CompletionCreateParamsBase

    pairs: list[tuple[type[Generation], Any]] = [
        (ChatRequest, chats.CompletionCreateParamsBase),
        (CompletionRequest, CompletionCreateParamsBase),
    ]
    for model, params in pairs:
        unknown = set(params.__annotations__) - set(model.model_fields) - set(model.refused())
        assert not unknown


# --- reasonings --------------------------------------------------------------------------------------

PIECES = st.lists(st.sampled_from(["<think>", "</think>", "<", "think", ">", "</", "\n", "\n\n", "a", " ", "你"]))


def split(text: str, opened: str | None, cuts: list[int]) -> tuple[str, str]:
    thoughts, reasoning, content = Thoughts(opened), "", ""
    places = sorted({0, *(cut % (len(text) + 1) for cut in cuts), len(text)})
    parts = [text[first:last] for first, last in pairwise(places)]
    for part in [*parts, None]:
        said = thoughts.push(part or "", last=part is None)
        reasoning, content = reasoning + said.reasoning, content + said.content
    return reasoning, content


@settings(deadline=None, max_examples=300)
@given(PIECES.map("".join), st.sampled_from([None, "think"]), st.lists(st.integers(0, 100), max_size=8))
def test_where_an_answer_is_cut_changes_nothing(text: str, opened: str | None, cuts: list[int]) -> None:
    assert split(text, opened, cuts) == split(text, opened, [])


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("I see.\n</think>\n\nYes", "think", "I see.", "Yes"),
        ("I see.</thinking>Yes", "thinking", "I see.", "Yes"),
        ("I see", "think", "I see", ""),
        ("<think>\nI see.\n</think>\n\nYes", None, "I see.", "Yes"),
        ("<think>\n\n</think>\n\nYes", None, "", "Yes"),
        ("Yes <think>no</think>", None, "", "Yes <think>no</think>"),
        ("a < b", None, "", "a < b"),
        ("<thi", None, "", "<thi"),
        ("", None, "", ""),
        ("I </thin", "think", "I </thin", ""),
    ],
)
def test_a_reasoning_ends_with_its_tag(text: str, opened: str | None, reasoning: str, content: str) -> None:
    assert split(text, opened, []) == (reasoning, content)


def test_a_reasoning_is_told_as_it_comes() -> None:
    thoughts = Thoughts("think")
    assert [thoughts.push(part).reasoning for part in ("I ", "see", ".\n", "</th", "en", "</think>")] == [
        "I ",
        "see",
        ".",
        "",
        "\n</then",
        "",
    ]


# --- log-probabilities -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bpe", "pieces"])
@pytest.mark.parametrize("text", ["one two", "我喜欢 é", "🙂👩‍👩‍👧 e\u0301 five"])
def test_bytes_and_offsets_of_tokens_are_those_of_the_text(
    tokenizers: dict[str, Tokenizer], name: str, text: str
) -> None:
    tokenizer = tokenizers[name]
    ids = tokenizer.encode_text(text)
    scores = [-0.5] * len(ids)
    tops = [((token, -0.5), (tokenizer.eos_id, -1.0)) for token in ids]
    entries = chat_entries(tokenizer, ids, scores, tops)
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode().lstrip(" ") == text
    assert [entry["top_logprobs"][1]["logprob"] for entry in entries] == [-1.0] * len(ids)
    whole = CompletionLogprobs(tokenizer, 1).take(ids, scores, tops)
    assert whole["text_offset"][0] == 0 and whole["text_offset"] == sorted(whole["text_offset"])
    for token, offset in zip(whole["tokens"], whole["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert text.startswith(token if offset else token.lstrip(" "), offset)
    assert all(set(top) == {token} for top, token in zip(whole["top_logprobs"], whole["tokens"], strict=True))


def test_tokens_that_come_bit_by_bit_have_the_offsets_of_all_together(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["bpe"]
    ids = tokenizer.encode_text("one 我 two 🙂")
    one_by_one = CompletionLogprobs(tokenizer, 0)
    offsets = [one_by_one.take([token], [-1.0], [()])["text_offset"][0] for token in ids]
    whole = CompletionLogprobs(tokenizer, 0).take(ids, [-1.0] * len(ids), [()] * len(ids))
    assert offsets == whole["text_offset"] and whole["top_logprobs"] is None


def test_minus_infinity_is_a_number_that_json_has(tokenizers: dict[str, Tokenizer]) -> None:
    score = float(log_softmax(np.array([0.0, -np.inf], dtype=np.float32))[1])
    (entry,) = chat_entries(tokenizers["bpe"], [5], [score], [((6, score),)])
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == LOWEST
    json.dumps(entry, allow_nan=False)


def test_vectors_have_length_one() -> None:
    found = unit(np.array([3.0, 4.0], np.float32))
    assert np.isclose(np.linalg.norm(found), 1) and found == [0.6000000238418579, 0.800000011920929]
    assert unit(np.zeros(2, np.float32)) == [0.0, 0.0]


# --- what goes wrong behind the first piece ------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", HELLO), ("/v1/completions", {"prompt": "one two", "max_tokens": 9})]
)
def test_a_stream_that_breaks_off_ends_with_an_error(tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    model = write_tiny_llama(tmp_path)
    client = FakeClient(error="no memory is left")
    models = {"tiny": prepare(str(model), device="cpu")}
    metrics = Metrics(["tiny"], lambda: client.state)
    served = Served(client, models, ServeArguments(src_length=128, max_length=256), metrics, 0.0, places(1))
    asking = create_app(served).test_client()
    plain = asking.post(path, json=body)
    assert plain.status_code == 500
    text = asking.post(path, json={**body, "stream": True}).get_data(as_text=True)
    *pieces, last = [json.loads(event.removeprefix("data: ")) for event in text.removesuffix("\n\n").split("\n\n")]
    assert pieces and all(piece["choices"] for piece in pieces)
    for error in (last["error"], plain.get_json()["error"]):
        assert error == {"message": "no memory is left", "type": "server_error", "param": None, "code": None}
