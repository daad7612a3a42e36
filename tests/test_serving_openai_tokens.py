"""The official client against a tiny model: tokens, their log-probabilities, and vectors."""

from __future__ import annotations

from typing import Any

import pytest
from openai_cases import CUT, ENDLESS, HELLO, TEXTS, Client, said, streamed
from serving_processes import ServerProcess


@pytest.fixture(scope="module")
def tiny(tiny_server: ServerProcess) -> Client:
    return Client(tiny_server, "tiny")


# --- tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", *TEXTS, "<|im_end|>"])
@pytest.mark.parametrize("field", ["content", "prompt"])
def test_tokens_there_and_back(tiny: Client, text: str, field: str) -> None:
    status, found = tiny.server.json("POST", "/tokenize", {field: text, "with_pieces": True, "return_token_strs": True})
    assert status == 200 and found["count"] == len(found["tokens"]) and found["max_model_len"] == 512
    pieces = [entry["piece"] for entry in found["tokens"]]
    assert b"".join(piece.encode() if isinstance(piece, str) else bytes(piece) for piece in pieces).decode() == text
    assert len(found["token_strs"]) == found["count"]
    ids = [entry["id"] for entry in found["tokens"]]
    _, back = tiny.server.json("POST", "/detokenize", {"tokens": ids})
    assert back == {"content": text, "prompt": text}


def test_a_begin_token_is_added_if_it_is_asked_for(tiny: Client) -> None:
    plain = tiny.ids(HELLO)
    for fields in ({"add_special": True}, {"add_special_tokens": True}):
        first, *rest = tiny.ids(HELLO, **fields)
        assert rest == plain and first == tiny.ids("<|im_start|>", parse_special=True)[0]


def test_a_template_is_applied(tiny: Client) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U<|im_end|>"}]
    status, found = tiny.server.json("POST", "/apply-template", {"messages": messages})
    assert status == 200 and found["prompt"] == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    _, tokens = tiny.server.json("POST", "/tokenize", {"messages": messages})
    assert tokens["tokens"] == found["tokens"]
    ended = [*messages, {"role": "assistant", "content": "A"}]
    for fields, end in (
        ({"continue_final_message": True}, "assistant\nA"),
        ({"add_generation_prompt": False}, "assistant\nA<|im_end|>"),
    ):
        _, found = tiny.server.json("POST", "/apply-template", {"messages": ended, **fields})
        assert found["prompt"].endswith(end)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"content": "a", "prompt": "b"}),
        ("/tokenize", {"content": 5}),
        ("/detokenize", {"tokens": [10**7]}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/apply-template", {"messages": []}),
        ("/apply-template", {"messages": [{"role": "user", "content": "a"}], "model": "gpt"}),
    ],
)
def test_what_has_no_tokens(tiny: Client, path: str, body: dict[str, Any]) -> None:
    status, found = tiny.server.json("POST", path, body)
    assert status in (400, 404) and set(found["error"]) == {"message", "type", "param", "code"}


# --- log-probabilities -------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [None, 0, 2, 20])
def test_log_probabilities_of_a_chat(tiny: Client, top: int | None) -> None:
    answer = tiny.chat(HELLO, logprobs=True, top_logprobs=top, extra_body=ENDLESS)
    content = answer.choices[0].logprobs.content
    assert len(content) == 16 and all(len(entry.top_logprobs) == (top or 0) for entry in content)
    data = b"".join(bytes(entry.bytes) for entry in content)
    assert data.decode(errors="replace").rstrip(CUT) == said(answer).rstrip(CUT)
    chunks = list(tiny.chat(HELLO, logprobs=True, top_logprobs=top, extra_body=ENDLESS, stream=True))
    found = [
        entry for chunk in chunks for choice in chunk.choices if choice.logprobs for entry in choice.logprobs.content
    ]
    assert [(entry.token, entry.bytes) for entry in found] == [(entry.token, entry.bytes) for entry in content]
    assert [entry.logprob for entry in found] == pytest.approx([entry.logprob for entry in content], abs=1e-4)


def test_an_end_token_is_no_part_of_the_log_probabilities(tiny: Client) -> None:
    (end,) = tiny.ids("<|im_end|>", parse_special=True)
    answer = tiny.chat(HELLO, logprobs=True, logit_bias={str(end): 100})
    assert answer.choices[0].logprobs.content == [] and answer.usage.completion_tokens == 1


@pytest.mark.parametrize("count", [0, 2])
def test_log_probabilities_of_a_completion(tiny: Client, count: int) -> None:
    answer = tiny.complete(HELLO, logprobs=count, extra_body=ENDLESS)
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == 8
    for token, score, top in zip(found.tokens, found.token_logprobs, found.top_logprobs or [], strict=bool(count)):
        assert top[token] == score == max(top.values()) and len(top) == count
    assert (found.top_logprobs is None) == (count == 0)
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        assert token.startswith("bytes:") or said(answer).startswith(token, offset)


@pytest.mark.parametrize("most", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_prompt(tiny: Client, most: int, stream: bool) -> None:
    fields = {"echo": True, "logprobs": 1, "max_tokens": most, "extra_body": ENDLESS}
    answer = tiny.complete(TEXTS[0], stream=stream, **fields)
    chunks = list(answer) if stream else [answer]
    (found,) = (choice.logprobs for chunk in chunks for choice in chunk.choices if choice.logprobs)
    text = streamed(chunks)
    count = len(tiny.ids(TEXTS[0]))
    assert text.startswith(TEXTS[0]) and len(found.tokens) == count + most
    assert found.token_logprobs[0] is None and all(score <= 0 for score in found.token_logprobs[1:])
    ids = tiny.ids(TEXTS[0])
    alone = tiny.complete(ids[:-1], logprobs=20, max_tokens=1).choices[0].logprobs.top_logprobs[0]
    assert found.top_logprobs[count - 1].keys() & alone.keys()
    assert max(found.top_logprobs[count - 1].values()) == pytest.approx(max(alone.values()), abs=1e-4)


# --- embeddings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["float", "base64", None])
def test_embeddings(tiny: Client, form: Any) -> None:
    asked: dict[str, Any] = {} if form is None else {"encoding_format": form}
    if form == "base64":
        _, raw = tiny.server.json("POST", "/v1/embeddings", {"input": HELLO, **asked})
        assert isinstance(raw["data"][0]["embedding"], str)
        return
    found = tiny.official.embeddings.create(model="tiny", input=[HELLO, TEXTS[0]], **asked)
    assert [item.index for item in found.data] == [0, 1] and len(found.data[0].embedding) == 32
    assert all(sum(x * x for x in item.embedding) == pytest.approx(1, abs=1e-5) for item in found.data)
    count = len(tiny.ids(HELLO)) + len(tiny.ids(TEXTS[0]))
    assert found.usage.prompt_tokens == found.usage.total_tokens == count


def test_embeddings_of_texts_and_ids_alone_and_together(tiny: Client) -> None:
    def embed(given: Any) -> list[list[float]]:
        return [item.embedding for item in tiny.official.embeddings.create(model="tiny", input=given).data]

    ids = [tiny.ids(text) for text in (HELLO, TEXTS[0])]
    both = embed([HELLO, TEXTS[0]])
    assert both[0] != both[1] and embed(ids) == [pytest.approx(vector, abs=1e-5) for vector in both]
    assert embed(HELLO)[0] == pytest.approx(both[0], abs=1e-5) and embed(ids[1])[0] == pytest.approx(both[1], abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input.1"),
        ({"input": 5}, "input"),
        ({"input": [10**7]}, "input"),
        ({"input": "one " * 2000}, "input"),
        ({"input": ["a"] * 257}, "input"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "model": "gpt"}, "model"),
    ],
)
def test_what_cannot_be_embedded(tiny: Client, fields: dict[str, Any], param: str) -> None:
    status, found = tiny.server.json("POST", "/v1/embeddings", fields)
    assert status in (400, 404) and found["error"]["param"] == param
    assert "answer" not in found["error"]["message"]
