"""The requests of benchmarks/serving.py: real prompts and lengths with a long tail, the same for every side."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.inference.loading import Prepared

DATA = Path(__file__).resolve().parent.parent / "data"
SYSTEM_TOKENS = 512
CONVERSATION = {"median": 40, "sigma": 0.8, "least": 8, "most": 256}  # tokens of answers, log-normal
LONG_PROMPT = {"median": 420, "sigma": 0.5, "least": 128, "most": 1024}  # tokens of text in a prompt
SHARES = {"row": 0.45, "chat": 0.4, "long": 0.15}


@dataclass(frozen=True)
class Source:
    """What requests are made of.

    Attributes:
        prepared: tokenizer and template.
        rows: questions and answers, of data/train.json.
        text: token ids of a novel.
    """

    prepared: Prepared
    rows: list[dict[str, Any]]
    text: list[int]

    @classmethod
    def of(cls, prepared: Prepared) -> Source:
        lines = (DATA / "train.json").read_text(encoding="utf-8").splitlines()
        novel = (DATA / "text" / "northanger_abbey.txt").read_text(encoding="utf-8")
        return cls(prepared, [json.loads(line) for line in lines], prepared.tokenizer.encode(novel))

    def prompt(self, *messages: tuple[str, str]) -> list[int]:
        said = [{"role": role, "content": content} for role, content in messages]
        return self.prepared.template.encode_prompt(self.prepared.tokenizer, said)

    def excerpt(self, start: int, length: int) -> str:
        return self.prepared.tokenizer.decode(self.text[start : start + length])


def requests(source: Source, mix: str, count: int, seed: str) -> list[dict[str, Any]]:
    """`count` requests of a mix: "mixed", or "shared", whose prompts begin with one system prompt."""
    chance = random.Random(seed)
    system = source.excerpt(0, SYSTEM_TOKENS)
    found = []
    for _ in range(count):
        row = chance.choice(source.rows)
        kind = chance.choices(list(SHARES), list(SHARES.values()))[0]
        length = drawn(chance, CONVERSATION)
        if kind == "row":
            length = len(source.prepared.tokenizer.encode(row["tgt"])) + 1  # and the end token
        if mix == "shared":
            prompt = source.prompt(
                ("system", f"You answer questions. You like this book: {system}"), ("user", row["src"])
            )
        elif kind == "long":
            excerpt = source.excerpt(chance.randrange(len(source.text) // 2), drawn(chance, LONG_PROMPT))
            prompt = source.prompt(("user", f"What happens here, in a few sentences?\n\n{excerpt}"))
        else:
            prompt = source.prompt(("user", row["src"]))
        found.append({"prompt": prompt, "max_tokens": length})
    return found


def drawn(chance: random.Random, lengths: dict[str, Any]) -> int:
    """A length of a log-normal distribution, within bounds."""
    length = round(chance.lognormvariate(math.log(lengths["median"]), lengths["sigma"]))
    return max(lengths["least"], min(lengths["most"], length))
