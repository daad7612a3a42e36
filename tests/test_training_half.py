"""Training in half precision, whose products a CPU rounds: losses near float32's, float32 copies, an exact resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from interrupted import interrupt
from tiny_runs import Result, Tiny, tiny  # noqa: F401

from utils.checkpoints.locate import stored_tensors
from utils.kernels import ways

OPTIONS = ["--do_train", "--do_eval", "--max_steps", 6, "--save_steps", 3, "--gradient_accumulation_steps", 2]
METHODS = {
    "sft": ["--learning_rate", 3e-3],
    "lora": ["--lora", "--lora_rank", 4, "--recompute"],
    "prefix": ["--prefix_tuning", "--num_prefix_tokens", 4, "--prefix_projection"],
}
ROUNDED = {"fp16": 2e-3, "bf16": 2e-2}  # of a loss, after some steps
CASES = [("sft", "fp16", "O1"), ("sft", "fp16", "O2"), ("sft", "bf16", "O2"), ("lora", "fp16", "O2"),
         ("lora", "bf16", "O1"), ("prefix", "bf16", "O2")]  # fmt: skip


@pytest.fixture(scope="module")
def exact(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:  # noqa: F811
    """The same runs in float32."""
    home = tmp_path_factory.mktemp("exact")
    return {name: tiny.run(home / name, *OPTIONS, *options) for name, options in METHODS.items()}


@pytest.mark.parametrize(("method", "dtype", "level"), CASES)
def test_half_precision_learns_as_float32_does(
    tiny: Tiny,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    exact: dict[str, Result],
    method: str,
    dtype: str,
    level: str,
) -> None:
    monkeypatch.setenv("CPU_HALF_PRECISION", "round")
    options = [*OPTIONS, *METHODS[method], f"--{dtype}", "--fp16_opt_level", level]
    run, wanted = tiny.run(tmp_path / "whole", *options), exact[method]
    assert not np.array_equal(run.losses, wanted.losses)
    np.testing.assert_allclose(run.losses, wanted.losses, rtol=ROUNDED[dtype])
    evaluated = (one.json("eval_results.json")["eval_loss"] for one in (run, wanted))
    np.testing.assert_allclose(*evaluated, rtol=ROUNDED[dtype])

    checkpoint = run.output / "checkpoint-3"
    kept = {name.split("|")[1] for name in stored_tensors(checkpoint, "optimizer")}
    assert ("master" in kept) == (level == "O2") and any("moment1" in name for name in kept)
    interrupt(tiny, tmp_path / "cut", 3, options)
    np.testing.assert_allclose(tiny.run(tmp_path / "cut", *options).losses, run.losses, atol=1e-6)


def test_a_dry_run_tells_which_way_computes_what(
    tiny: Tiny,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CPU_HALF_PRECISION", "round")
    out = tiny.run(tmp_path, "--do_train", "--fp16", "--use_flash_attention", "--dry_run").out
    assert "operators: matrix products in float32, rounded to float16; attention plain; norms" in out
    assert ways.flash_attention("gpu:0", wanted=True, plain_scores=True)
    told = {dropout: ways.described("gpu:0", "float16", flash=True, dropout=dropout) for dropout in (0.0, 0.1)}
    assert "products plain; attention flash;" in told[0.0] and "attention plain" in told[0.1]
    assert not ways.flash_attention("gpu", wanted=True, plain_scores=False)
