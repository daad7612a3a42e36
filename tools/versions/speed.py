"""Speed and memory of two versions on the embedded model, in pairs that follow each other within seconds.

A shared machine changes its speed for minutes; what counts is therefore the ratio within a pair, never a figure alone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from inference import MODEL, make_work, speed_plan
from inference_report import HIGHER, Ratio, paired_ratios, times
from inference_sides import in_turn

from versions.runs import LAST_WORDS, RunError

STEPS, WARM = 6, 2
REPEATS = {"prefill": 2, "decode_1": 2, "decode_8": 2}  # even: each version goes first in half of them
NEW_TOKENS = 32
CORNERS = {"plain": "dynamic", "fused": "dynamic_inference_model"}
TRAININGS = {
    "LoRA": ("--lora", "true", "--learning_rate", "3e-4"),
    "SFT": ("--learning_rate", "1e-5"),
}
LOWER_IS_BETTER = ("start", "memory")
MAY_BE_WORSE = 0.03

Values = dict[str, float]
Roots = Mapping[str, Path]  # "before" and "after" -> the folder of that version


def run(root: Path, script: str, words: Sequence[object], log: Path) -> tuple[float, int]:
    """(seconds, peak bytes) of a script from its start to its end.

    Raises:
        RunError: it failed.
    """
    started = time.perf_counter()
    with open(log, "w", encoding="utf-8") as said:
        command = [sys.executable, script, *map(str, words)]
        process = subprocess.Popen(command, cwd=root, stdout=said, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = log.read_text("utf-8", "replace").strip().splitlines()[-LAST_WORDS:]
        raise RunError("\n".join([f"{script} of {root}, exit code {process.returncode}", *last]))
    return time.perf_counter() - started, used.ru_maxrss * 1024


def train(root: Path, method: str, home: Path) -> Values:
    """Tokens a second after the first steps, and the peak memory."""
    output = home / "out"
    words = (
        *("--model_name_or_path", MODEL, "--dataset_name_or_path", root / "data", "--output_dir", output),
        *("--do_train", "true", "--max_steps", STEPS, "--logging_steps", 1, "--device", "cpu", "--max_length", 256),
        *("--src_length", 128, "--save_strategy", "no", "--disable_tqdm", "true", "--report_to", "none"),
        *("--per_device_train_batch_size", 4, "--overwrite_output_dir", "true", *TRAININGS[method]),
    )
    _, peak = run(root, "finetune_generation.py", words, home / "log")
    state = json.loads((output / "trainer_state.json").read_text("utf-8"))
    rates = [log["tokens_per_second"] for log in state["log_history"] if "loss" in log]
    return {f"{method}, tokens/s": statistics.median(rates[WARM:]), f"{method}, memory": peak}


def start_predictor(root: Path, corner: str, home: Path) -> Values:
    """One token for one prompt, from the start of Python to its end."""
    data = home / "row.json"
    data.write_text(json.dumps({"src": "Hello"}) + "\n", "utf-8")
    words = (
        *("--model_name_or_path", MODEL, "--data_file", data, "--output_file", home / "answer.json"),
        *("--max_new_tokens", 1, "--device", "cpu", "--resume", "false"),
        *("--inference_model", "true" if corner == "fused" else "false"),
    )
    seconds, peak = run(root, "predictor.py", words, home / "log")
    return {f"predictor {corner}, start": seconds, f"predictor {corner}, memory": peak}


def in_pairs(
    roots: Roots, rounds: int, measure: Callable[[Path], Values], tell: Callable[[str], None]
) -> dict[str, list[Any]]:
    """What both versions measure in turn, the other one first every second time."""
    found: dict[str, list[Any]] = {name: [] for name in roots}
    for number in range(rounds):
        for name in list(roots)[:: 1 if number % 2 == 0 else -1]:
            values = measure(roots[name])
            found[name].append({"values": {key: [value] for key, value in values.items()}})
            tell(f"round {number + 1} of {rounds}, {name}: " + ", ".join(f"{k} {v:,.1f}" for k, v in values.items()))
    return found


def ratios(found: Mapping[str, list[Any]]) -> dict[str, Ratio]:
    """How many times as good this version is in each figure; above 1 is better."""
    higher = {key: not key.endswith(LOWER_IS_BETTER) for key in found["after"][0]["values"]}
    return paired_ratios(found["after"], found["before"], higher)


def decode(roots: Roots, rounds: int, home: Path) -> dict[str, Ratio]:
    """Prefill, decoding, start and memory of both versions, with the plain and with the inference model."""
    task = home / "work.json"
    work = make_work(quick=False) | {"new_tokens": NEW_TOKENS}
    task.write_text(json.dumps(work), "utf-8")
    child = "benchmarks/inference_child.py"
    commands = {
        f"{name} {corner}": [
            *(sys.executable, str(root / child), "--corner", CORNERS[corner], "--model", MODEL, "--work", str(task))
        ]
        for corner in CORNERS
        for name, root in roots.items()
    }
    environment = {**os.environ, "OMP_NUM_THREADS": str(work["threads"])}
    measured = in_turn(commands, rounds, speed_plan(REPEATS), environment)
    higher = {name: up for name, up in HIGHER.items() if name in measured["after plain"][0]["values"]}
    return {
        f"{corner}, {name}": ratio
        for corner in CORNERS
        for name, ratio in paired_ratios(measured[f"after {corner}"], measured[f"before {corner}"], higher).items()
    }


def compare(roots: Roots, rounds: int, home: Path) -> dict[str, Ratio]:
    """Every figure's ratio: median of the pairs and range, above 1 where this version is better."""
    home.mkdir(parents=True)
    started, steps, done = time.perf_counter(), 2 * rounds * (len(TRAININGS) + len(CORNERS)), 0

    def tell(what: str) -> None:
        nonlocal done
        done += 1
        left = (time.perf_counter() - started) / done * (steps - done)
        print(f"[{done}/{steps}] {what} (about {left / 60:.0f} min left, then decoding)", flush=True)

    found: dict[str, Ratio] = {}
    for corner in CORNERS:
        measured = in_pairs(roots, rounds, lambda root, corner=corner: start_predictor(root, corner, home), tell)
        found |= ratios(measured)
    for method in TRAININGS:
        found |= ratios(in_pairs(roots, rounds, lambda root, method=method: train(root, method, home), tell))
    return found | decode(roots, rounds, home)


def table(found: Mapping[str, Ratio]) -> str:
    lines = ["| times as good as before | median (lowest, highest) |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {times(ratio)} |" for name, ratio in found.items())])
