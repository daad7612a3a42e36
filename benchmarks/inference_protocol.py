"""What both kinds of sides of benchmarks/inference.py share: the measurements, and the lines in which they answer.

A side says one line once it has given its first answer. Then it waits for commands on standard input, one JSON object
a line, and answers each by one line; {"end": true} or the end of the input ends it. Both kinds measure by this very
code. It needs the standard library alone, because the peer's environment holds nothing of the toolchain.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

# (prompts, new tokens) -> (greedy ids of each prompt, seconds until the first tokens, seconds of all the rest)
Generate = Callable[[Sequence[Sequence[int]], int], tuple[list[list[int]], float, float]]


def open_answers() -> TextIO:
    """The stream of answers: standard output, kept for them alone. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def say(answers: TextIO, content: Mapping[str, Any]) -> None:
    print(json.dumps(content), file=answers, flush=True)


def peak_memory() -> int:
    """Most resident bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(generate: Generate, work: Mapping[str, Any], command: Mapping[str, Any]) -> dict[str, Any]:
    """One measurement: its value, and of decoding also the answers, by the number of their prompt.

    Raises:
        ValueError: there is no such measurement.
    """
    batch, new_tokens = work["batch"], work["new_tokens"]
    match command["measure"]:
        case "warm_up":
            generate(batch, 4)
            generate([work["prefill"]], 1)
            return {}
        case "prefill":
            return {"value": len(work["prefill"]) / generate([work["prefill"]], 1)[1]}
        case "first_token":
            return {"value": generate([work["first"]], 1)[1]}
        case "decode_1":
            number = command["prompt"]
            tokens, _, seconds = generate([batch[number]], new_tokens)
            return {"value": (new_tokens - 1) / seconds, "answers": {str(number): tokens[0]}}
        case "decode_8":
            tokens, _, seconds = generate(batch, new_tokens)
            answers = {str(number): row for number, row in enumerate(tokens)}
            return {"value": len(batch) * (new_tokens - 1) / seconds, "answers": answers}
        case "growth":  # seconds per decoded token; the last one fills the context
            steps = work["growth_steps"]
            return {"value": generate([work["text"][: command["context"] - steps]], steps)[2] / (steps - 1)}
    raise ValueError(f"expected a measurement of inference_protocol.py, found {command}")


def serve(answers: TextIO, generate: Generate, work: Mapping[str, Any]) -> None:
    """Measures what is asked for until the end, then says the peak memory. Waiting is a blocked read."""
    for line in sys.stdin:
        command = json.loads(line)
        if command.get("end"):
            break
        say(answers, measure(generate, work, command))
    say(answers, {"peak": peak_memory()})
