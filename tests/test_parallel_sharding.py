"""Sharding stages 1, 2 and 3: real processes train as one that has all their rows, each with a share of the state."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import write_tiny_llama
from tiny_runs import ROOT

WORKER = Path(__file__).resolve().parent / "sharding_worker.py"
CASES = 4 * 3  # kinds of training by stages


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.matrix)])
def test_a_sharded_run_is_that_of_one_process(processes: int, tmp_path: Path) -> None:
    """With 2 processes sharding alone, with 4 two copies of the model, each sharded over 2.

    The worker compares losses, gradient norms, weights and the optimizer's state after accumulation, clipping, weight
    decay, recomputation, a parameter without gradient, a tied head, LoRA+, and a change of objects halfway.
    """
    model = tmp_path / "model"
    model.mkdir()
    write_tiny_llama(model, tie_word_embeddings=True)
    launcher = [sys.executable, "-u", "-m", "paddle.distributed.launch", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*launcher, "--log_dir", str(tmp_path / "log"), str(WORKER), str(model), "2"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = "".join((tmp_path / "log" / f"workerlog.{rank}").read_text("utf-8") for rank in range(processes))
    assert done.returncode == 0, done.stdout + said
    assert said.count("ok ") == CASES
