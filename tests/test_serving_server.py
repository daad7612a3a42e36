"""flask_server.py as a process of its own: what it says of itself, what it counts, who may leave."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from serving_processes import ServerProcess, request_bytes, until

WORDS = ["red", "blue", "河", "🌊", "e\u0301", "two", "three"]


def utterances(lines: bytes) -> str:
    """The text of a stream of /api/chat."""
    return "".join(json.loads(line)["result"]["response"]["utterance"] for line in lines.splitlines())


def usage_of(server: ServerProcess, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What a response says of its tokens; of a stream, its last chunk but the end."""
    status, _, content = server.ask("POST", path, body)
    assert status == 200, content
    if body.get("stream"):
        *_, content, end = [line.removeprefix(b"data: ") for line in content.splitlines() if line]
        assert end == b"[DONE]"
    found: dict[str, Any] = json.loads(content)["usage"]
    return found


def any_request(chosen: random.Random) -> tuple[str, dict[str, Any]]:
    """A route and a body that it takes."""
    text = " ".join(chosen.choices(WORDS, k=chosen.randint(1, 12)))
    if chosen.random() < 0.1:
        return "/v1/embeddings", {"input": [text, "two"]}
    body: dict[str, Any] = {"max_tokens": chosen.randint(1, 12), "n": chosen.choice([1, 1, 1, 3]), "temperature": 1.0}
    if chosen.random() < 0.5:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if chosen.random() < 0.5:
        return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}
    return "/v1/completions", {**body, "prompt": chosen.choice([text, [text, "three"]])}


def test_chat_gives_the_same_text_whole_and_in_pieces(tiny_server: ServerProcess) -> None:
    for context in WORDS:
        body = {"context": f"say {context}", "max_length": 120}
        status, whole = tiny_server.json("POST", "/api/chat", body)
        assert status == 200 and whole["error_code"] == 0
        status, _, lines = tiny_server.ask("POST", "/api/chat", {**body, "stream": True})
        assert status == 200 and utterances(lines) == whole["result"]["response"]["utterance"]


def test_the_counters_are_the_sum_of_what_every_answer_was_told(tiny_server: ServerProcess) -> None:
    chosen = random.Random(5)
    requests = [any_request(chosen) for _ in range(200)]
    before = tiny_server.metrics()
    with ThreadPoolExecutor(8) as pool:
        usages = list(pool.map(lambda one: usage_of(tiny_server, *one), requests))
    until(tiny_server.idle)
    after = tiny_server.metrics()
    label = '{model_name="tiny"}'

    def grown(name: str) -> float:
        return after[name + label] - before[name + label]

    assert grown("prompt_tokens_total") == sum(one["prompt_tokens"] for one in usages)
    assert grown("generation_tokens_total") == sum(one.get("completion_tokens", 0) for one in usages)
    cached = [one.get("prompt_tokens_details", {}).get("cached_tokens", 0) for one in usages]
    assert grown("prefix_cache_hits_total") == sum(cached)
    assert all(one["total_tokens"] == one["prompt_tokens"] + one.get("completion_tokens", 0) for one in usages)


def test_a_client_that_leaves_frees_its_place(tiny_server: ServerProcess) -> None:
    for stream in (False, True):
        body = {"context": "say", "stream": stream, "temperature": 1.0, "top_k": 0}
        connections = [tiny_server.raw(request_bytes("/api/chat", body)) for _ in range(12)]
        until(lambda: not tiny_server.idle())
        for connection in connections:
            connection.close()
        until(tiny_server.idle)
    assert tiny_server.chat()[0] == 200
