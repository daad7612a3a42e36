"""The HTTP side over real sockets, with a stand-in for the process of the model."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from schemathesis.specs.openapi import definitions
from serving_fake import FakeClient
from serving_here import LARGE, REQUESTS, Log, Running, logged, running, said, tiny
from serving_processes import SECONDS, request_bytes, until

from utils.inference.loading import Prepared
from utils.serving import http as http_module
from utils.serving import limits, openapi
from utils.serving.http import KEPT_THREADS, SPARE_THREADS


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


def test_a_name_of_this_machine_is_as_good_as_its_address(prepared: Prepared) -> None:
    with running(prepared, host="127.1") as server:
        assert server.ask("GET", "/v1/models", Host="127.1")[0] == server.ask("GET", "/v1/models")[0] == 200
        assert server.ask("GET", "/v1/models", Host="evil.example")[0] == 403


def test_other_sites_are_allowed_by_name_only(prepared: Prepared) -> None:
    with running(prepared, cors_origins=["https://page.example"]) as server:
        asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
        status, headers, _ = server.ask("OPTIONS", "/api/chat", **asked)
        assert status == 200 and headers["access-control-allow-origin"] == "https://page.example"
        status, headers, _ = server.ask("POST", "/api/chat", {"context": "say"}, Origin="https://page.example")
        assert status == 200 and headers["access-control-allow-origin"] == "https://page.example"
        status, headers, _ = server.ask("POST", "/api/chat", {"context": "say"}, Origin="https://other.example")
        assert status == 403 and "access-control-allow-origin" not in headers


# --- clients that leave, and answers that do not come ------------------------------------------------


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
        until(lambda: len(server.client.given) == count)
        time.sleep(0.2)
        assert not any(one.cancelled.is_set() for one in server.client.given)
        connection.close()
        until(lambda: all(one.cancelled.is_set() for one in server.client.given))
        counted = f'request_success_total{{finished_reason="abort",model_name="tiny"}} {count}.0'
        until(lambda: counted.encode() in server.ask("GET", "/metrics")[2])
    until(lambda: '"status": 499' in log.text)
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
            until(lambda: len(server.client.given) == most)
            for path, body in bodies:
                status, headers, _ = server.ask("POST", path, body)
                assert status == 429 and headers["retry-after"] == "1"
            assert server.health() == "ok"
        finally:
            for connection in connections:
                connection.close()
        until(lambda: all(one.cancelled.is_set() for one in server.client.given))
        server.client.length = 1
        until(lambda: server.chat()[0] == 200)


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

        until(lambda: is_cut() or '"route": "/large"' in log.text)  # the thread is free
        assert len(server.ask("GET", "/large")[2]) == LARGE  # who reads gets all


def test_no_file_is_needed(plain: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full or cannot be written stops nobody."""
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    assert plain.chat(unknown="x" * 3 * 2**20)[0] == 200
    assert len(plain.ask("GET", "/large")[2]) == LARGE


def test_few_open_files_are_enough(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (64, 64))
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)
    with running(prepared) as server:
        assert server.health() == "ok"


def test_a_body_that_is_refused_need_not_be_sent(plain: Running) -> None:
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    for length, status in ((2, b"HTTP/1.1 100"), (99_999_999, b"HTTP/1.1 413")):
        with plain.raw(head % length) as connection:
            assert connection.recv(100).startswith(status)


def test_a_body_has_one_length(plain: Running) -> None:
    """Or else a proxy before the server might take a part of it for another request."""
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n"
    with plain.raw(head + b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        answer = b"".join(iter(lambda: connection.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.1 400") and answer.count(b"HTTP/1.1") == 1 and b"exclude each other" in answer


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
