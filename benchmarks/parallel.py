"""How fast each parallel layout trains beside one process with the same rows a step.

    python benchmarks/parallel.py                 # all layouts, writes benchmarks/results/parallel.json and .png
    python benchmarks/parallel.py --only DP2 TP2  # these alone; writes nothing

Every layout runs finetune_generation.py (SFT, float32, AdamW) on a LLaMA of 12 million weights beside the embedding, in
as many processes as it has ranks, which share the machine's processors evenly; one process has all of them. What counts
is tokens per second after the first steps, as the run itself reports them; ratios are to the one process of the same
round. On a machine with one memory and no more processors than ranks the ratios show what exchanging costs, not what
more devices would bring.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

from random_model import write_model  # noqa: E402

STEPS, WARM = 9, 3
ROWS = 8  # a step
SIZES = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
TENSOR, PIPELINE = ["--tensor_parallel_degree", "2"], ["--pipeline_parallel_degree", "2"]
# name -> (processes, rows a device, micro-batches, arguments)
LAYOUTS: dict[str, tuple[int, int, int, list[str]]] = {
    "1": (1, 2, 4, []),
    "DP2": (2, 2, 2, []),
    "stage1": (2, 2, 2, ["--sharding", "stage1"]),
    "stage2": (2, 2, 2, ["--sharding", "stage2"]),
    "stage3": (2, 2, 2, ["--sharding", "stage3"]),
    "TP2": (2, 2, 4, TENSOR),
    "TP2 sequence": (2, 2, 4, [*TENSOR, "--sequence_parallel", "true"]),
    "PP2": (2, 2, 4, PIPELINE),
    "PP2 virtual": (2, 2, 4, [*PIPELINE, "--virtual_pp_degree", "2"]),
    "TP2 PP2": (4, 2, 4, [*TENSOR, *PIPELINE]),
    "DP2 PP2": (4, 2, 2, PIPELINE),
}


def write_inputs(folder: Path) -> None:
    """A random LLaMA with the embedded model's tokenizer, and rows of 100 to 120 words."""
    write_model(folder / "model", SIZES)
    (folder / "data").mkdir()
    chosen, words = random.Random(0), ["river", "house", "green", "apple", "tree", "seven", "stone", "light"]
    with open(folder / "data" / "train.json", "w", encoding="utf-8") as file:
        for _ in range(ROWS * 4):
            answer = " ".join(chosen.choices(words, k=chosen.randint(100, 120)))
            file.write(json.dumps({"src": "Go on", "tgt": answer}) + "\n")


def tokens_per_second(name: str, folder: Path, processors: int) -> float:
    """Of one run of a layout, after its first steps."""
    processes, rows, micro_batches, options = LAYOUTS[name]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        output = Path(place) / "out"
        launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(processes), "--log_dir", place]
        command = [
            *(sys.executable, "-u", *(launcher if processes > 1 else []), "finetune_generation.py"),
            *("--model_name_or_path", folder / "model", "--dataset_name_or_path", folder / "data"),
            *("--output_dir", output, "--do_train", "--max_steps", STEPS, "--logging_steps", 1, "--device", "cpu"),
            *("--src_length", 64, "--max_length", 256, "--save_strategy", "no", "--disable_tqdm", "true"),
            *("--per_device_train_batch_size", rows, "--gradient_accumulation_steps", micro_batches),
            *("--report_to", "none", *options),
        ]
        threads = str(max(1, processors // processes))
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        done = subprocess.run(
            [str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        state = json.loads((output / "trainer_state.json").read_text("utf-8"))
    rates = [log["tokens_per_second"] for log in state["log_history"] if "loss" in log]
    return statistics.median(rates[WARM:])


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(results)
    figure, axes = plt.subplots(figsize=(9, 4))
    ratios = [results[name]["ratio"] for name in names]
    axes.bar(names, ratios, color="#6baed6")
    axes.axhline(1.0, color="#444444", linewidth=0.8)
    for place, ratio in enumerate(ratios):
        axes.text(place, ratio, f"{ratio:.2f}", ha="center", va="bottom")
    axes.set_ylabel("tokens/s, one process = 1")
    axes.set_title("SFT with the same rows a step")
    figure.autofmt_xdate(rotation=30)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(LAYOUTS), help="layouts; nothing is written")
    parser.add_argument("--rounds", type=int, default=3, help="each layout so often, in turn (default 3)")
    chosen = parser.parse_args()
    names = list(dict.fromkeys(["1", *(chosen.only or LAYOUTS)]))
    processors = len(os.sched_getaffinity(0))
    found: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_inputs(folder)
        for number in range(chosen.rounds):
            for name in names:
                found[name].append(tokens_per_second(name, folder, processors))
                ratio = found[name][-1] / found["1"][-1]
                print(f"round {number + 1}: {name}: {found[name][-1]:.0f} tokens/s, {ratio:.2f} x", flush=True)
    results = {
        name: {
            "processes": LAYOUTS[name][0],
            "tokens_per_second": rates,
            "ratio": statistics.median(rate / alone for rate, alone in zip(rates, found["1"], strict=True)),
        }
        for name, rates in found.items()
    }
    for name, result in results.items():
        print(f"{name:<14} {statistics.median(result['tokens_per_second']):8.0f} tokens/s  {result['ratio']:.2f} x")
    if not chosen.only:
        text = json.dumps({"processors": processors, "rows": ROWS, "layouts": results}, indent=2)
        (RESULTS / "parallel.json").write_text(text + "\n", "utf-8")
        plot(results, RESULTS / "parallel.png")


if __name__ == "__main__":
    main()
