"""The parts of benchmarks/inference.py that need no model and no peer; small scripts stand in for its processes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from utils.errors import UserError

CONFIG = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}


@pytest.fixture
def report(benchmark: ModuleType) -> ModuleType:
    return sys.modules["inference_report"]


def measured(speeds: list[float], tokens: list[list[int]], contexts: dict[str, float] | None = None) -> dict[str, Any]:
    """What one process measured: a repetition at each speed, the first prompt alone and all together."""
    values = {name: [100.0 * speed for speed in speeds] for name in ("prefill", "decode_1", "decode_8")}
    values |= {"first_token": [0.5 / speed for speed in speeds], "cold_start": [0.5 / speeds[0]], "peak": [10**9]}
    values |= {context: [seconds] for context, seconds in (contexts or {}).items()}
    answers = {str(prompt): row for prompt, row in enumerate(tokens)}
    alone = [{"0": row} for row in tokens[:1]] * 2
    return {"values": values, "answers": {"decode_1": alone, "decode_8": [answers] * 2}, "versions": {"x": "1"}}


@pytest.fixture
def results(benchmark: ModuleType) -> dict[str, Any]:
    """Recorded figures of two rounds; the last corner is not there, the first parts from the peer in one answer."""
    work = {
        **{"threads": 2, "prefill": [1] * 512, "batch": [[1, 2], [1, 2, 3]], "new_tokens": 4},
        **{"repeats": {"prefill": 2, "first_token": 2, "decode_1": 2, "decode_8": 2}, "growth_steps": 3},
    }
    right, wrong = [[5, 6, 7, 8], [5, 6, 7, 9]], [[5, 6, 7, 8], [5, 6, 0, 9]]
    found = {
        "dynamic": [measured([0.5, 0.5], wrong), measured([0.6, 0.6], right)],
        "dynamic_inference_model": [measured([2.0, 2.0], right), measured([3.0, 3.0], right)],
        "static": [measured([1.0, 1.0], right), measured([1.0, 1.0], right)],
        "huggingface": [measured([1.0, 1.0], right), measured([1.0, 1.0], right)],
    }
    grown = {
        "dynamic_inference_model": [measured([1], right, {"512": 0.01, "1024": 0.02})],
        "huggingface": [measured([1], right, {"512": 0.02, "1024": 0.03})],
    }
    facts = {
        "machine": benchmark.machine(2),
        "weights": 1000,
        "libraries": {"toolchain": 4 * 10**8, "huggingface": 3 * 10**8},
        "not_available": {"static_inference_model": "not there"},
    }
    return benchmark.assemble(benchmark.options(["--rounds", "2"]), facts, work, CONFIG, found, grown)


def test_a_ratio_above_one_is_better_for_every_figure(report: ModuleType) -> None:
    assert report.advantage(200.0, 100.0, higher=True) == 2.0  # twice the tokens per second
    assert report.advantage(50.0, 100.0, higher=False) == 2.0  # half the seconds
    assert report.spread([[3.0, 1.0], [8.0]], True) == {"best": 8.0, "median": 3.0, "rounds": [[3.0, 1.0], [8.0]]}
    assert report.spread([[3.0, 1.0], [8.0]], higher=False)["best"] == 1.0


def test_ratios_pair_what_was_measured_together(results: dict[str, Any]) -> None:
    ratios = results["ratios"]
    assert ratios["dynamic_inference_model"]["decode_8"] == {"median": 2.5, "low": 2.0, "high": 3.0}
    assert ratios["dynamic"]["decode_1"] == {"median": 0.55, "low": 0.5, "high": 0.6}
    assert ratios["dynamic_inference_model"]["cold_start"]["high"] == 3.0
    assert ratios["static"]["peak"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert "huggingface" not in ratios
    assert results["growth_ratios"] == {
        "dynamic_inference_model": {
            "512": {"median": 2.0, "low": 2.0, "high": 2.0},
            "1024": {"median": 1.5, "low": 1.5, "high": 1.5},
        }
    }


def test_a_machine_that_slows_down_both_sides_leaves_the_ratio(report: ModuleType) -> None:
    steady = report.paired_ratios([measured([1.2, 1.2], [])], [measured([1.0, 1.0], [])], report.HIGHER)
    slowed = report.paired_ratios([measured([1.2, 0.6], [])], [measured([1.0, 0.5], [])], report.HIGHER)
    assert slowed == steady
    assert slowed["decode_8"] == {"median": 1.2, "low": 1.2, "high": 1.2}
    assert slowed["first_token"]["median"] == 1.2
    one_sided = report.paired_ratios([measured([1.2, 0.6], [])], [measured([1.0, 1.0], [])], report.HIGHER)
    assert one_sided["decode_8"] == {"median": 0.9, "low": 0.6, "high": 1.2}


def test_a_static_side_is_compared_with_the_dynamic_one_of_its_model(results: dict[str, Any]) -> None:
    assert list(results["against_dynamic"]) == ["static"]  # the other static corner was not there
    assert results["against_dynamic"]["static"]["prefill"] == {"median": 1.833, "low": 1.667, "high": 2.0}


def test_one_round_with_another_token_is_no_agreement(results: dict[str, Any]) -> None:
    agreement = results["agreement"]
    assert agreement["dynamic"]["decode_8"] == {"equal": 1, "answers": 2, "parted_at": {"1": 2}}
    assert agreement["dynamic"]["decode_1"] == {"equal": 1, "answers": 1, "parted_at": {}}
    assert agreement["static"]["decode_8"]["equal"] == 2


def test_bytes_of_the_cache_and_the_curve_that_they_give(report: ModuleType, results: dict[str, Any]) -> None:
    per_token = 2 * 4 * 3 * 2 * 8  # keys and values, float32, layers, heads, width
    assert report.cache_bytes(CONFIG, 10) == 10 * per_token
    assert results["bytes"] == {"weights": 1000, "cache": 513 * per_token, "cache_per_token": per_token} | {
        "libraries": {"toolchain": 4 * 10**8, "huggingface": 3 * 10**8}
    }
    assert report.cache_bytes({**CONFIG, "head_dim": 16}, 1) == 2 * per_token
    assert report.bytes_read_curve(2.0, 100, 1, [100, 300]) == [2.0, 4.0]


def test_results_table_and_plot(report: ModuleType, results: dict[str, Any], tmp_path: Path) -> None:
    assert json.loads(json.dumps(results)) == results
    lines = report.table(results)
    place = next(number for number, line in enumerate(lines) if "decoding, batch 8" in line)
    assert lines[place].split()[-4:] == ["55.0", "250.0", "100.0", "100.0"]
    assert lines[place + 1].split()[:6] == ["x0.55", "(0.50,", "0.60)", "x2.50", "(2.00,", "3.00)"]
    assert any(line.startswith("static beside dynamic: prefill x1.83 (1.67, 2.00), ") for line in lines)
    assert "static + inference model: not available (not there)" in lines
    assert "dynamic: answers equal to the peer's token by token: decode_1: 1 of 1, decode_8: 1 of 2" in lines
    assert any(line.split()[-2:] == ["10.0", "20.0"] for line in lines)  # ms at both contexts
    assert any(line.split() == ["x2.00", "x1.50"] for line in lines)
    report.draw(results, tmp_path / "new" / "inference.png")
    report.draw({**results, "growth": {}, "growth_ratios": {}}, tmp_path / "short.png")
    assert (tmp_path / "new" / "inference.png").stat().st_size > (tmp_path / "short.png").stat().st_size > 10_000


def test_peak_memory_is_shown_with_and_without_the_libraries(report: ModuleType, results: dict[str, Any]) -> None:
    results["bytes"] |= {"weights": 4 * 10**8, "cache": 10**8}
    lines = report.table(results)
    assert next(line for line in lines if line.startswith("peak memory /")).split()[-4:] == ["2.00"] * 4
    shares = "dynamic 1.20, dynamic + inference model 1.20, static 1.20, Hugging Face 1.40"
    assert f"peak memory without the libraries alone / (weights + cache): {shares}" in lines


def test_arguments(benchmark: ModuleType, root: Path) -> None:
    full, quick = benchmark.options([]), benchmark.options(["--quick", "--corners", "dynamic"])
    assert (full.rounds, full.long, full.results) == (3, False, root / "benchmarks" / "results")
    assert full.corners == ["dynamic", "dynamic_inference_model", "static", "static_inference_model"]
    assert (quick.rounds, quick.corners) == (1, ["dynamic"])
    assert quick.results != full.results  # a smoke run never replaces measured results
    assert benchmark.options(["--quick", "--rounds", "2"]).rounds == 2
    with pytest.raises(UserError, match="--rounds 0"):
        benchmark.options(["--rounds", "0"])
    with pytest.raises(SystemExit):
        benchmark.options(["--corners", "sideways"])


def test_a_corner_that_is_not_there_has_a_reason(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def today(name: str) -> None: ...

    def later(name: str, mode: str, inference_model: bool) -> None: ...

    assert benchmark.missing("dynamic") is None
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark.loading, "prepare", today)
    assert benchmark.missing("dynamic") is None
    assert "inference_model or mode" in benchmark.missing("dynamic_inference_model")
    monkeypatch.setattr(benchmark.loading, "prepare", later)
    assert benchmark.missing("dynamic_inference_model") is None
    assert "export_model.py" in benchmark.missing("static_inference_model")
    (tmp_path / "export_model.py").touch()
    assert [corner for corner in benchmark.CORNERS if benchmark.missing(corner)] == []


@pytest.fixture
def started(sides: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The processes that the test has started so far."""
    found: list[Any] = []
    popen = sides.subprocess.Popen
    monkeypatch.setattr(sides.subprocess, "Popen", lambda *a, **k: found.append(popen(*a, **k)) or found[-1])
    return found


def test_sides_live_together_and_take_turns(
    benchmark: ModuleType, fake: Callable[..., list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ("dynamic", "static", "huggingface")
    plan = benchmark.speed_plan({"prefill": 2, "first_token": 1, "decode_1": 2, "decode_8": 1})
    found = benchmark.in_turn({name: fake(name) for name in names}, 2, plan, dict(os.environ))
    asked = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    prefill = [name for name, prompts, tokens in asked if (prompts, tokens) == ("1", "1")][3:9]  # after the warm-up
    assert prefill == [*reversed(names), *names]
    both = [name for name, prompts, tokens in asked if (prompts, tokens) == ("2", "9")]
    assert both == [*names, *reversed(names)]  # another order in every round
    assert {name: len(rounds) for name, rounds in found.items()} == dict.fromkeys(names, 2)
    one = found["static"][1]
    assert one["values"]["prefill"] == [1024.0, 1024.0] and one["values"]["decode_8"] == [8.0]
    assert one["answers"]["decode_1"] == [{"0": [7] * 9}, {"1": [7] * 9}]
    assert one["values"]["peak"][0] > 10**6 and one["values"]["cold_start"][0] > 0
    said = capfd.readouterr().out.splitlines()
    assert said[0].startswith("[1/18] round 1 of 2, starting, 3 sides (about ") and said[-1].startswith("[18/18]")


def test_growth_is_kept_by_context(benchmark: ModuleType, fake: Callable[..., list[str]]) -> None:
    found = benchmark.in_turn({"dynamic": fake("dynamic")}, 1, benchmark.growth_plan([32, 64]), dict(os.environ))
    values = found["dynamic"][0]["values"]
    assert (values["32"], values["64"]) == ([0.5], [0.5])


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("sys.exit('no such model')", r"static: expected .* with warm_up, .* ended with exit code 1.*\nno such model"),
        ("answers.write('hello\\n'); answers.flush()", r"static: expected .* printed 'hello'.*\na library's greeting"),
        ("import os; os.kill(os.getpid(), 9)", r"static: expected .* exit code -9"),
    ],
)
def test_a_side_that_fails_is_named_and_all_end(
    benchmark: ModuleType, fake: Callable[..., list[str]], started: list[Any], before: str, expected: str
) -> None:
    commands = {"dynamic": fake("dynamic"), "static": fake("static", before)}
    with pytest.raises(UserError, match=f"(?s){expected}"):
        benchmark.in_turn(commands, 1, benchmark.speed_plan({"prefill": 1}), dict(os.environ))
    assert len(started) == 2 and all(process.returncode is not None for process in started)


def test_an_interrupt_leaves_no_process(
    benchmark: ModuleType, fake: Callable[..., list[str]], started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Any, command: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("inference_sides.Side.ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        names = ("dynamic", "static")
        benchmark.in_turn({name: fake(name) for name in names}, 1, benchmark.growth_plan([]), dict(os.environ))
    assert len(started) == 2 and all(process.returncode is not None for process in started)


def test_a_side_whose_commands_end_says_its_peak(sides: ModuleType, fake: Callable[..., list[str]]) -> None:
    with sides.Side("static", fake("static"), dict(os.environ)) as side:
        side.read()
        side.process.stdin.close()
        assert side.read()["peak"] > 0
        assert side.process.wait(timeout=30) == 0


def test_the_time_left_follows_the_pace_so_far(
    sides: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 20.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress = sides.Progress([("first", 10.0), ("second", 30.0)])
    progress.next()
    progress.next()  # the first one took twice as long as expected
    assert capsys.readouterr().out.splitlines() == ["[1/2] first (about 40 s left)", "[2/2] second (about 60 s left)"]


def test_what_a_failed_process_said_is_shown(sides: ModuleType) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with pytest.raises(UserError, match=r"the export for static ended with exit code 1.*\nno such model"):
        sides.run_child(command, "the export for static", {})


def test_the_prompts_are_many_and_unequal(benchmark: ModuleType) -> None:
    assert len(benchmark.QUESTIONS) == 8 and len({len(question) for question in benchmark.QUESTIONS}) == 8
