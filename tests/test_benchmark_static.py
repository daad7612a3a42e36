"""benchmarks/static_graph.py without a model: small scripts stand in for its processes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from utils.errors import UserError


@pytest.fixture
def pairs(benchmark: ModuleType) -> ModuleType:
    import static_graph

    return static_graph


def processes(*values: list[float], name: str = "prefill") -> list[Any]:
    return [{"values": {name: one}, "answers": {}, "versions": {}} for one in values]


def test_a_round_is_one_value_and_its_repetitions_are_pairs(pairs: ModuleType) -> None:
    static = processes([110.0, 55.0, 300.0], [90.0, 90.0, 90.0])  # a slow moment of both, a lucky one of one side
    dynamic = processes([100.0, 50.0, 100.0], [100.0, 100.0, 100.0])
    found = pairs.mean_ratio(static, dynamic, "prefill")
    assert found["rounds"] == [1.1, 0.9]
    assert found["mean"] == pytest.approx(math.sqrt(1.1 * 0.9), abs=1e-4)
    error = abs(math.log(1.1) - math.log(0.9)) / 2  # two values: half their distance
    assert found["standard_error"] == pytest.approx(found["mean"] * error, abs=1e-4)


def test_fewer_seconds_are_better(pairs: ModuleType) -> None:
    static, dynamic = (processes([s], [s], name="first_token") for s in (0.1, 0.2))
    found = pairs.mean_ratio(static, dynamic, "first_token")
    assert (found["mean"], found["standard_error"]) == (2.0, 0.0)


def test_arguments(pairs: ModuleType) -> None:
    assert (pairs.options([]).rounds, pairs.options([]).measures) == (20, list(pairs.REPEATS))
    with pytest.raises(UserError, match="--rounds 1: expected 2 or more"):
        pairs.options(["--rounds", "1"])


@pytest.mark.parametrize(
    ("option", "suffix", "name"), [((), "_inference_model", "static_graph"), (("--plain",), "", "static_graph_plain")]
)
def test_a_run(
    option: tuple[str, ...],
    suffix: str,
    name: str,
    pairs: ModuleType,
    fake: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pairs, "locate", lambda name: SimpleNamespace(folder=tmp_path))
    monkeypatch.setattr(pairs.inference, "make_work", lambda quick: {"threads": 1})
    monkeypatch.setattr(pairs.inference, "corner_command", lambda corner, *folders: fake(corner))
    words = ["--rounds", "2", "--measures", "prefill", "decode_8", "--results", str(tmp_path), *option]
    monkeypatch.setattr(sys, "argv", ["static_graph.py", *words])
    pairs.main()
    assert [path.name for path in tmp_path.glob("*.json")] == [f"{name}.json"]
    results = json.loads((tmp_path / f"{name}.json").read_text())
    expected = {"mean": 1.0, "standard_error": 0.0, "rounds": [1.0, 1.0]}  # the stand-ins say the same at all times
    assert results[f"static{suffix}"] == {"prefill": expected, "decode_8": expected}
    assert [len(rounds) for rounds in results["figures"][f"dynamic{suffix}"]["prefill"]["rounds"]] == [6, 6]
    assert "prefill      1.000 ± 0.000  (1.00 to 1.00; dynamic 1024, static 1024)" in capsys.readouterr().out
