"""The parts of benchmarks/inference.py that need no model and no peer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from utils.errors import UserError

CONFIG = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}


@pytest.fixture
def benchmark(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import inference

    return inference


@pytest.fixture
def report(benchmark: ModuleType) -> ModuleType:
    return sys.modules["inference_report"]


def said(speed: float, tokens: list[list[int]], contexts: dict[str, float] | None = None) -> dict[str, Any]:
    """What one process prints, and its cold start."""
    found: dict[str, Any] = dict.fromkeys(("prefill", "decode_1", "decode_8"), 100.0 * speed)
    found |= dict.fromkeys(("first_token", "cold_start"), 0.5 / speed)
    found |= {"peak": 10**9, "tokens": {"decode_1": tokens[:1], "decode_8": tokens}, "versions": {"x": "1"}}
    return found | {"growth": contexts or {}}


@pytest.fixture
def results(benchmark: ModuleType) -> dict[str, Any]:
    """Recorded figures of two rounds; the last corner is not there, the first parts from the peer in one answer."""
    work = {
        **{"threads": 2, "prefill": [1] * 512, "batch": [[1, 2], [1, 2, 3]], "new_tokens": 4},
        **{"singles": 1, "repeats": 1, "growth_steps": 3},
    }
    right, wrong = [[5, 6, 7, 8], [5, 6, 7, 9]], [[5, 6, 7, 8], [5, 6, 0, 9]]
    found = {
        "dynamic": [said(0.5, wrong), said(0.6, right)],
        "dynamic_inference_model": [said(2.0, right), said(3.0, right)],
        "static": [said(1.0, right), said(1.0, right)],
        "huggingface": [said(1.0, right), said(1.0, right)],
    }
    grown = {side: [said(1, right, {"512": 0.01, "1024": 0.02})] for side in ("dynamic_inference_model", "huggingface")}
    facts = {"machine": benchmark.machine(2), "weights": 1000, "not_available": {"static_inference_model": "not there"}}
    return benchmark.assemble(benchmark.options(["--rounds", "2"]), facts, work, CONFIG, found, grown)


def test_a_ratio_above_one_is_better_for_every_figure(report: ModuleType) -> None:
    assert report.advantage(200.0, 100.0, higher=True) == 2.0  # twice the tokens per second
    assert report.advantage(50.0, 100.0, higher=False) == 2.0  # half the seconds
    assert report.spread([3.0, 1.0, 8.0], higher=True) == {"best": 8.0, "median": 3.0, "rounds": [3.0, 1.0, 8.0]}
    assert report.spread([3.0, 1.0, 8.0], higher=False)["best"] == 1.0


def test_ratios_compare_best_with_best_and_median_with_median(results: dict[str, Any]) -> None:
    ratios = results["ratios"]
    assert ratios["dynamic_inference_model"]["decode_8"] == {"best": 3.0, "median": 2.5}
    assert ratios["dynamic"]["decode_1"] == {"best": 0.6, "median": 0.55}
    assert ratios["dynamic_inference_model"]["cold_start"]["best"] == 3.0
    assert ratios["static"]["peak"] == {"best": 1.0, "median": 1.0}
    assert "huggingface" not in ratios


def test_one_round_with_another_token_is_no_agreement(results: dict[str, Any]) -> None:
    agreement = results["agreement"]
    assert agreement["dynamic"]["decode_8"] == {"equal": 1, "answers": 2, "parted_at": {"1": 2}}
    assert agreement["dynamic"]["decode_1"] == {"equal": 1, "answers": 1, "parted_at": {}}
    assert agreement["static"]["decode_8"]["equal"] == 2


def test_bytes_of_the_cache_and_the_curve_that_they_give(report: ModuleType, results: dict[str, Any]) -> None:
    per_token = 2 * 4 * 3 * 2 * 8  # keys and values, float32, layers, heads, width
    assert report.cache_bytes(CONFIG, 10) == 10 * per_token
    assert results["bytes"] == {"weights": 1000, "cache": 513 * per_token, "cache_per_token": per_token}
    assert report.cache_bytes({**CONFIG, "head_dim": 16}, 1) == 2 * per_token
    assert report.bytes_read_curve(2.0, 100, 1, [100, 300]) == [2.0, 4.0]


def test_results_table_and_plot(report: ModuleType, results: dict[str, Any], tmp_path: Path) -> None:
    assert json.loads(json.dumps(results)) == results
    lines = report.table(results)
    assert any("decoding, batch 8" in line and "(x2.50)" in line and "(x0.55)" in line for line in lines)
    assert "static + inference model: not available (not there)" in lines
    assert "dynamic: answers equal to the peer's token by token: decode_1: 1 of 1, decode_8: 1 of 2" in lines
    assert any(line.split()[-2:] == ["10.0", "20.0"] for line in lines)  # ms at both contexts
    report.draw(results, tmp_path / "new" / "inference.png")
    report.draw({**results, "growth": {}}, tmp_path / "short.png")
    assert (tmp_path / "new" / "inference.png").stat().st_size > (tmp_path / "short.png").stat().st_size > 10_000


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


def test_sides_take_turns(benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(benchmark, "measure", lambda command, side, work, threads: order.append(side) or {"side": side})
    (tmp_path / "work.json").write_text('{"threads": 2}', encoding="utf-8")
    sides = ("dynamic", "static", "huggingface")
    found = benchmark.in_turn(sides, 2, dict.fromkeys(sides, ()), tmp_path / "work.json", 1.0, "speed")
    assert order == [*sides, *reversed(sides)]
    assert {side: len(rounds) for side, rounds in found.items()} == dict.fromkeys(sides, 2)


def test_what_a_failed_process_said_is_shown(benchmark: ModuleType) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with pytest.raises(UserError, match=r"dynamic ended with exit code 1.*\nno such model"):
        benchmark.run_child(command, "dynamic", {})


def test_the_prompts_are_many_and_unequal(benchmark: ModuleType) -> None:
    assert len(benchmark.QUESTIONS) == 8 and len({len(question) for question in benchmark.QUESTIONS}) == 8
