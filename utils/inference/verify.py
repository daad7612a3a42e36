"""Whether an exported model computes what the model computes that it was made from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.checkpoints.match import some
from utils.checkpoints.tensors import is_finite
from utils.errors import UserError

if TYPE_CHECKING:
    from utils.inference.engine import Engine
    from utils.inference.loading import Prepared

TOLERANCE = 1e-3  # of logits, relative to the largest
STEPS = 8
_CODE = "from utils.inference.verify import answer_from_arguments; answer_from_arguments()"


def trial(engine: Engine, vocabulary: int) -> dict[str, list[list[float]]]:
    """What an engine says to two made-up prompts of unequal lengths, and to the likeliest tokens after them.

    Returns:
        "tokens": the likeliest token of each row at each step; "logits": the largest and the first few.
    """
    random = np.random.default_rng(0)
    prompts = [random.integers(0, vocabulary, length).tolist() for length in (7, 12)]
    slots, logits = engine.open(prompts)
    tokens, values = [], []
    for _ in range(STEPS):
        best, highest = logits.argmax()
        tokens.append(best.tolist())
        values.append([*highest.tolist(), *logits.numpy()[:, :16].ravel().tolist()])
        logits = engine.advance(slots, [[int(token)] for token in best])
    engine.free(slots)
    return {"tokens": tokens, "logits": values}


def verify_export(folder: Path, engine: Engine, prepared: Prepared, device: str) -> None:
    """Loads an exported folder, in a new process if there is but one, and compares it with an engine of the same model.

    Raises:
        UserError: the model's own logits are not finite, the process failed, or its logits differ by more than
            `TOLERANCE`.
    """
    wanted = trial(engine, engine.vocabulary)
    if not np.isfinite(wanted["logits"]).all():
        raise UserError(_not_finite(prepared))
    if prepared.processes.several:
        from utils.inference.loading import load, prepare

        exported = prepare(
            str(folder),
            device=device,
            mode="static",
            inference_model=prepared.inference_model,
            processes=prepared.processes,
        )
        _compare(folder, wanted, trial(load(exported, device).engine, engine.vocabulary))
        return
    arguments = json.dumps({"folder": str(folder), "device": device, "inference_model": prepared.inference_model})
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _CODE, arguments], cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise UserError(f"{folder}: the exported model does not run (exit code {done.returncode}):\n{said}")
    _compare(folder, wanted, json.loads(done.stdout.splitlines()[-1]))


def _not_finite(prepared: Prepared) -> str:
    """Why the logits of a model that was to be exported are not finite, as far as its weights tell."""
    checkpoint = prepared.checkpoint
    bad = [name for name, tensor in checkpoint.tensors().items() if not is_finite(tensor.read())]
    if bad:
        return f"{checkpoint.folder}: the weights hold NaN or infinity in {some(bad)}; nothing was exported"
    return (
        f"{checkpoint.folder}: the model's logits are not finite in {prepared.dtype}, though its weights are; nothing "
        "was exported; try --dtype float32"
    )


def _compare(folder: Path, wanted: dict[str, list[list[float]]], found: dict[str, list[list[float]]]) -> None:
    ours, theirs = np.array(wanted["logits"]), np.array(found["logits"])
    difference = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    if not difference <= TOLERANCE:
        raise UserError(
            f"{folder}: the exported model differs from the model it was made from: its logits by {difference:.1e} of "
            f"the largest (allowed {TOLERANCE:.0e}); nothing was exported"
        )


def answer_from_arguments() -> None:
    """The new process: prints what the exported model says."""
    from utils import runtime
    from utils.inference.loading import load, prepare

    runtime.prepare()
    given = json.loads(sys.argv[1])
    prepared = prepare(given["folder"], device=given["device"], mode="static", inference_model=given["inference_model"])
    engine = load(prepared, given["device"]).engine
    print(json.dumps(trial(engine, engine.vocabulary)))
