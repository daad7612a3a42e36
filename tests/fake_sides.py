"""Stand-ins for the processes of benchmarks/inference.py, whose models need no time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

# A side whose model needs no time: it notes in a file of all sides what it was asked for.
FAKE = """
import sys, time
sys.path.insert(0, {benchmarks!r})
import inference_protocol as protocol
answers = protocol.open_answers()
print("a library's greeting")
def generate(prompts, new_tokens):
    with open({log!r}, "a") as log:
        print(sys.argv[1], len(prompts), new_tokens, file=log)
    return [[7] * new_tokens for _ in prompts], 0.5, 2.0
protocol.say(answers, {{"first_token_at": time.monotonic(), "load": 0.1, "versions": {{"fake": "1"}}}})
work = {{"prefill": [1] * 512, "first": [1], "batch": [[1], [1, 2]], "text": [1] * 99}}
{before}
protocol.serve(answers, generate, work | {{"new_tokens": 9, "growth_steps": 5}})
"""


@pytest.fixture
def benchmark(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import inference

    return inference


@pytest.fixture
def sides(benchmark: ModuleType) -> ModuleType:
    return sys.modules["inference_sides"]


@pytest.fixture
def fake(root: Path, tmp_path: Path, sides: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The command of a fake side; `before` is what it does before it waits for commands."""
    monkeypatch.setattr(sides, "SETTLE", 0.0)

    def command(name: str, before: str = "") -> list[str]:
        values = {"benchmarks": str(root / "benchmarks"), "log": str(tmp_path / "log"), "before": before}
        return [sys.executable, "-c", FAKE.format(**values), name]

    return command
