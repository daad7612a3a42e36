"""Runs every way of a GPU on a tiny model, and tells which agree with float32 on the CPU: the first thing to run there.

    python tools/check_gpu.py                        # on a GPU, some minutes
    python tools/check_gpu.py --device cpu --short   # the same on a CPU, half precision by rounding; fewer ways

Trains by each method, in float16 and bfloat16, at O1 and O2, with and without flash attention and packed rows; answers
in half precision; exports and answers from the export. Prints a table; the exit code is 1 if something does not agree.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import io
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from utils import runtime  # noqa: E402
from utils.errors import run_script  # noqa: E402

METHODS = {
    "sft": ("--learning_rate", "3e-3"),
    "lora": ("--lora", "--learning_rate", "1e-2"),
    "prefix": ("--prefix_tuning", "--learning_rate", "3e-2"),
}
HALVES = {"fp16": ("float16", 0.01), "bf16": ("bfloat16", 0.05)}  # the type, and how far losses may be off, as a share
STEPS = 4


@dataclass(frozen=True)
class Way:
    """One way of training.

    Attributes:
        dtype: "fp16", "bf16"; "" is float32.
    """

    method: str
    dtype: str = ""
    level: str = "O1"
    flash: bool = False
    packed: bool = False

    def __str__(self) -> str:
        return f"{self.method} {self.dtype} {self.level}{' flash' * self.flash}{' packed' * self.packed}"

    @property
    def options(self) -> list[str]:
        words = [*METHODS[self.method], "--use_flash_attention", str(self.flash), "--intokens", str(self.packed)]
        return words + ([f"--{self.dtype}", "--fp16_opt_level", self.level] if self.dtype else [])

    @property
    def exact(self) -> Way:
        return Way(self.method, packed=self.packed)


def ways(short: bool) -> Iterator[Way]:
    """All of them, or a few in which each switch is on once."""
    if short:
        yield Way("sft", "fp16", "O2", flash=True, packed=True)
        yield Way("lora", "bf16", "O1", packed=True)
        return
    switches = (METHODS, HALVES, ("O1", "O2"), (False, True), (False, True))
    for method, dtype, level, flash, packed in itertools.product(*switches):
        yield Way(method, dtype, level, flash, packed)


@dataclass
class Table:
    """What was found, line by line as it is found."""

    faults: int = 0
    lines: list[str] = field(default_factory=list)

    def add(self, what: str, found: str, agrees: bool) -> None:
        self.faults += not agrees
        self.lines.append(f"{what:<30} {found:<48} {'agrees' if agrees else 'DIFFERS'}")
        print(self.lines[-1], flush=True)


class Failed(Exception):
    """A script has ended with an error, whose last line this is."""


def run(script: str, *words: object) -> str:
    """Runs the main function of a script in this process; returns what it has printed.

    Raises:
        Failed: it ended with another exit code than 0.
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [f"{script}.py", *map(str, words)]),
        mock.patch.object(runtime, "prepare"),  # Paddle is there already
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            run_script(importlib.import_module(script).main)
        except SystemExit as ended:
            if ended.code:
                lines = err.getvalue().strip().splitlines()
                raise Failed(lines[-1] if lines else f"exit code {ended.code}") from None
        except Exception as error:  # of an operator that this device does not have, say
            raise Failed((str(error).strip() or repr(error)).splitlines()[-1].strip()) from error
    return out.getvalue()


class Check:
    """Runs on a tiny model in a folder.

    Args:
        device: "gpu" or "cpu".
    """

    def __init__(self, home: Path, device: str) -> None:
        from tiny_models import write_tiny_llama

        self.home, self.device, self.table = home, device, Table()
        write_tiny_llama(home / "model", hidden_size=64, intermediate_size=96, initializer_range=0.05)
        words = ("red", "blue", "green", "river", "house", "apple")
        rows = [{"src": f"Say {words[n % 6]}", "tgt": " ".join([words[n % 6]] * (1 + n % 7))} for n in range(48)]
        for split in ("train", "dev"):
            path = home / "data" / f"{split}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        self._exact: dict[Way, list[float]] = {}

    def losses(self, way: Way, device: str) -> list[float]:
        """Of each step."""
        output = self.home / "runs" / f"{device} {way}".replace(" ", "_")
        options: Mapping[str, object] = {
            "model_name_or_path": self.home / "model",
            "dataset_name_or_path": self.home / "data",
            "output_dir": output,
            "device": device,
            "max_steps": STEPS,
            "per_device_train_batch_size": 2 if way.packed else 8,
            "src_length": 64,
            "max_length": 128,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
        }
        words = itertools.chain.from_iterable((f"--{name}", value) for name, value in options.items())
        run("finetune_generation", "--do_train", *words, *way.options)
        with open(output / "loss_curve.csv", newline="", encoding="utf-8") as file:
            return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]

    def training(self, way: Way) -> None:
        bound = HALVES[way.dtype][1]
        if way.exact not in self._exact:
            self._exact[way.exact] = self.losses(way.exact, "cpu")
        exact = self._exact[way.exact]
        try:
            found = self.losses(way, self.device)
        except Failed as error:
            self.table.add(str(way), str(error)[:48], False)
            return
        worst = max(abs(one - other) / other for one, other in zip(found, exact, strict=True))
        self.table.add(str(way), f"losses within {worst:.1e} of float32's", worst <= bound)

    def answers(self, model: Path, device: str, *options: str) -> list[str]:
        output = self.home / "answers.json"
        words = ("--model_name_or_path", model, "--data_file", self.home / "data" / "dev.json", "--output_file", output)
        run("predictor", *words, "--device", device, "--max_new_tokens", 8, "--batch_size", 8, *options)
        return [json.loads(line)["output"] for line in output.read_text("utf-8").splitlines()]

    def answering(self, what: str, model: Path, exact: Sequence[str], *options: str) -> None:
        try:
            found = self.answers(model, self.device, *options)
        except Failed as error:
            self.table.add(what, str(error)[:48], False)
            return
        same = sum(one == other for one, other in zip(found, exact, strict=True))
        # a tie between two tokens may fall either way in half precision
        self.table.add(what, f"{same} of {len(exact)} answers are float32's", same >= 0.8 * len(exact))

    def generation(self, short: bool) -> None:
        """Answers of a model that has learned something, plain and fused, and from exports."""
        model = self.home / "learned"
        words = ("--dataset_name_or_path", self.home / "data", "--output_dir", model, "--device", "cpu")
        words += ("--model_name_or_path", self.home / "model", "--max_steps", 30, "--save_strategy", "no")
        run("finetune_generation", "--do_train", *words, "--learning_rate", "1e-2", "--report_to", "none")
        exact = self.answers(model, "cpu", "--dtype", "float32")
        for dtype, _ in HALVES.values():
            self.answering(f"plain decoding {dtype}", model, exact, "--dtype", dtype, "--mode", "dynamic")
        half = self.device != "cpu"  # a CPU has no operators of half precision for the fused decoder and for exports
        dtype = "float16" if half else "float32"
        self.answering(f"fused decoding {dtype}", model, exact, "--dtype", dtype, "--inference_model")
        for fused in (True,) if short else (False, True):
            exported = self.home / f"exported_{fused}"
            kind = ["--inference_model"] if fused else []
            try:
                run("export_model", "--model_name_or_path", model, "--output_path", exported, "--device", self.device,
                    "--dtype", dtype, *kind)  # fmt: skip
            except Failed as error:
                self.table.add(f"export {dtype}", str(error)[:48], False)
                continue
            self.answering(
                f"{'fused' if fused else 'plain'} export {dtype}", exported, exact, "--mode", "static", *kind
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="gpu", help="gpu, gpu:N or cpu")
    parser.add_argument("--short", action="store_true", help="a few ways only")
    args = parser.parse_args()
    os.environ["CPU_HALF_PRECISION"] = "round"
    with tempfile.TemporaryDirectory() as home:
        os.environ["PADDLE_LLM_CACHE"] = str(Path(home) / "cache")
        runtime.prepare()
        device = runtime.check_device(args.device, explicit=True)
        runtime.load_paddle()
        check = Check(Path(home), device)
        for way in ways(args.short):
            check.training(way)
        check.generation(args.short)
    print(f"{len(check.table.lines) - check.table.faults} of {len(check.table.lines)} agree")
    return 1 if check.table.faults else 0


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
