"""How fast a model answers, in real tokens (padding never counts)."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from utils.inference.loading import Prepared
from utils.inference.sampling import SamplingOptions

if TYPE_CHECKING:
    from utils.inference.generator import Generator, Speed

# What is asked when the user gives no file.
QUESTIONS_FILE = Path(__file__).with_name("questions.json")
ANSWER_TOKENS = 64


def answer_examples(prepared: Prepared, generator: Generator, options: SamplingOptions, batch_size: int) -> Speed:
    """Answers two batches of built-in questions with 64 tokens each, so that runs compare; the text is thrown away."""
    questions = [json.loads(line)["src"] for line in QUESTIONS_FILE.read_text("utf-8").splitlines()]
    prompts = [
        prepared.template.encode_prompt(
            prepared.tokenizer, [{"role": "user", "content": questions[number % len(questions)]}]
        )
        for number in range(2 * batch_size)
    ]
    fixed = replace(options, min_new_tokens=ANSWER_TOKENS, max_new_tokens=ANSWER_TOKENS, stop=())
    generator.share_prefixes = False  # the questions come several times; each is to be read as a new one
    generator.generate(prompts, fixed, batch_size)
    return generator.speed


def peak_memory(device: str) -> int:
    """Most bytes in use so far: of the GPU where one is used, else of this process."""
    if device.startswith("gpu"):
        import paddle

        return int(paddle.device.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(speed: Speed | None, device: str) -> str:
    """The figures of a run as lines of text."""
    if speed is None or not speed.first_token_seconds:
        return "nothing was generated, so there is nothing to measure"
    read = speed.prompt_tokens - speed.shared_tokens
    prefill = read / max(speed.prefill_seconds, 1e-9)
    decode = speed.decode_tokens / max(speed.decode_seconds, 1e-9)
    rows = [
        ("load time", f"{speed.load_seconds:.2f} s"),
        ("time to first token", f"{fmean(speed.first_token_seconds) * 1000:.0f} ms (mean)"),
        ("prefill", f"{prefill:.1f} tokens/s ({read} tokens)"),
        ("decode", f"{decode:.1f} tokens/s ({speed.decode_tokens} tokens)"),
        ("peak memory", f"{peak_memory(device) / 2**20:.0f} MiB"),
    ]
    if speed.shared_tokens:
        rows.insert(3, ("read once for all", f"{speed.shared_tokens} of {speed.prompt_tokens} tokens of prompts"))
    if speed.drafted_tokens:
        share = speed.accepted_tokens / speed.drafted_tokens
        rows.insert(-1, ("guesses", f"{speed.accepted_tokens} of {speed.drafted_tokens} tokens right ({share:.0%})"))
    return "\n".join(f"{name:<20} {value}" for name, value in rows)
