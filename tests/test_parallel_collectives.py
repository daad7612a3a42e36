"""What Paddle lacks for several processes on CPUs, in real jobs: `parallel_jobs/collectives.py` runs the checks."""

from __future__ import annotations

from pathlib import Path

from launching import start_launched
from tiny_runs import Tiny, tiny  # noqa: F401

SCRIPT = "tests/parallel_jobs/collectives.py"


def test_operators_groups_pipeline_and_sharding_of_four(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    run = start_launched(tiny, tmp_path / "four", processes=4, script=SCRIPT, words=["four"])
    result = run.wait()
    assert result.code == 0, result.out + result.err
    assert result.err.count("all right") == 4
    assert "[INFO]" not in result.err and "WARNING" not in run.log(0)


def test_signals_and_a_rank_that_dies_in_an_exchange(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    result = start_launched(tiny, tmp_path / "two", processes=2, script=SCRIPT, words=["two"]).wait()
    assert result.code != 0
    assert result.err.count("signals: right") == 2, result.err
    assert "an exchange among ranks 0, 1 failed, for rank 0 an all-reduce of float32 [4, 8]: " in result.err
