"""Static beside dynamic graph: many pairs of fresh processes, for ratios that lie nearer to 1 than a machine is steady.

    python benchmarks/static_graph.py [--rounds 20] [--measures prefill decode_8 ...] [--plain]

benchmarks/inference.py compares all corners with their peer in three rounds; here are only the two sides of one model,
measured in turn: a round takes little more than a minute, of prefill alone half of one. How fast a process is depends
on where its memory happens to lie, for as long as it lives: a round is one value, and the error of their mean is what
rounds make smaller. Nothing is left out. Results: benchmarks/results/static_graph.json, or static_graph_plain.json.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import inference
import inference_report as report
from inference_sides import in_turn

from utils.checkpoints.files import write_json
from utils.checkpoints.locate import locate
from utils.errors import UserError, run_script

# Repetitions in a process, even as in benchmarks/inference.py, and longer where one alone is short.
REPEATS = {"prefill": 6, "first_token": 10, "decode_1": 2, "decode_8": 2}


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: too few rounds to say how sure their mean is.
    """
    parser = argparse.ArgumentParser(description="Static beside dynamic graph, in pairs of fresh processes.")
    parser.add_argument("--rounds", type=int, default=20, help="pairs of processes (default 20)")
    parser.add_argument("--measures", nargs="+", choices=REPEATS, default=list(REPEATS), help="what to measure")
    parser.add_argument("--plain", action="store_true", help="the library's model instead of the inference model")
    parser.add_argument("--results", type=Path, default=inference.BENCHMARKS / "results", help="folder of the results")
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 2:
        raise UserError(f"--rounds {chosen.rounds}: expected 2 or more, as the error of a mean comes from several")
    return chosen


def mean_ratio(static: Sequence[report.Round], dynamic: Sequence[report.Round], name: str) -> dict[str, Any]:
    """How many times as good static is: geometric mean over rounds, its standard error, and every round's ratio.

    A round's ratio is the median over repetitions, which lie within seconds of each other.
    """
    rounds = []
    for one, another in zip(static, dynamic, strict=True):
        pairs = zip(one["values"][name], another["values"][name], strict=True)
        rounds.append(statistics.median(report.advantage(ours, theirs, report.HIGHER[name]) for ours, theirs in pairs))
    logs = [math.log(ratio) for ratio in rounds]
    mean = math.exp(statistics.fmean(logs))
    return {
        "mean": round(mean, 4),
        "standard_error": round(mean * statistics.stdev(logs) / math.sqrt(len(logs)), 4),
        "rounds": [round(ratio, 3) for ratio in rounds],
    }


def line(name: str, ratio: Mapping[str, Any], speeds: Mapping[str, report.Spread]) -> str:
    low, high = min(ratio["rounds"]), max(ratio["rounds"])
    medians = ", ".join(f"{side} {speed['median']:.4g}" for side, speed in speeds.items())
    return f"{name:12} {ratio['mean']:.3f} ± {ratio['standard_error']:.3f}  ({low:.2f} to {high:.2f}; {medians})"


def main() -> None:
    chosen = options()
    dynamic = "dynamic" if chosen.plain else "dynamic_inference_model"
    static = next(name for name, other in report.DYNAMIC_OF.items() if other == dynamic)
    checkpoint = locate(inference.MODEL)
    repeats = {name: REPEATS[name] for name in chosen.measures}
    work = {**inference.make_work(quick=False), "repeats": repeats}
    machine = inference.machine(work["threads"])
    inference.read_weights(checkpoint.folder)
    environment = {**os.environ, "OMP_NUM_THREADS": str(work["threads"])}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_json(folder / "work.json", work)
        commands = {side: inference.corner_command(side, folder, folder / "work.json") for side in (dynamic, static)}
        found = in_turn(commands, chosen.rounds, inference.speed_plan(repeats), environment)
    ratios = {name: mean_ratio(found[static], found[dynamic], name) for name in repeats}
    higher = {name: report.HIGHER[name] for name in (*repeats, "peak")}
    figures = {side: report.summarise(rounds, higher) for side, rounds in found.items()}
    facts = {"model": inference.MODEL, "dtype": "float32", "commit": inference.commit(), "machine": machine}
    path = chosen.results / ("static_graph_plain.json" if chosen.plain else "static_graph.json")
    write_json(path, {**facts, "repeats": repeats, "figures": figures, static: ratios})
    print(f"\n{report.LABELS[static]}, times as good as {report.LABELS[dynamic]}; mean ± its standard error:")
    for name, ratio in ratios.items():
        print(line(name, ratio, {side.split("_")[0]: figure[name] for side, figure in figures.items()}))


if __name__ == "__main__":
    run_script(main)
