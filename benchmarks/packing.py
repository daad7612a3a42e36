"""How full are the packs: best-fit-decreasing (ours) against next-fit, on natural mixes of lengths.

    python benchmarks/packing.py

The lengths are those of the sample datasets, in tokens of the embedded model, and log-normal mixes whose
medians and spreads are those of common instruction and chat data. Results: benchmarks/results/packing.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils import runtime  # noqa: E402

runtime.prepare()

from utils.checkpoints.locate import locate  # noqa: E402
from utils.data.encode import Example, encode_row  # noqa: E402
from utils.data.packing import best_fit, efficiency  # noqa: E402
from utils.data.rows import read_rows  # noqa: E402
from utils.data.template import ChatTemplate  # noqa: E402
from utils.families.tokenizers import load_tokenizer  # noqa: E402

CAPACITIES = (1024, 2048, 4096)
MIXES = {  # median and sigma of the logarithm, in tokens
    "short instructions": (90, 0.8),
    "mixed instructions": (220, 0.9),
    "long chats": (700, 0.8),
}
ROWS = 20_000


def next_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Packs in order of arrival: a row that does not fit closes the pack."""
    packs: list[list[int]] = []
    room = 0
    for number, size in enumerate(lengths.tolist()):
        if size > room:
            packs.append([])
            room = capacity
        packs[-1].append(number)
        room -= size
    return packs


def sample_lengths(folder: Path, max_length: int) -> np.ndarray:
    """Lengths of the rows of a dataset in tokens of the embedded model."""
    checkpoint = locate("smollm2-135m-instruct")
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config)
    template = ChatTemplate.load(checkpoint.folder, default=checkpoint.family.chat_template)
    rows = read_rows(folder / "train.json")
    examples = (encode_row(row, tokenizer, template, max_length // 2, max_length) for row in rows)
    return np.array([len(example.input_ids) for example in examples if isinstance(example, Example)])


def main() -> None:
    sets = {f"log-normal: {name}": mix for name, mix in MIXES.items()}
    results = []
    print(f"{'rows':<36}{'max_length':>10}{'next-fit':>10}{'best-fit':>10}{'seconds':>9}")
    for name in ("data", "data/zh", *sets):
        for capacity in CAPACITIES:
            if name in sets:
                median, sigma = sets[name]
                drawn = np.random.default_rng(0).lognormal(np.log(median), sigma, ROWS)
                lengths = np.clip(drawn, 8, capacity).astype(int)
            else:
                lengths = sample_lengths(ROOT / name, capacity)
            start = time.perf_counter()
            packs = best_fit(lengths, capacity)
            seconds = time.perf_counter() - start
            ours = efficiency(lengths, packs, capacity)
            theirs = efficiency(lengths, next_fit(lengths, capacity), capacity)
            label = f"{name} ({len(lengths):,})"
            print(f"{label:<36}{capacity:>10}{theirs:>10.1%}{ours:>10.1%}{seconds:>9.3f}", flush=True)
            results.append(
                {
                    "rows": name,
                    "count": len(lengths),
                    "max_length": capacity,
                    "next_fit": round(theirs, 4),
                    "best_fit": round(ours, 4),
                    "best_fit_seconds": round(seconds, 4),
                }
            )
    target = ROOT / "benchmarks" / "results" / "packing.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
