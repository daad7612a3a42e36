"""This toolchain's side of benchmarks/inference.py: one corner in one process.

    python benchmarks/inference_child.py --corner dynamic --model NAME --work WORK.json

Answers commands as inference_protocol.py says. The clock stands outside of the generator; inside it only separates
the first tokens of a longer answer from the rest.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import inference_protocol as protocol

from utils import runtime

if TYPE_CHECKING:
    from utils.inference.generator import Generator

CORNERS: dict[str, dict[str, Any]] = {  # what each adds to the arguments of `utils.inference.loading.prepare`
    "dynamic": {},
    "dynamic_inference_model": {"mode": "dynamic", "inference_model": True},
    "static": {"mode": "static", "inference_model": False},
    "static_inference_model": {"mode": "static", "inference_model": True},
}


def open_corner(corner: str, model: str) -> Generator:
    """A generator whose answers no token ends, so that all have the same length."""
    from utils.inference.loading import load, prepare

    prepared = prepare(model, device="cpu", dtype="float32", **CORNERS[corner])
    loaded = load(prepared, "cpu")
    from utils.inference.generator import Generator

    return Generator(loaded.engine, prepared.tokenizer, end_ids=())


def generate(
    generator: Generator, prompts: Sequence[Sequence[int]], new_tokens: int
) -> tuple[list[list[int]], float, float]:
    """(greedy ids of each prompt, seconds until the first tokens, seconds of all the rest)."""
    from utils.inference.generator import Speed
    from utils.inference.sampling import SamplingOptions

    generator.speed = Speed()
    started = time.perf_counter()
    done = generator.generate(prompts, SamplingOptions(max_new_tokens=new_tokens, top_k=1), len(prompts))
    spent = time.perf_counter() - started
    for row in done:
        if row.error or len(row.tokens) != new_tokens:
            raise RuntimeError(f"{len(row.tokens)} of {new_tokens} tokens came ({row.error or row.finish_reason})")
    first = generator.speed.prefill_seconds if new_tokens > 1 else spent
    return [list(row.tokens) for row in done], first, spent - first


def main() -> None:
    parser = argparse.ArgumentParser(description="Greedy generation with one corner of the toolchain, timed.")
    parser.add_argument("--corner", choices=CORNERS, required=True, help="how the model runs")
    parser.add_argument("--model", required=True, help="a model's name or folder; an exported folder if static")
    parser.add_argument("--work", type=Path, required=True, help="the prompts, written by benchmarks/inference.py")
    chosen = parser.parse_args()
    work = json.loads(chosen.work.read_text(encoding="utf-8"))
    answers = protocol.open_answers()
    runtime.prepare(answering=True)
    started = time.perf_counter()
    generator = open_corner(chosen.corner, chosen.model)
    loaded = time.perf_counter() - started
    generate(generator, [work["first"]], 1)
    first_token_at = time.monotonic()
    versions = {name: importlib.metadata.version(name) for name in ("paddlepaddle", "paddlenlp")}
    protocol.say(answers, {"first_token_at": first_token_at, "load": loaded, "versions": versions})
    protocol.serve(answers, partial(generate, generator), work)


if __name__ == "__main__":
    main()
