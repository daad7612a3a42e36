"""The own API over real sockets, with a stand-in for the process of the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_here import Log, Running, logged, running, said, tiny

from utils.inference.loading import Prepared
from utils.serving import limits


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain(prepared: Prepared) -> Iterator[Running]:
    with running(prepared) as server:
        yield server


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    with logged(tmp_path / "log") as log:
        yield log


def test_chat_answers_with_one_object_or_one_per_line(plain: Running) -> None:
    assert plain.chat() == (200, said("0 1 2 3 4 "))
    status, headers, content = plain.ask("POST", "/api/chat", {"context": "say", "stream": True})
    assert status == 200 and headers["content-type"].startswith("application/x-ndjson")
    assert [json.loads(line) for line in content.splitlines()] == [said(f"{number} ") for number in range(5)]


def test_what_a_request_says_holds_for_it_alone(plain: Running) -> None:
    asked = {"top_k": 7, "top_p": 0.5, "temperature": 0.25, "repetition_penalty": 1.5, "max_length": 100}
    plain.chat(**asked)
    changed = plain.client.given[-1].job
    plain.chat(**dict.fromkeys([*asked, "src_length", "history", "stream"]))
    default = plain.client.given[-1].job
    options = changed.options
    assert (options.top_k, options.top_p, options.temperature, options.repetition_penalty) == (7, 0.5, 0.25, 1.5)
    assert options.max_new_tokens == 100 - len(changed.prompt)
    options = default.options
    assert (options.top_k, options.top_p, options.temperature, options.repetition_penalty) == (1, 1.0, 1.0, 1.0)
    assert options.max_new_tokens == 256 - len(default.prompt)


def test_max_length_bounds_prompt_and_answer_on_all_routes(prepared: Prepared) -> None:
    words = {"prompt": [5] * 10, "max_tokens": 10_000}
    messages = {"messages": [{"role": "user", "content": "say"}]}
    for settings, most, own in (({}, 512, 256), ({"max_length": 200}, 200, 200)):
        with running(prepared, **settings) as server:
            for path, body, bound in (
                ("/v1/completions", words, most),
                ("/v1/chat/completions", messages, most),
                ("/api/chat", {"context": "say"}, own),
                ("/api/chat", {"context": "say", "max_length": 9999}, most),
                ("/api/chat", {"context": "say " * 900, "max_length": 9999, "src_length": 9999}, most),
            ):
                assert server.json("POST", path, body)[0] == 200
                job = server.client.given[-1].job
                assert len(job.prompt) + job.options.max_new_tokens == bound
            assert server.json("GET", "/v1/models")[1]["data"][0]["max_model_len"] == most
            assert server.json("POST", "/tokenize", {"content": "say"})[1]["max_model_len"] == most
            for path, body in (
                ("/v1/completions", {"prompt": [5] * most}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "say " * most}]}),
                ("/v1/embeddings", {"input": [5] * (most + 1)}),
            ):
                status, found = server.json("POST", path, body)
                assert (status, found["error"]["code"]) == (400, "context_length_exceeded")
                assert f"takes {most}" in found["error"]["message"]


def test_history_comes_as_a_list_or_as_a_text_and_with_either_names(plain: Running) -> None:
    prompts = []
    for user, bot in (("user", "bot"), ("human", "assistant")):
        history = [{"role": user, "utterance": "red"}, {"role": bot, "utterance": "blue"}]
        for form in (history, json.dumps(history)):
            assert plain.chat(history=form)[0] == 200
            prompts.append(plain.client.given[-1].job.prompt)
    assert plain.chat(history="")[0] == plain.chat(history=[])[0] == 200
    alone = plain.client.given[-1].job.prompt
    assert all(prompt == prompts[0] for prompt in prompts) and len(alone) < len(prompts[0])


def test_the_oldest_rounds_go_first_and_then_the_end_of_the_prompt(plain: Running, prepared: Prepared) -> None:
    history = [{"role": role, "utterance": f"red {number}"} for number in range(20) for role in ("user", "bot")]

    def prompt_after(forgotten: int) -> list[int]:
        assert plain.chat(history=history[2 * forgotten :], src_length=500, max_length=1000)[0] == 200
        return plain.client.given[-1].job.prompt

    status, headers, _ = plain.ask("POST", "/api/chat", {"context": "say", "history": history})
    cut = plain.client.given[-1].job.prompt
    assert status == 200 and headers["x-prompt-cut"] == "true" and len(cut) <= 128
    forgotten = next(number for number in range(1, 21) if len(prompt_after(number)) <= 128)
    assert cut == prompt_after(forgotten) and 1 < forgotten < 20
    status, headers, _ = plain.ask("POST", "/api/chat", {"context": "red " * 500})
    assert status == 200 and headers["x-prompt-cut"] == "true" and len(plain.client.given[-1].job.prompt) == 128
    status, headers, _ = plain.ask("POST", "/api/chat", {"context": "say"})
    assert "x-prompt-cut" not in headers


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"context": None}, "context"),
        ({"context": ""}, "context"),
        ({"context": ["say"]}, "context"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": "1"}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_k": 10**40}, "top_k"),
        ({"top_p": 2}, "top_p"),
        ({"temperature": -1}, "temperature"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_length": 1}, "max_length"),
        ({"max_length": 3}, "max_length"),
        ({"src_length": 0}, "src_length"),
        ({"src_length": 1}, "src_length"),
        ({"stream": "yes"}, "stream"),
        ({"history": "[{"}, "history"),
        ({"history": "[NaN]"}, "history"),
        ({"history": 3}, "history"),
        ({"history": [{"role": "user"}]}, "history.0.utterance"),
        ({"history": [{"role": "bot", "utterance": "hi"}]}, "history.0.role"),
        ({"history": [{"role": "user", "utterance": "hi"}]}, "history"),
        ({"history": [{"role": "cook", "utterance": "hi"}]}, "history.0.role"),
        ({"history": [{}] * (limits.MESSAGES + 1)}, "history"),
    ],
)
def test_a_wrong_field_is_named(plain: Running, fields: dict[str, Any], names: str) -> None:
    status, content = plain.chat(**fields)
    assert status == 400 and content["error_code"] == 400 and content["result"] is None
    assert names in content["error_msg"], content


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"context": "\xff"}', "not UTF-8"),
        (b'{"context": "\\ud800"}', "surrogate"),
        (b'{"context": "say", "\\uDC00": 1}', "surrogate"),
        (b'{"context": "say", "top_p": NaN}', "NaN"),
        (b'{"context": "say", "top_p": -Infinity}', "-Infinity"),
        (b'{"context": "say", "top_p": 1e999}', "beyond all numbers"),
        (b'{"context": "say", "top_k": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"context": "say", "context": "no"}', "twice"),
        (b'{"context": "say", "x": ' + b"[" * 100 + b"]" * 100 + b"}", "nested too deeply"),
        (b'{"context": "say", "x": ' + b'{"a":' * 100000 + b"1" + b"}" * 100000 + b"}", "nested too deeply"),
        (b'{"context": "say" "x"}', "not valid JSON"),
    ],
)
def test_what_is_no_body_is_refused_in_one_sentence(plain: Running, body: bytes, words: str) -> None:
    status, _, content = plain.ask("POST", "/api/chat", body)
    found = json.loads(content)
    assert status == 400 and words in found["error_msg"] and len(found["error_msg"]) < 200


def test_unknown_fields_are_left_out_and_logged_once(plain: Running, log: Log) -> None:
    for _ in range(2):
        assert plain.chat(colour="red")[0] == 200
    assert log.text.count('"ignored_field": "colour"') == 1


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "say"}], "verbosity": "low"}, "verbosity"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "say"}], "suffix": "b"}, "suffix"),
        ("/v1/completions", {"prompt": "say", "suffix": "b"}, "suffix"),
        ("/v1/embeddings", {"input": "say", "dimensions": 8}, "dimensions"),
    ],
)
def test_a_field_that_is_refused_is_not_called_left_out(
    plain: Running, log: Log, path: str, body: dict[str, Any], field: str
) -> None:
    status, found = plain.json("POST", path, body, X_Request_Id=f"refused-{field}")
    assert status == 400 and found["error"]["param"] == field
    assert log.of(f"refused-{field}")[0]["param"] == field and "ignored_field" not in log.text


def test_chat_answers_with_the_model_that_is_named(plain: Running) -> None:
    assert plain.chat(model="tiny") == plain.chat()
    status, content = plain.chat(model="other")
    assert status == content["error_code"] == 404 and "'other'" in content["error_msg"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_log_has_the_id_of_an_answer(plain: Running, log: Log, stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": "say"}], "stream": stream}
    _, _, content = plain.ask("POST", "/v1/chat/completions", body, X_Request_Id="mine")
    answer = json.loads(content.split(b"\n")[0].removeprefix(b"data: "))
    assert log.of("mine")[0]["answer_id"] == answer["id"]


def test_a_body_is_json_whatever_its_type_says_but_no_form_of_a_browser(plain: Running) -> None:
    body = json.dumps({"context": "say"}).encode()
    for kind in ("application/json; charset=utf-8", "text/plain", "application/octet-stream"):
        assert plain.ask("POST", "/api/chat", body, Content_Type=kind)[0] == 200
    for kind in ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert plain.ask("POST", "/api/chat", body, Content_Type=kind)[0] == 415
    assert plain.ask("POST", "/api/chat", body, Content_Encoding="gzip")[0] == 415
