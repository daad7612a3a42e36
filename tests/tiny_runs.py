"""Runs of the real finetune_generation.py on a tiny model, in this process or in one of their own."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from tiny_models import write_tiny_llama

from utils.checkpoints.tensors import read_tensors

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["red", "blue", "green", "river", "house", "apple", "tree", "one", "two", "three", "four", "five"]


def write_rows(path: Path, count: int, *, seed: int = 0, longest: int = 8) -> Path:
    """Rows whose answer repeats the word of the question, 1 to `longest` times: easy to learn, uneven."""
    chosen = random.Random(seed)
    rows = []
    for _ in range(count):
        word = chosen.choice(WORDS)
        rows.append({"src": f"Say {word}", "tgt": " ".join([word] * chosen.randint(1, longest))})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@dataclass(frozen=True)
class Tiny:
    """A folder with a model, data, and a cache of its own."""

    home: Path

    @property
    def model(self) -> Path:
        return self.home / "model"

    @property
    def data(self) -> Path:
        return self.home / "data"

    def arguments(self, output: Path, options: Sequence[object]) -> list[str]:
        """The command line of a run; of an option that is given twice the last value counts."""
        chosen: dict[str, list[str]] = {
            "--model_name_or_path": [str(self.model)],
            "--dataset_name_or_path": [str(self.data)],
            "--output_dir": [str(output)],
            "--src_length": ["64"],
            "--max_length": ["128"],
            "--logging_steps": ["1"],
            "--learning_rate": ["1e-2"],
            "--per_device_train_batch_size": ["8"],
            "--device": ["cpu"],
            "--disable_tqdm": ["true"],
            "--report_to": ["none"],
        }
        name = ""
        for option in map(str, options):
            if option.startswith("--"):
                name = option
                chosen[name] = []
            else:
                chosen[name].append(option)
        return [part for name, values in chosen.items() for part in (name, *values)]

    @property
    def environment(self) -> dict[str, str]:
        return {"PADDLE_LLM_CACHE": str(self.home / "cache")}

    def run(self, output: Path, *options: object, expect: int = 0) -> Result:
        """finetune_generation.main in this process, as the script would run it."""
        return run_main("finetune_generation", self.arguments(output, options), self.environment, output, expect)

    def start(self, output: Path, *options: object, code: str | None = None) -> subprocess.Popen[str]:
        """The script in a process of its own; `code` runs before its main."""
        arguments = self.arguments(output, options)
        command = [str(ROOT / "finetune_generation.py")]
        if code is not None:
            command = ["-c", f"{code}\nimport runpy\nrunpy.run_path('finetune_generation.py', run_name='__main__')"]
        return subprocess.Popen(
            [sys.executable, *command, *arguments],
            cwd=ROOT,
            # as many threads as runs in this process have: sums depend on it, and curves are compared digit by digit
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def script(self, output: Path, *options: object, code: str | None = None) -> Result:
        process = self.start(output, *options, code=code)
        out, err = process.communicate(timeout=120)
        return Result(output, process.returncode, out, err)


@dataclass(frozen=True)
class Result:
    """What one run did: exit code, what it said, and what lies in its output folder."""

    output: Path
    code: int
    out: str
    err: str

    def json(self, name: str) -> dict:
        return json.loads((self.output / name).read_text("utf-8"))

    @property
    def curve(self) -> list[dict[str, str]]:
        with open(self.output / "loss_curve.csv", newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    @property
    def losses(self) -> np.ndarray:
        """float64 [steps]: the training loss of every log line."""
        return np.array([float(row["loss"]) for row in self.curve if row["loss"]])

    def checkpoints(self) -> list[str]:
        return sorted((path.name for path in self.output.glob("checkpoint-*")), key=lambda name: int(name[11:]))


def run_main(
    script: str, words: Sequence[str], environment: dict[str, str], output: Path, expect: int | None
) -> Result:
    """The main function of a script in this process, as the script would run it; None expects any exit code."""
    from utils.errors import run_script

    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [f"{script}.py", *words]),
        mock.patch.dict(os.environ, environment),
        mock.patch("utils.runtime.prepare"),  # done by conftest, before Paddle was loaded
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        run_script(importlib.import_module(script).main)
    result = Result(output, int(ended.value.code or 0), out.getvalue(), err.getvalue())
    assert expect in (None, result.code), result.err + result.out
    return result


def tensors(path: Path) -> dict[str, np.ndarray]:
    return dict(read_tensors(path))


def make_tiny(home: Path) -> Tiny:
    """A model of 2 layers, 50 training rows, 10 dev rows and 6 test rows."""
    write_tiny_llama(
        home / "model", hidden_size=64, intermediate_size=96, initializer_range=0.05, tie_word_embeddings=True
    )
    for seed, (split, count) in enumerate({"train": 50, "dev": 10, "test": 6}.items()):
        write_rows(home / "data" / f"{split}.json", count, seed=seed)
    return Tiny(home)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))
