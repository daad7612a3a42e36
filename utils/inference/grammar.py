"""What form an answer must have. Plain data: whoever asks for an answer needs no library for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["json_object", "json_schema", "regex", "choice", "lark", "calls"]
KINDS: tuple[str, ...] = get_args(Kind)
JSON_KINDS = ("json_object", "json_schema", "calls")  # whose answers are JSON, with or without marks around it
# Between the parts of JSON, as the library has it in a schema under "x-guidance": as models write it on one line or on
# many, but not without end, as a sampled answer may.
JSON_BLANKS = {"whitespace_pattern": r"\x20{1,2}|\n[\x20\t]{0,32}"}


@dataclass(frozen=True)
class Grammar:
    """A form that an answer must have; `constraint` makes masks of tokens of it.

    Attributes:
        kind: how `text` says it.
            "json_object": any JSON object; `text` is empty.
            "json_schema": JSON that is valid by the schema that `text` is, as JSON.
            "regex": text that the regular expression matches as a whole (Rust's syntax, without look-around).
            "choice": one of the strings of `text`, a JSON list.
            "lark": a context-free grammar in llguidance's form of Lark, whose first rule is `start`.
            "calls": such a grammar of calls of functions, whose arguments are JSON.
        text: see kind.

    Raises:
        ValueError: a kind that is none of these.
    """

    kind: Kind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"the grammar is of kind {self.kind!r}: expected one of {', '.join(KINDS)}")
