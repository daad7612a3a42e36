"""How a chat template writes calls of functions, learned from examples that it renders.

An example with names that nobody else uses shows what stands before, between and after the parts of a call. Most
templates write a JSON object within marks; some write a name and then a JSON object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.data.calls import IDS, KEY, NAMES, VALUE, example_calls, example_tools
from utils.data.template import ChatTemplate, Message
from utils.errors import UserError
from utils.inference.grammar import JSON_BLANKS, Grammar

if TYPE_CHECKING:
    from utils.families.tokenizers import Tokenizer

ID = "\0"  # stands for the id of a call in the parts of a form
MOST_CALLS = 16  # of an answer that must call
NAME_KEY = re.compile(r'"(\w+)"\s*:\s*"\Z')
ARGUMENTS_KEY = re.compile(r'"(\w+)"\s*:\s*\Z')
REASONING = re.compile(r"\A\s*<(think|thinking|thought|reasoning)>.*?</\1>\s*", re.DOTALL)
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class CallForm:
    """How calls are written: before + name + middle + arguments + after, and several with `between` in place of the
    first's `after` and the next one's `before`.

    Attributes:
        before, middle, after: see above; `ID` stands where the id of a call is.
        between: None if an answer has one call at most.
        special: the special tokens of these parts, text to id; decoded answers do not show them.
        name_key, arguments_key: of the JSON object that a call is, if it is one.
    """

    before: str
    middle: str
    between: str | None
    after: str
    special: Mapping[str, int]
    name_key: str | None
    arguments_key: str | None

    @property
    def is_json(self) -> bool:
        """Whether a call is a JSON object, or one of a list."""
        return self.name_key is not None and self.arguments_key is not None

    @property
    def opening(self) -> str:
        """The mark that a call begins with; "" if nothing is before its JSON."""
        before = re.split(r"[\[{]\s*(?=[{\"])|[\[{]\s*\Z", self.before)[0] if self.is_json else self.before
        return before.strip()

    @property
    def closing(self) -> str:
        """The mark behind the JSON of the last call."""
        return self.after.rpartition("}")[2].rpartition("]")[2].strip() if self.is_json else self.after.strip()

    def grammar(self, tools: Sequence[Mapping[str, Any]], name: str | None = None, *, parallel: bool = True) -> Grammar:
        """The form of an answer that calls functions and says nothing else.

        Args:
            tools: as OpenAI's requests have them.
            name: of the only function that may be called, once; None allows all.
            parallel: whether several calls may follow each other.
        """
        rules = []
        functions = [tool["function"] for tool in tools if name in (None, tool["function"]["name"])]
        for place, function in enumerate(functions):
            schema = {**arguments_schema(function), "x-guidance": JSON_BLANKS}
            rules.append(f"call{place}: {self._literal(function['name'] + self.middle)} %json {json.dumps(schema)}")
        call = "call: " + " | ".join(f"call{place}" for place in range(len(functions)))
        more = (
            f" ({self._literal(self.between)} call){{0,{MOST_CALLS - 1}}}"
            if self.between and parallel and name is None
            else ""
        )
        start = f"start: {self._literal(self.before)} call{more} {self._literal(self.after)}"
        return Grammar("calls", "\n".join([start, call, *rules]))

    def _literal(self, text: str) -> str:
        """A text of the form in the words of a grammar."""
        parts = re.split("|".join(map(re.escape, [ID, *self.special])), text)
        marks = re.findall("|".join(map(re.escape, [ID, *self.special])), text)
        words = []
        for part, mark in zip(parts, [*marks, None], strict=True):
            if part:
                words.append(json.dumps(part, ensure_ascii=False))
            if mark is not None:
                words.append("/[a-zA-Z0-9]{9}/" if mark == ID else f"<[{self.special[mark]}]>")
        return " ".join(words)


def arguments_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of a function's arguments, which are an object also where it does not say so."""
    schema = function.get("parameters") or NO_PARAMETERS
    kind = schema.get("type", "object")
    return {**schema, "type": "object" if isinstance(kind, list) and "object" in kind else kind}


def form_of(template: ChatTemplate, tokenizer: Tokenizer) -> CallForm | None:
    """How a template writes calls; None if it does not, or in no form that is understood."""
    if not {"tools", "tool_calls"} <= template.known_keys(tokenizer):
        return None
    one = _example(template, tokenizer, 1)
    if one is None or (cut := _cut(one, 1)) is None:
        return None
    before, middle, _, after = cut
    between = None
    two = _example(template, tokenizer, 2)
    several = None if two is None else _cut(two, 2)
    if several is not None and (several[0], several[1], several[3]) == (before, middle, after):
        between = several[2]
    name, arguments = NAME_KEY.search(before), ARGUMENTS_KEY.search(middle)
    written = before + middle + (between or "") + after
    special = {token: place for token, place in tokenizer.written_special.items() if token in written}
    return CallForm(before, middle, between, after, special, name and name[1], arguments and arguments[1])


def _example(template: ChatTemplate, tokenizer: Tokenizer, count: int) -> str | None:
    """What a template writes for an answer with so many calls, without the token that ends it; None if it refuses."""
    messages: list[Message] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": example_calls(count)},
    ]
    try:
        rounds, _ = template.rounds(tokenizer, messages, example_tools())
    except UserError:
        return None
    return REASONING.sub("", tokenizer.decode(rounds[-1].answer[:-1], skip_special=False))


def _cut(text: str, count: int) -> tuple[str, str, str, str] | None:
    """(before, middle, between, after) of an example with so many calls; None if it is no such form."""
    parts = []
    done = 0
    decoder = json.JSONDecoder()
    for name in NAMES[:count]:
        start = text.find(name, done)
        opened = text.find("{", start)
        if start < 0 or opened < 0:
            return None
        try:
            arguments, end = decoder.raw_decode(text, opened)
        except ValueError:
            return None
        if arguments != {KEY: VALUE}:
            return None
        parts += [text[done:start], text[start + len(name) : opened]]
        done = end
    parts.append(text[done:])
    parts = [re.sub("|".join(IDS), ID, part) for part in parts]
    if count == 1:
        before, middle, after = parts
        return before, middle, "", after
    before, middle, between, again, after = parts
    return (before, middle, between, after) if again == middle else None
