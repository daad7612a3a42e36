"""Runs every cell of the support table and rewrites the table in README.md from what happened.

    python tools/matrix.py                    # all families, rewrites README.md
    python tools/matrix.py --only llama opt   # these alone; shows their rows and writes nothing

Each cell runs the real scripts, each in a process of its own, with the argument files of the family's folder, on
the family's tiny model in tests/fixtures. A cell is ✅ when all of its runs succeed and do what they should,
❌ when one does not (the exit code is then 1), and 🚧 when there is nothing to run yet.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from family_cases import WITH_TOKENIZER, case  # noqa: E402
from tiny_runs import write_rows  # noqa: E402

from utils.families import FAMILIES, FamilySpec  # noqa: E402

DONE, FAILED, OPEN = "✅", "❌", "🚧"
TABLE = re.compile(r"(?<=<!-- matrix -->\n).*?(?=<!-- /matrix -->)", re.DOTALL)
RATES = {"pretrain": 1e-2, "sft": 3e-3, "lora": 1e-2, "pt": 0.3}  # tiny models need more than the files say


class CellError(Exception):
    """A run of a cell failed, or did not do what it should."""


@dataclass(frozen=True)
class Bench:
    """One family's tiny model, with data and a place for what the runs write."""

    family: FamilySpec
    model: Path
    home: Path

    def script(self, name: str, *options: object) -> None:
        """Runs a script; an exit code other than 0 is a `CellError`."""
        command = [sys.executable, str(ROOT / name), *map(str, options)]
        environment = {**os.environ, "PADDLE_LLM_CACHE": str(self.home / "cache")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        if done.returncode:
            said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
            raise CellError(f"{' '.join(command[1:])}\nexit code {done.returncode}\n{said}")

    def train(self, method: str) -> Path:
        """Trains by the family's argument file, 50 rows for 4 epochs; the loss must fall by a tenth."""
        output = self.home / method
        self.script(
            "finetune_generation.py",
            *(ROOT / self.family.name / f"{method}_argument.json", "--model_name_or_path", self.model),
            *("--dataset_name_or_path", self.home / "data", "--output_dir", output, "--device", "cpu"),
            *("--src_length", 64, "--max_length", 128, "--per_device_train_batch_size", 8),
            *("--gradient_accumulation_steps", 1, "--num_train_epochs", 4, "--warmup_steps", 0),
            *("--learning_rate", RATES[method], "--fp16", "false", "--bf16", "false", "--tensor_parallel_degree", 1),
            *(("--num_prefix_tokens", 8) if method == "pt" else ()),
        )
        self.check_learning(method, output)
        return output

    def pretrain(self) -> Path:
        """Plain text through both data tools, then 24 steps from new weights; the loss must fall by a tenth."""
        text, tokens, output = self.home / "documents", self.home / "tokens", self.home / "pretrain"
        text.mkdir()
        rows = (self.home / "data" / "train.json").read_text("utf-8").splitlines()
        documents = [" ".join([json.loads(row)["tgt"]] * 4) for row in rows]
        (text / "a.txt").write_text("\n\n".join(documents), "utf-8")
        self.script("data/tools/trans_to_json.py", "--input_path", text, "--output_path", text)
        self.script(
            "data/tools/create_pretraining_data.py",
            *("--model_name", self.model, "--input_path", f"{text}.jsonl", "--output_prefix", tokens / "text"),
            "--append_eos",
        )
        self.script(
            "run_pretrain.py",
            *(ROOT / self.family.name / "pretrain_argument.json", "--model_name_or_path", self.model),
            *("--tokenizer_name_or_path", self.model, "--input_dir", tokens, "--output_dir", output, "--device", "cpu"),
            *("--max_seq_length", 32, "--max_steps", 24, "--learning_rate", RATES["pretrain"], "--split", "8,2,0"),
            *("--eval_steps", 12, "--save_steps", 12, "--fp16", "false", "--bf16", "false"),
        )
        self.check_learning("pretrain", output)
        found = json.loads((output / "eval_results.json").read_text("utf-8"))
        if not found["eval_ppl"] < self.family.shape(config_of(self.model)).vocabulary / 2:
            raise CellError(f"{self.family.name} pretrain: the validation text has perplexity {found['eval_ppl']:.1f}")
        return output

    def check_learning(self, method: str, output: Path) -> None:
        """The loss of the last quarter of a run must be below that of the first by a tenth."""
        with open(output / "loss_curve.csv", newline="", encoding="utf-8") as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
        part = len(losses) // 4
        first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
        if not last < 0.9 * first:
            raise CellError(f"{self.family.name} {method}: the loss went from {first:.3f} to {last:.3f}")

    def answers(self, model: Path, *options: object) -> list[str]:
        """The predictor's answers to the dev rows."""
        output = self.home / "answers.json"
        self.script(
            "predictor.py",
            *("--model_name_or_path", model, "--data_file", self.home / "data" / "dev.json", "--output_file", output),
            *("--device", "cpu", "--dtype", "float32", "--src_length", 64, "--max_new_tokens", 8, "--min_length", 4),
            *options,
        )
        rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
        output.unlink()
        if len(rows) != 10 or any(row["output"] is None for row in rows):
            raise CellError(f"{self.family.name}: not every row was answered: {rows}")
        return [row["output"] for row in rows]


def config_of(model: Path) -> dict[str, Any]:
    """The config.json of a model's folder."""
    return json.loads((model / "config.json").read_text("utf-8"))


def pretrain(bench: Bench) -> None:
    """Trains new weights on plain text; the result answers as a model of its own."""
    bench.answers(bench.pretrain())


def sft(bench: Bench) -> None:
    """Trains all weights; the result answers as a model of its own."""
    bench.answers(bench.train("sft"))


def lora(bench: Bench) -> None:
    """Trains an adapter; base and adapter answer, and the merged model gives the same answers."""
    adapter, merged = bench.train("lora"), bench.home / "merged"
    together = bench.answers(bench.model, "--lora_path", adapter)
    bench.script(
        "merge_lora_params.py",
        *("--model_name_or_path", bench.model, "--lora_path", adapter, "--merge_model_path", merged),
        *("--dtype", "float32"),
    )
    if bench.answers(merged) != together:
        raise CellError(f"{bench.family.name}: the merged model answers otherwise than base and adapter")


def prefix_tuning(bench: Bench) -> None:
    """Trains a prefix; the base answers behind it."""
    bench.answers(bench.model, "--prefix_path", bench.train("pt"))


def generation(bench: Bench) -> None:
    """Answers a file, 8 rows at a time and one by one, with the same texts."""
    if bench.answers(bench.model, "--batch_size", 8) != bench.answers(bench.model, "--batch_size", 1):
        raise CellError(f"{bench.family.name}: answers depend on the batch")


COLUMNS: dict[str, Callable[[Bench], None] | None] = {
    "Pretrain": pretrain,
    "SFT": sft,
    "LoRA": lora,
    "Prefix Tuning": prefix_tuning,
    "Generation": generation,
    "Quantization": None,  # arrives later
}


def run_family(family: FamilySpec) -> dict[str, str]:
    """The cells of one row."""
    model = next(case(name) for name in WITH_TOKENIZER if case(name).checkpoint.family is family).folder
    cells = {}
    with tempfile.TemporaryDirectory() as home:
        for seed, (split, count) in enumerate({"train": 50, "dev": 10}.items()):
            write_rows(Path(home) / "data" / f"{split}.json", count, seed=seed)
        for column, check in COLUMNS.items():
            if check is None:
                cells[column] = OPEN
                continue
            started = time.perf_counter()
            try:
                check(Bench(family, model, Path(home)))
                cells[column] = DONE
            except (CellError, subprocess.TimeoutExpired) as error:
                cells[column] = FAILED
                print(f"{family.title}, {column}: {error}", file=sys.stderr, flush=True)
            seconds = time.perf_counter() - started
            print(f"{cells[column]} {family.title}: {column} ({seconds:.0f} s)", flush=True)
    return cells


def table(rows: dict[str, dict[str, str]]) -> str:
    """The rows (family name -> cells) as Markdown; names lead to the guides of the families' folders."""
    lines = [f"| Model | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, cells in rows.items():
        lines.append(f"| [{FAMILIES[name].title}]({name}/README.md) | {' | '.join(cells[c] for c in COLUMNS)} |")
    return "".join(f"{line}\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), help="families to run; README.md stays as it is")
    parser.add_argument("--jobs", type=int, default=2, help="families at a time (default 2)")
    chosen = parser.parse_args()
    readme = ROOT / "README.md"
    names = chosen.only or list(FAMILIES)
    with ThreadPoolExecutor(chosen.jobs) as pool:
        rows = dict(zip(names, pool.map(lambda name: run_family(FAMILIES[name]), names), strict=True))
    written = table(rows)
    print(written, end="")
    if not chosen.only:
        text, count = TABLE.subn(lambda _: written, readme.read_text("utf-8"))
        if count != 1:
            sys.exit("error: README.md: expected one table between <!-- matrix --> and <!-- /matrix -->")
        readme.write_text(text, "utf-8")
        print("README.md has the table now")
    sys.exit(any(cell == FAILED for cells in rows.values() for cell in cells.values()))


if __name__ == "__main__":
    main()
