"""Tries a grammar in a process of its own; `constraint.check` starts it.

Reads {"grammar": ..., "limits": ..., "vocabulary": ...} from standard input; writes what is wrong, or nothing. A
grammar that takes too much time or memory, or crashes the library, ends the process by a signal.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

PROCESSOR_SECONDS = 1.0
MEMORY = 1 << 30  # bytes
STACK = 4 << 20  # bytes, half of what the model's process has
MOST_IDS = 1 << 20
STEPS = 3  # of the answer
NAMED = re.compile(r"<\[[\d,-]*?(\d+)\]>")  # special tokens by their ids


class Bytes:
    """A vocabulary of single bytes, an end token and the special tokens that a grammar names."""

    bos_token_id = None
    eos_token_id = 256

    def __init__(self, highest: int) -> None:
        self.special_token_ids = range(256, max(highest, 256) + 1)
        self.tokens = [bytes([byte]) for byte in range(256)] + [b"<|%d|>" % place for place in self.special_token_ids]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def main() -> None:
    trial = json.loads(sys.stdin.buffer.read())
    highest = max((int(place) for place in NAMED.findall(trial["grammar"]) if len(place) < 8), default=0)
    known = MOST_IDS if trial["vocabulary"] is None else trial["vocabulary"] - 1
    tokenizer = LLTokenizer(TokenizerWrapper(Bytes(min(highest, known, MOST_IDS))))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_STACK, (STACK, STACK))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, PROCESSOR_SECONDS)  # SIGPROF ends the process
    matcher = LLMatcher(tokenizer, trial["grammar"], log_level=0, limits=LLParserLimits(**trial["limits"]))
    for _ in range(STEPS):  # some forms are too much work from their second step on
        if matcher.is_error() or matcher.is_stopped():
            break
        bits = matcher.compute_bitmask()
        byte = next((byte for byte in range(256) if bits[byte // 8] >> byte % 8 & 1), None)
        if byte is None:
            break
        matcher.consume_token(byte)
    sys.stdout.write(matcher.get_error())


if __name__ == "__main__":
    main()
