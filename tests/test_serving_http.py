"""The HTTP side over real sockets, with a stand-in for the process of the model."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Response, jsonify
from schemathesis.specs.openapi import definitions
from serving_cases import SECONDS, Asked, request_bytes, until
from serving_fake import FakeClient
from tiny_models import write_tiny_llama

from utils.arguments import ServeArguments
from utils.inference.loading import Prepared, prepare
from utils.inference.sampling import SamplingOptions
from utils.serving import http as http_module
from utils.serving import limits, openapi, record
from utils.serving.answering import answer, collect
from utils.serving.app import create_app
from utils.serving.bodies import read_object
from utils.serving.context import Served, serving
from utils.serving.http import KEPT_THREADS, SPARE_THREADS, HttpServer, places
from utils.serving.metrics import Metrics
from utils.serving.protocol import Job

REQUESTS = 32  # that a server here expects
LARGE = 2**25  # bytes of a response that no buffer holds


@dataclass
class Running(Asked):
    """A server in this process."""

    client: FakeClient
    served: Served


class Log:
    """What is written to standard error meanwhile."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @property
    def text(self) -> str:
        return self._file.read_text("utf-8")

    def of(self, *ids: str) -> list[dict[str, Any]]:
        """The lines of requests, which are written when their responses have been sent."""

        def found() -> list[dict[str, Any]]:
            lines = [json.loads(line) for line in self.text.splitlines()]
            return [line for name in ids for line in lines if line["id"] == name and "status" in line]

        assert until(lambda: len(found()) >= len(ids))
        return found()


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    file = tmp_path / "log"  # pytest's own capture loses what threads write while it is read
    with file.open("a", encoding="utf-8") as output:
        monkeypatch.setattr(record, "sys", SimpleNamespace(stderr=output))
        yield Log(file)
        monkeypatch.undo()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_llama(folder)
    return prepare(str(folder), device="cpu")


@contextmanager
def running(prepared: Prepared, client: FakeClient | None = None, **settings: Any) -> Iterator[Running]:
    """A server; ended afterwards."""
    client = client or FakeClient()
    arguments = ServeArguments(src_length=128, max_length=256)
    for name, value in settings.items():
        arguments.set_from(name, value, f"--{name}")
    metrics = Metrics(["tiny"], lambda: client.state)
    served = Served(client, {"tiny": prepared}, arguments, metrics, time.time(), places(REQUESTS))
    app = create_app(served)

    @app.post("/several")
    def several() -> Response:
        """n answers to one prompt, which only other APIs have."""
        options = SamplingOptions(max_new_tokens=1000)
        jobs = [Job("tiny", [1, 2, 3], options, number) for number in range(read_object()["n"])]
        return jsonify([one.text for one in collect(answer(serving(), jobs))])

    @app.get("/large")
    def large() -> Response:
        return Response(b"x" * 2**22 for _ in range(LARGE // 2**22))

    @app.get("/bug")
    def bug() -> Response:
        raise RuntimeError("/home/someone/secret")

    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = HttpServer(app, [listening], REQUESTS)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield Running(listening.getsockname()[1], client, served)
    finally:
        server.stop(0.0)
        thread.join(SECONDS)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def plain(prepared: Prepared) -> Iterator[Running]:
    with running(prepared) as server:
        yield server


# --- the own API -------------------------------------------------------------------------------------


def said(text: str) -> dict[str, Any]:
    return {"error_code": 0, "error_msg": "Success", "result": {"response": {"role": "bot", "utterance": text}}}


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


# --- limits and errors -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
def test_too_much_is_refused_in_words_that_reach_the_client(plain: Running, path: str) -> None:
    body = b"x" * (3 * limits.BODY_BYTES)
    for headers in ({}, {"Transfer_Encoding": "chunked"}):
        sent: Any = iter([body[i : i + 2**16] for i in range(0, len(body), 2**16)]) if headers else body
        connection = http.client.HTTPConnection("127.0.0.1", plain.port, timeout=SECONDS)
        connection.request("POST", path, sent, {"Content-Type": "application/json"}, encode_chunked=bool(headers))
        response = connection.getresponse()
        content = json.loads(response.read())
        connection.close()
        assert response.status == 413
        words = content["error_msg"] if path == "/api/chat" else content["error"]["message"]
        assert words == f"the body is larger than {limits.BODY_BYTES:,} bytes"
    status, _, content = plain.ask("GET", "/health", x="y" * limits.HEADER_BYTES)
    assert status == 431 and "headers" in json.loads(content)["error"]["message"]


def test_what_is_no_http_is_refused(plain: Running) -> None:
    for content in (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET /health HTTP/1.1\r\nno header\r\n\r\n"):
        with plain.raw(content) as connection:
            assert b" 400 " in connection.recv(65536).splitlines()[0]


def test_errors_have_the_form_of_their_api(plain: Running) -> None:
    status, _, content = plain.ask("GET", "/api/nothing")
    assert status == 404 and json.loads(content)["error_code"] == 404
    status, _, content = plain.ask("GET", "/v1/nothing")
    assert status == 404 and json.loads(content)["error"]["type"] == "invalid_request_error"
    status, headers, content = plain.ask("GET", "/api/chat")
    assert status == 405 and json.loads(content)["error_code"] == 405 and headers["allow"] == "OPTIONS, POST"


def test_a_bug_is_told_by_the_requests_id_alone(plain: Running, log: Log) -> None:
    status, headers, content = plain.ask("GET", "/bug", X_Request_Id="my-request.7")
    assert status == 500 and headers["x-request-id"] == "my-request.7"
    assert b"my-request.7" in content and b"secret" not in content and b"Traceback" not in content
    assert log.of("my-request.7")[0]["status"] == 500 and "/home/someone/secret" in log.text
    assert plain.ask("GET", "/health", X_Request_Id="a b\tc")[1]["x-request-id"] != "a b\tc"


def test_the_log_has_one_line_per_request_and_no_text_of_it(prepared: Prepared, log: Log) -> None:
    with running(prepared) as server:
        server.ask("POST", "/api/chat", {"context": "secret words"}, X_Request_Id="one")
        server.ask("POST", "/api/chat", {"context": "say", "top_k": "secret words"}, X_Request_Id="two")
        server.ask("GET", "/health", X_Request_Id="three")
        first, second = log.of("one", "two")
    assert "secret" not in log.text and "three" not in log.text
    assert first["status"] == 200 and first["completion_tokens"] == 5 and first["finish_reasons"] == ["length"]
    assert second["status"] == 400 and second["param"] == "top_k"
    with running(prepared, log_requests=True) as server:
        server.ask("POST", "/api/chat", {"context": "secret words"}, X_Request_Id="four")
        (line,) = log.of("four")
    assert line["request"]["context"] == "secret words" and line["answers"] == ["0 1 2 3 4 "]


# --- who may ask -------------------------------------------------------------------------------------


def test_with_a_key_nothing_of_the_model_is_told_without_it(prepared: Prepared) -> None:
    with running(prepared, api_key="k1é") as server:
        sent = "k1é".encode().decode("latin-1")
        for headers in ({"Authorization": f"Bearer {sent}"}, {"x_api_key": sent}, {"authorization": f"bearer {sent}"}):
            assert server.ask("POST", "/api/chat", {"context": "say"}, **headers)[0] == 200
            assert server.ask("GET", "/metrics", **headers)[0] == 200
        for headers in ({}, {"Authorization": "Bearer k2"}, {"Authorization": f"Basic {sent}"}, {"x_api_key": ""}):
            status, found, content = server.ask("POST", "/api/chat", {"context": "say"}, **headers)
            assert status == 401 and json.loads(content)["error_code"] == 401 and found["www-authenticate"] == "Bearer"
            assert server.ask("GET", "/metrics", **headers)[0] == 401
            assert server.ask("GET", "/v1/nothing", **headers)[0] == 401
        assert json.loads(server.ask("GET", "/health")[2]) == {"status": "ok"}
        assert server.ask("GET", "/health", Host="llm.example")[0] == 200


def test_pages_of_other_sites_may_not_ask_a_server_without_a_key(plain: Running) -> None:
    body, own = {"context": "say"}, f"http://localhost:{plain.port}"
    assert plain.ask("POST", "/api/chat", body, Origin=own, Host=own.removeprefix("http://"))[0] == 200
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Host": "evil.example"},
        {"Host": f"evil.example:{plain.port}", "Origin": f"http://evil.example:{plain.port}"},
        {"Host": "["},
        {"Host": "[::1"},
        {"Origin": "http://["},
    ):
        status, found, _ = plain.ask("POST", "/api/chat", body, **headers)
        assert status == 403 and "access-control-allow-origin" not in found


def test_other_sites_are_allowed_by_name_only(prepared: Prepared) -> None:
    with running(prepared, cors_origins=["https://page.example"]) as server:
        asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
        status, headers, _ = server.ask("OPTIONS", "/api/chat", **asked)
        assert status == 200 and headers["access-control-allow-origin"] == "https://page.example"
        status, headers, _ = server.ask("POST", "/api/chat", {"context": "say"}, Origin="https://page.example")
        assert status == 200 and headers["access-control-allow-origin"] == "https://page.example"
        status, headers, _ = server.ask("POST", "/api/chat", {"context": "say"}, Origin="https://other.example")
        assert status == 403 and "access-control-allow-origin" not in headers


# --- clients that leave, and answers that do not come -------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "count"),
    [
        ("/api/chat", {"context": "say"}, 1),
        ("/api/chat", {"context": "say", "stream": True}, 1),
        ("/several", {"n": 3}, 3),
        ("/v1/embeddings", {"input": ["say", "it"]}, 1),
    ],
)
def test_an_answer_is_cancelled_when_its_client_has_gone(
    prepared: Prepared, path: str, body: dict[str, Any], count: int, log: Log
) -> None:
    with running(prepared, FakeClient(pause=0.05, length=10_000)) as server:
        connection = server.raw(request_bytes(path, body))
        assert until(lambda: len(server.client.given) == count)
        time.sleep(0.2)
        assert not any(one.cancelled.is_set() for one in server.client.given)
        connection.close()
        assert until(lambda: all(one.cancelled.is_set() for one in server.client.given))
        counted = f'request_success_total{{finished_reason="abort",model_name="tiny"}} {count}.0'
        assert until(lambda: counted.encode() in server.ask("GET", "/metrics")[2])
    assert until(lambda: '"status": 499' in log.text)
    assert '"error": "client_closed"' in log.text


def test_an_answer_that_takes_too_long_is_an_error(prepared: Prepared) -> None:
    with running(prepared, FakeClient(pause=0.2, length=100), request_timeout=0.5) as server:
        status, content = server.chat()
        assert status == 504 and content["error_code"] == 504 and "request_timeout" in content["error_msg"]
        status, _, lines = server.ask("POST", "/api/chat", {"context": "say", "stream": True})
        *pieces, last = [json.loads(line) for line in lines.splitlines()]
        assert status == 200 and pieces[0] == said("0 ") and last["error_code"] == 504 and last["result"] is None
        status, content = server.json("POST", "/v1/embeddings", {"input": "say"})
        assert status == 504 and content["error"]["type"] == "timeout_error"
        assert all(one.cancelled.is_set() for one in server.client.given)


def test_an_answer_that_fails_is_an_error(prepared: Prepared) -> None:
    with running(prepared, FakeClient(error="the model has failed")) as server:
        assert server.chat() == (500, {"error_code": 500, "error_msg": "the model has failed", "result": None})
        status, _, lines = server.ask("POST", "/api/chat", {"context": "say", "stream": True})
        assert status == 200 and [json.loads(line)["error_code"] for line in lines.splitlines()] == [0, 500]


def test_who_cannot_be_served_now_is_told_when_to_ask_again(prepared: Prepared) -> None:
    with running(prepared, FakeClient(most=0)) as server:
        status, headers, _ = server.ask("POST", "/api/chat", {"context": "say"})
        assert status == 429 and headers["retry-after"] == "1"
        server.client.state.name = "loading"
        status, headers, _ = server.ask("POST", "/api/chat", {"context": "say"})
        assert status == 503 and headers["retry-after"] == "5"
        for name in ("loading", "restarting", "stalled", "stopping"):
            server.client.state.name = name
            status, _, content = server.ask("GET", "/health")
            assert status == 503 and json.loads(content) == {"status": name}


def test_health_answers_beside_clients_that_hold_their_connections(plain: Running) -> None:
    idle = [plain.raw(b"") for _ in range(50)]
    slow = [plain.raw(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{") for _ in range(50)]
    try:
        assert plain.ask("GET", "/health")[0] == 200 and plain.chat()[0] == 200
    finally:
        for connection in idle + slow:
            connection.close()


def test_health_answers_beside_as_many_answers_as_there_may_be(prepared: Prepared) -> None:
    with running(prepared, FakeClient(pause=0.05, length=10_000)) as server:
        most = REQUESTS + SPARE_THREADS - KEPT_THREADS
        bodies = [("/api/chat", {"context": "say"}), ("/v1/embeddings", {"input": "say"})]
        connections = [server.raw(request_bytes(*bodies[number % 2])) for number in range(most)]
        try:
            assert until(lambda: len(server.client.given) == most)
            for path, body in bodies:
                status, headers, _ = server.ask("POST", path, body)
                assert status == 429 and headers["retry-after"] == "1"
            assert server.health() == "ok"
        finally:
            for connection in connections:
                connection.close()
        assert until(lambda: all(one.cancelled.is_set() for one in server.client.given))
        server.client.length = 1
        assert until(lambda: server.chat()[0] == 200)


def test_who_reads_too_slowly_loses_its_answer(prepared: Prepared, monkeypatch: pytest.MonkeyPatch, log: Log) -> None:
    """Also if it reads all the time: each answer that waits for its reader keeps a thread."""
    monkeypatch.setattr(http_module, "STUCK_SECONDS", 1)
    monkeypatch.setattr(http_module, "CHECK_SECONDS", 1)
    with running(prepared) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")

        def is_cut() -> bool:
            try:
                return not connection.recv(500)
            except ConnectionError:
                return True

        assert until(lambda: is_cut() or '"route": "/large"' in log.text)  # the thread is free
        assert len(server.ask("GET", "/large")[2]) == LARGE  # who reads gets all


def test_no_file_is_needed(plain: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full or cannot be written stops nobody."""
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    assert plain.chat(unknown="x" * 3 * 2**20)[0] == 200
    assert len(plain.ask("GET", "/large")[2]) == LARGE


def test_a_body_that_is_refused_need_not_be_sent(plain: Running) -> None:
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    for length, status in ((2, b"HTTP/1.1 100"), (99_999_999, b"HTTP/1.1 413")):
        with plain.raw(head % length) as connection:
            assert connection.recv(100).startswith(status)


# --- what describes the server -----------------------------------------------------------------------


def test_the_description_is_openapi_and_names_every_route(plain: Running) -> None:
    api = json.loads(plain.ask("GET", "/openapi.json")[2])
    definitions.OPENAPI_31_VALIDATOR.validate(api)
    assert {"/api/chat", "/health", "/metrics", "/openapi.json", "/docs"} <= api["paths"].keys()
    for schema in api["components"]["schemas"].values():
        assert "$defs" not in schema
    status, headers, content = plain.ask("GET", "/docs")
    assert status == 200 and headers["content-type"].startswith("text/html") and "default-src 'none'" in str(headers)
    page = content.decode()
    assert all(f" {path}</code></h2>" in page for path in api["paths"])
    assert "http:" not in page and "https:" not in page and "<script" not in page
    status, headers, _ = plain.ask("GET", "/")
    assert status == 302 and headers["location"] == "docs"
    assert openapi.TITLE in page


def test_metrics_count_what_was_answered(prepared: Prepared) -> None:
    with running(prepared) as server:
        for stream in (False, True):
            server.ask("POST", "/api/chat", {"context": "say", "stream": stream})
        assert server.json("POST", "/v1/embeddings", {"input": ["say", "it"]})[0] == 200
        prompts = sum(len(prompt) for one in server.client.given for prompt in one.job.prompts)
        found = server.ask("GET", "/metrics")[2].decode()
    for name, value in (
        ("prompt_tokens_total", prompts),
        ("generation_tokens_total", 10),
        ("time_to_first_token_seconds_count", 2),
        ("inter_token_latency_seconds_count", 4),
        ("e2e_request_latency_seconds_count", 3),
        ("request_queue_time_seconds_count", 3),
        ("request_prompt_tokens_count", 4),
        ("request_generation_tokens_count", 2),
        ("num_requests_running", 0),
    ):
        assert f'paddle_llm:{name}{{model_name="tiny"}} {float(value)}\n' in found
