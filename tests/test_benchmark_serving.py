"""The parts of benchmarks/serving.py that need no peer: its requests, its clients, and what becomes of the figures."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from utils.errors import UserError

PAUSE = 0.05


@pytest.fixture
def benchmark(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import serving

    return serving


class Streams(BaseHTTPRequestHandler):
    """Answers as an OpenAI-compatible server does: an event a token, with a pause before each; 13 is refused."""

    protocol_version = "HTTP/1.1"
    at_once, most = 0, 0

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["stream"] and asked["ignore_eos"] and asked["temperature"] == 0
        if asked["prompt"] == [13]:
            self.send_error(400, "no such token")
            return
        Streams.at_once += 1
        Streams.most = max(Streams.most, Streams.at_once)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(asked["max_tokens"]):
            time.sleep(PAUSE)
            self.event({"choices": [{"text": str(number)}]})
        counts = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": asked["max_tokens"]}
        self.event({"choices": [], "usage": {**counts, "prompt_tokens_details": {"cached_tokens": 1}}})
        self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        Streams.at_once -= 1

    def event(self, content: dict[str, Any]) -> None:
        line = f"data: {json.dumps(content)}\n\n".encode()
        self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    Streams.at_once = Streams.most = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Streams) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_clients_ask_and_measure(benchmark: ModuleType, address: str) -> None:
    asked = [{"prompt": [1, 2], "max_tokens": length} for length in (4, 2, 4, 4)] + [{"prompt": [13], "max_tokens": 1}]
    found = benchmark.measure(address, 2, asked)
    assert Streams.most == 2
    assert [one["text"] for one in found] == ["0123", "01", "0123", "0123", ""]
    assert "HTTP 400" in found[-1]["error"] and not any("error" in one for one in found[:-1])
    figures = benchmark.report.figures(found)
    assert figures["errors"] == [found[-1]["error"]] and figures["wrong_lengths"] == 0
    assert figures["cached"] == 4 / 8 and figures["goodput"] == 4 / 5
    assert figures["next_median"] > PAUSE * 0.8 and figures["first_median"] > PAUSE * 0.8
    seconds = max(one["ended"] for one in found[:-1])
    assert figures["tokens"] == pytest.approx(14 / seconds) and figures["requests"] == pytest.approx(4 / seconds)


def test_requests_are_the_same_for_the_same_seed(benchmark: ModuleType) -> None:
    source = benchmark.mix.Source.of(benchmark.prepare(benchmark.MODEL, device="cpu"))
    mixed, again = (benchmark.mix.requests(source, "mixed", 200, "seed") for _ in range(2))
    assert mixed == again != benchmark.mix.requests(source, "mixed", 200, "another")
    lengths, answers = ([len(one["prompt"]) for one in mixed], [one["max_tokens"] for one in mixed])
    assert min(lengths) < 45 and max(lengths) > 500 and min(answers) < 8 and max(answers) > 120
    assert max(map(sum, zip(lengths, answers, strict=True))) < benchmark.CONTEXT
    shared = benchmark.mix.requests(source, "shared", 20, "seed")
    head = shared[0]["prompt"][: benchmark.mix.SYSTEM_TOKENS]
    assert all(one["prompt"][: len(head)] == head for one in shared)
    assert len({tuple(one["prompt"]) for one in shared}) == 20


def recorded(speed: float, text: str) -> list[dict[str, Any]]:
    """Two answers, one of them within the limits."""
    usage = {"prompt_tokens": 10, "completion_tokens": 2}
    good = {"sent": 0.0, "pieces": [0.4 / speed, 0.5 / speed], "ended": 0.5 / speed}
    late = {"sent": 0.0, "pieces": [30.0, 30.1], "ended": 30.1}
    return [{**times, "text": text, "usage": usage, "max_tokens": 2} for times in (good, late)]


def test_results_are_shown_and_drawn(benchmark: ModuleType, tmp_path: Path) -> None:
    chosen = benchmark.options(["--sides", "dynamic", "llama.cpp", "--clients", "4"])
    found = {
        (name, 4, side): [recorded(speed, text), recorded(speed, text)]
        for name in chosen.mixes
        for side, speed, text in (("dynamic", 2.0, "a"), ("llama.cpp", 1.0, "a" if name == "mixed" else "b"))
    }
    facts = {"processor": "P", "threads": 2}
    results = json.loads(json.dumps(benchmark.assemble(chosen, facts, found)))
    assert results["figures"]["mixed"]["4"]["dynamic"]["goodput"] == 0.5
    ratios = results["ratios"]["shared"]["4"]["dynamic"]
    assert ratios["tokens"] == 1 and ratios["goodput"] == 1 and ratios["next_median"] > 1
    assert results["same_texts"] == {"dynamic": 0.5}
    said = "\n".join(benchmark.report.table(results))
    assert "mixed lengths, 4 clients" in said and "(x1.00)" in said and "50% of the answers" in said
    benchmark.report.draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_options(benchmark: ModuleType) -> None:
    full, quick = benchmark.options([]), benchmark.options(["--quick"])
    assert (full.rounds, full.clients, full.mixes) == (2, [1, 4, 16, 64], ["mixed", "shared"])
    assert quick.rounds == 1 and quick.results != full.results  # a smoke run never replaces measured results
    with pytest.raises(UserError, match="expected 1 or more"):
        benchmark.options(["--rounds", "0"])
    words = benchmark.command("inference_model", 8010, 2)
    assert "--inference_model" in words and "--no_ui" in words
