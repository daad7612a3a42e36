"""Peak memory of `lazy` against the size of the training file.

    python benchmarks/lazy_memory.py [--gigabytes 1] [--rows 20000]

Writes a JSON Lines file of 10 MB and one of 1 GB into a temporary folder (removed at the end), streams the
same number of rows from each through tokenizer and packing, each in a process of its own, and prints the
peak resident memory. A third run starts in the middle of the large file, as a resumed one does. Results:
benchmarks/results/lazy_memory.json.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils import runtime  # noqa: E402

runtime.prepare()

from utils.checkpoints.locate import locate  # noqa: E402
from utils.data.sources import FileSource  # noqa: E402
from utils.data.stream import StreamDataset  # noqa: E402
from utils.data.template import ChatTemplate  # noqa: E402
from utils.families.tokenizers import load_tokenizer  # noqa: E402

WORDS = "river stone light water paper garden music winter market letter bridge window table".split()  # noqa: SIM905
BLOCK = 1 << 20


def write_rows(file: Path, size: int) -> None:
    """Rows of 5 to 120 words until the file has `size` bytes; a block of them is repeated."""
    chance = random.Random(0)
    block = b""
    while len(block) < BLOCK:
        answer = " ".join(chance.choices(WORDS, k=chance.randint(5, 120)))
        block += json.dumps({"src": f"Write {chance.randint(1, 10**6)} words.", "tgt": answer}).encode() + b"\n"
    with file.open("wb") as stream:
        for _ in range(max(1, size // len(block))):
            stream.write(block)


def measure(file: Path, rows: int, middle: bool) -> dict[str, float]:
    """Streams packed rows from a file and measures this process; runs in a process of its own."""
    checkpoint = locate("smollm2-135m-instruct")
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config)
    template = ChatTemplate.load(checkpoint.folder, default=checkpoint.family.chat_template)
    stream = StreamDataset(FileSource([file], None), tokenizer, template, src_length=512, max_length=1024, packed=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    state = stream.state_after(0)
    if middle:
        with file.open("rb") as opened:
            opened.seek(file.stat().st_size // 2)
            opened.readline()
            state["position"] |= {"offset": opened.tell(), "rows": 1, "line": 1}
    count = tokens = 0
    for item in stream.iter_from(state):
        count += len(item["lengths"])
        tokens += len(item["input_ids"])
        if count >= rows:
            break
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "rows": count,
        "tokens_per_second": round(tokens / seconds),
        "peak_mib": round(peak, 1),
        "peak_growth_mib": round(peak - before, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the large file")
    parser.add_argument("--rows", type=int, default=20_000, help="rows to stream from each file")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--middle", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.rows, options.middle)))
        return
    locate("smollm2-135m-instruct")  # prepared once, outside the measurements
    results = []
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'file':>16}{'rows read':>11}{'tokens/s':>10}{'peak MiB':>10}{'grown by MiB':>14}")
        for name, size in (("10 MB", 10 * 10**6), (f"{options.gigabytes:g} GB", int(options.gigabytes * 10**9))):
            file = Path(folder) / "train.json"
            write_rows(file, size)
            for middle in (False, True) if size > 10**8 else (False,):
                command = [sys.executable, __file__, "--measure", str(file), "--rows", str(options.rows)]
                done = subprocess.run(command + ["--middle"] * middle, stdout=subprocess.PIPE, text=True, check=True)
                found = json.loads(done.stdout)
                label = name + (", middle" if middle else "")
                print(
                    f"{label:>16}{found['rows']:>11,}{found['tokens_per_second']:>10,}"
                    f"{found['peak_mib']:>10,.1f}{found['peak_growth_mib']:>14,.1f}",
                    flush=True,
                )
                results.append({"file": label, "bytes": file.stat().st_size, **found})
    target = ROOT / "benchmarks" / "results" / "lazy_memory.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
