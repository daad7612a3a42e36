"""Trains every family in every parallel layout and compares losses with those of a single process.

    python tools/layouts.py                                # everything, rewrites the table in docs/parallel.md
    python tools/layouts.py --only llama opt --layouts TP2 # these alone; shows the table and writes nothing

Each cell is the largest difference of a loss or gradient norm over 10 steps of finetune_generation.py, run by Paddle's
launcher on a family's tiny model; the exit code is 1 if one is above 1e-4. A launch runs all of its families in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

TABLE = re.compile(r"(?<=<!-- layouts -->\n).*?(?=<!-- /layouts -->)", re.DOTALL)
BOUND = 1e-4
STEPS = 10
RATES = {"sft": 3e-3, "lora": 1e-2, "pt": 0.1}
METHODS = {
    "sft": ["--weight_decay", "0.1"],
    "lora": ["--lora", "true", "--lora_rank", "4"],
    "pt": ["--prefix_tuning", "true", "--num_prefix_tokens", "4"],
}


@dataclass(frozen=True)
class Case:
    """A layout: its processes, the division of 8 rows a step, its arguments; families that try it (None: all)."""

    processes: int
    batch: int
    accumulation: int
    options: Sequence[str] = ()
    families: Sequence[str] | None = None

    def words(self) -> list[str]:
        sizes = ["--per_device_train_batch_size", str(self.batch)]
        return [*sizes, "--gradient_accumulation_steps", str(self.accumulation), *self.options]


TENSOR, PIPELINE = ["--tensor_parallel_degree", "2"], ["--pipeline_parallel_degree", "2"]
SOME = ("llama", "gpt-3")
ALONE = Case(1, 8, 1)
LAYOUTS = {
    "TP2": Case(2, 4, 2, TENSOR),
    "TP2 sequence": Case(2, 4, 2, [*TENSOR, "--sequence_parallel", "true"]),
    "PP2": Case(2, 2, 4, PIPELINE),
    "stage1": Case(2, 2, 2, ["--sharding", "stage1"]),
    "stage2": Case(2, 2, 2, ["--sharding", "stage2"]),
    "stage3": Case(2, 2, 2, ["--sharding", "stage3"]),
    "PP2 stage2": Case(4, 2, 2, [*PIPELINE, "--sharding", "stage2"], SOME),
    "PP2 stage3": Case(4, 2, 2, [*PIPELINE, "--sharding", "stage3"], SOME),
    "TP2 PP2": Case(4, 2, 4, [*TENSOR, *PIPELINE], SOME),
    "TP2 stage2": Case(4, 2, 2, [*TENSOR, "--sharding", "stage2"], SOME),
    "TP2 stage1": Case(4, 2, 2, [*TENSOR, "--sharding", "stage1"], SOME),
    "TP2 stage3": Case(4, 2, 2, [*TENSOR, "--sharding", "stage3"], SOME),
    "DP2 stage2": Case(4, 2, 1, ["--sharding", "stage2", "--sharding_parallel_degree", "2"], SOME),
    "DP2 stage3": Case(4, 2, 1, ["--sharding", "stage3", "--sharding_parallel_degree", "2"], SOME),
    "DP2 PP2": Case(4, 2, 2, PIPELINE, SOME),
}


@dataclass(frozen=True)
class Run:
    """One training: a family, a method, and where it writes."""

    family: str
    method: str
    output: Path

    @property
    def losses(self) -> list[float]:
        """The loss and the gradient norm of every step."""
        state = json.loads((self.output / "trainer_state.json").read_text("utf-8"))
        logs = [log for log in state["log_history"] if "loss" in log]
        return [value for log in logs for value in (log["loss"], log["grad_norm"])]


def words_of(run: Run, home: Path, model: Path, case: Case) -> list[str]:
    """The command line of a run."""
    chosen: dict[str, Any] = {
        "model_name_or_path": model,
        "dataset_name_or_path": home / "data",
        "output_dir": run.output,
        "src_length": 64,
        "max_length": 128,
        "do_train": "true",
        "do_eval": "true",
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": RATES[run.method],
        "device": "cpu",
        "disable_tqdm": "true",
        "report_to": "none",
    }
    return [*(str(part) for name, value in chosen.items() for part in (f"--{name}", value)), *case.words()] + METHODS[
        run.method
    ]


def train(runs: Sequence[Run], home: Path, case: Case) -> None:
    """Trains all runs in one launch; one that fails leaves `error.txt` in its folder and ends the launch."""
    from family_cases import WITH_TOKENIZER
    from family_cases import case as family_case

    folders = {family_case(n).checkpoint.family.name: family_case(n).folder for n in reversed(WITH_TOKENIZER)}
    folders = {run.family: without_dropout(folders[run.family], home / "models" / run.family) for run in runs}
    jobs = [[str(run.output), words_of(run, home, folders[run.family], case)] for run in runs]
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "jobs.json"
        listed.write_text(json.dumps(jobs), "utf-8")
        launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(case.processes), "--log_dir", folder]
        launcher = launcher if case.processes > 1 else []
        environment = {**os.environ, "PADDLE_LLM_CACHE": str(home / "cache"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-u", *launcher, str(Path(__file__).resolve()), "--worker", str(listed)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            unfinished = [run for run in runs if not (run.output / "trainer_state.json").is_file()]
            if unfinished:
                unfinished[0].output.mkdir(parents=True, exist_ok=True)
                said = "".join(
                    path.read_text("utf-8", "replace")[-3000:] for path in sorted(Path(folder).glob("*log*"))
                )
                (unfinished[0].output / "error.txt").write_text(said or done.stdout + done.stderr, "utf-8")


def without_dropout(model: Path, copy: Path) -> Path:
    """A copy of a model that drops nothing: ranks draw other masks."""
    if not copy.is_dir():
        shutil.copytree(model, copy)
        config = json.loads((copy / "config.json").read_text("utf-8"))
        config.update({name: 0.0 for name, value in config.items() if "drop" in name and isinstance(value, float)})
        (copy / "config.json").write_text(json.dumps(config), "utf-8")
    return copy


def work(listed: Path) -> None:
    """A process of `train`: one finetuning after another, over the connections of the first."""
    from utils import runtime

    runtime.prepare()
    import finetune_generation
    from utils.errors import run_script
    from utils.parallel import process_group

    runtime.prepare = lambda **_: None
    connect, known = process_group.start, []

    def start_once(*arguments: Any) -> Any:
        if not known:
            known.append(connect(*arguments))
        return known[0]

    process_group.start = start_once

    def main() -> None:
        for output, words in json.loads(listed.read_text("utf-8")):
            sys.argv = ["finetune_generation.py", *words]
            try:
                finetune_generation.main()
            except BaseException:
                traceback.print_exc()
                print(f"in {output}", file=sys.stderr, flush=True)
                raise

    run_script(main)


def compare(
    names: Sequence[str], methods: Sequence[str], layouts: Sequence[str]
) -> Iterator[tuple[str, str, str, Any]]:
    """(layout, family, method, largest difference or an error's last lines) of every cell."""
    from tiny_runs import write_rows

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for seed, (split, count) in enumerate({"train": 50, "dev": 10}.items()):
            write_rows(home / "data" / f"{split}.json", count, seed=seed)
        alone = {
            (name, method): Run(name, method, home / "alone" / name / method) for name in names for method in methods
        }
        train(list(alone.values()), home, ALONE)
        for layout in layouts:
            case = LAYOUTS[layout]
            runs = [
                Run(name, method, home / layout / name / method)
                for name, method in alone
                if case.families is None or name in case.families
            ]
            left = list(runs)
            while left:  # a failed run ends its launch; the next one does the rest
                train(left, home, case)
                left = [
                    run
                    for run in left
                    if not any((run.output / n).is_file() for n in ("error.txt", "trainer_state.json"))
                ]
            for run in runs:
                error = run.output / "error.txt"
                if error.is_file():
                    yield layout, run.family, run.method, error.read_text("utf-8").strip()[-1500:]
                    continue
                pairs = zip(run.losses, alone[run.family, run.method].losses, strict=True)
                yield layout, run.family, run.method, max(abs(own - wanted) for own, wanted in pairs)


def main() -> None:
    from utils.families import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), help="families; docs/parallel.md stays as it is")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), help="layouts, likewise")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["sft", "lora"])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        work(chosen.worker)
    found: dict[tuple[str, str, str], Any] = {}
    started = time.perf_counter()
    for layout, family, method, value in compare(
        chosen.only or list(FAMILIES), chosen.methods, chosen.layouts or list(LAYOUTS)
    ):
        found[layout, family, method] = value
        print(f"{layout}: {family} {method}: {value if isinstance(value, str) else f'{value:.1e}'}", flush=True)
    lines = table(found)
    print(f"{lines}{time.perf_counter() - started:.0f} s")
    guide = ROOT / "docs" / "parallel.md"
    if not (chosen.only or chosen.layouts or chosen.methods != ["sft", "lora"]):
        guide.write_text(TABLE.sub(lambda _: lines, guide.read_text("utf-8")), "utf-8")
    sys.exit(any(isinstance(value, str) or not value <= BOUND for value in found.values()))


def table(found: dict[tuple[str, str, str], Any]) -> str:
    """The differences as Markdown, a row per family and method."""
    layouts = list(dict.fromkeys(layout for layout, _, _ in found))
    rows = list(dict.fromkeys((family, method) for _, family, method in found))
    lines = [f"| | {' | '.join(layouts)} |", "|---" * (len(layouts) + 1) + "|"]
    for family, method in rows:
        values = [found.get((layout, family, method), "") for layout in layouts]
        cells = [("❌" if value else "") if isinstance(value, str) else f"{value:.0e}" for value in values]
        lines.append(f"| {family} {method} | {' | '.join(cells)} |")
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    main()
