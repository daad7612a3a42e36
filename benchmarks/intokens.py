"""Useful tokens per second of packed rows (InTokens) against padded batches, on rows of natural lengths.

    python benchmarks/intokens.py [--steps 4]

Trains LoRA on the embedded model with finetune_generation.py, once with `intokens` and once without, on the
same rows: lengths are log-normal (median 60 tokens, cut at 512), as of instruction data. Both runs see about
the same number of real tokens per step. Results: benchmarks/results/intokens.json and intokens.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ROWS, PADDED_BATCH, PACKED_LENGTH, WORDS_MEDIAN, SIGMA = 400, 8, 512, 22, 1.0


def write_rows(folder: Path) -> None:
    """Definitions of data/train.json, joined until a row has the drawn number of words."""
    chance = random.Random(0)
    source = [json.loads(line) for line in (ROOT / "data" / "train.json").read_text(encoding="utf-8").splitlines()]
    folder.mkdir()
    with open(folder / "train.json", "w", encoding="utf-8") as file:
        for _ in range(ROWS):
            wanted, words = min(int(chance.lognormvariate(0, SIGMA) * WORDS_MEDIAN), 320), []
            while len(words) < max(wanted, 3):
                words += str(chance.choice(source)["tgt"]).split()
            row = {"src": chance.choice(source)["src"], "tgt": " ".join(words[: max(wanted, 3)])}
            file.write(json.dumps(row) + "\n")


def train(data: Path, output: Path, steps: int, packed: bool) -> dict[str, float]:
    """Runs the script; returns medians over the steps after the first."""
    batch = ["--intokens", "true", "--per_device_train_batch_size", "1"] if packed else []
    batch = batch or ["--per_device_train_batch_size", str(PADDED_BATCH)]
    command = [
        *(sys.executable, "finetune_generation.py", "./llama/lora_argument.json", "--dataset_name_or_path", str(data)),
        *("--output_dir", str(output), "--max_steps", str(steps + 1), "--gradient_accumulation_steps", "1", *batch),
        *("--src_length", "128", "--max_length", str(PACKED_LENGTH), "--do_eval", "false", "--disable_tqdm", "true"),
        *("--evaluation_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"),
    ]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    with open(output / "loss_curve.csv", newline="", encoding="utf-8") as file:
        speeds = [float(row["tokens_per_second"]) for row in csv.DictReader(file)][1:]
    shares = [float(word.rstrip("%")) for line in said.splitlines() for word in line.split() if word.endswith("%")]
    return {"tokens_per_second": statistics.median(speeds), "effective_share": statistics.mean(shares[1:]) / 100}


def draw(results: dict[str, dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="tight")
    axes = figure.add_subplot()
    bars = axes.bar(list(results), [found["tokens_per_second"] for found in results.values()])
    axes.bar_label(bars, [f"{found['effective_share']:.0%} effective" for found in results.values()])
    axes.set(ylabel="useful tokens per second", title="LoRA, SmolLM2-135M, CPU")
    figure.savefig(RESULTS / "intokens.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Packed against padded training speed.")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each run")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each kind, in turn")
    chosen = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"padded": [], "packed": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "data")
        for repeat in range(chosen.repeats):
            for kind in found:
                output = folder / f"{kind}{repeat}"
                found[kind].append(train(folder / "data", output, chosen.steps, kind == "packed"))
                print(kind, found[kind][-1], flush=True)
    results = {
        kind: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for kind, runs in found.items()
    }
    ratio = results["packed"]["tokens_per_second"] / results["padded"]["tokens_per_second"]
    print(f"useful tokens per second, packed / padded: {ratio:.2f}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "intokens.json").write_text(json.dumps({**results, "ratio": round(ratio, 3)}, indent=2) + "\n")
    draw(results)


if __name__ == "__main__":
    main()
