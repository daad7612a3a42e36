"""Peak memory of a `lazy` training run against the size of its training file.

    python benchmarks/lazy_memory.py [--gigabytes 1]

Writes a JSON Lines file of 10 MB and one of 1 GB into a temporary folder (removed at the end) and trains a
tiny model on each with finetune_generation.py, for as many steps as one pass over the large file takes.
Prints the peak resident memory of both processes; results: benchmarks/results/lazy_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from random_model import write_model  # noqa: E402

WORDS = ["river", "stone", "light", "water", "paper", "garden", "music", "winter", "market", "letter", "bridge"]
ROW_BYTES = 50_000  # a short question and answer, and a long field that training does not use
BATCH = 64
SIZES = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def write_rows(file: Path, size: int) -> int:
    """Rows of about ROW_BYTES until the file has `size` bytes; returns their number."""
    chance, rows = random.Random(0), 0
    with open(file, "w", encoding="utf-8") as stream:
        while stream.tell() < size:
            row = {
                "src": f"Write {chance.randint(1, 10**6)} words.",
                "tgt": " ".join(chance.choices(WORDS, k=chance.randint(5, 20))),
                "source_text": "x" * ROW_BYTES,
            }
            stream.write(json.dumps(row) + "\n")
            rows += 1
    return rows


def train(data: Path, model: Path, output: Path, steps: int) -> dict[str, float]:
    """Runs the script and measures its process."""
    command = [
        *(sys.executable, "finetune_generation.py", "--model_name_or_path", model, "--dataset_name_or_path", data),
        *("--output_dir", output, "--do_train", "--lazy", "--max_steps", str(steps), "--src_length", "64"),
        *("--max_length", "128", "--per_device_train_batch_size", str(BATCH), "--logging_steps", "50"),
        *("--save_strategy", "steps", "--save_steps", "100", "--save_total_limit", "1", "--disable_tqdm"),
    ]
    started = time.monotonic()
    process = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the training run failed with status {status}")
    return {"peak_mib": round(usage.ru_maxrss / 1024, 1), "seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of lazy training against file size.")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the large file")
    large_bytes = int(parser.parse_args().gigabytes * 10**9)
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", SIZES)
        rows = {}
        for label, size in (("large", large_bytes), ("small", 10**7)):
            (folder / label).mkdir()
            rows[label] = write_rows(folder / label / "train.json", size)
        steps = rows["large"] // BATCH
        for label in ("small", "large"):
            size = (folder / label / "train.json").stat().st_size
            found = train(folder / label, folder / "model", folder / f"out_{label}", steps)
            results[label] = {"file_mb": round(size / 1e6, 1), "rows": rows[label], "steps": steps, **found}
            print(f"{label}: {results[label]}", flush=True)
    peaks = [results[label]["peak_mib"] for label in ("large", "small")]  # type: ignore[index]
    results["ratio"] = round(peaks[0] / peaks[1], 3)
    print(f"peak memory, large file / small file: {results['ratio']}")
    target = ROOT / "benchmarks" / "results" / "lazy_memory.json"
    target.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
