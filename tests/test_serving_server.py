"""flask_server.py as a process of its own: what it says of itself, what it counts, what it survives."""

from __future__ import annotations

import json

from serving_cases import ServerProcess, request_bytes, until


def utterances(lines: bytes) -> str:
    """The text of a stream of /api/chat."""
    return "".join(json.loads(line)["result"]["response"]["utterance"] for line in lines.splitlines())


def test_chat_gives_the_same_text_whole_and_in_pieces(tiny_server: ServerProcess) -> None:
    for context in ("say red", "河 river 🌊", "e\u0301 two"):
        status, whole = tiny_server.chat(context=context, max_length=120)
        assert status == 200 and whole["error_code"] == 0
        status, _, lines = tiny_server.ask("POST", "/api/chat", {"context": context, "max_length": 120, "stream": True})
        assert status == 200 and utterances(lines) == whole["result"]["response"]["utterance"]


def test_a_client_that_leaves_frees_its_place(tiny_server: ServerProcess) -> None:
    for stream in (False, True):
        body = {"context": "say", "stream": stream, "temperature": 1.0, "top_k": 0}
        connections = [tiny_server.raw(request_bytes("/api/chat", body)) for _ in range(12)]
        assert until(lambda: not tiny_server.idle())
        for connection in connections:
            connection.close()
        assert until(tiny_server.idle)
    assert tiny_server.chat()[0] == 200
