"""Reading and checking dataset files: JSON Lines in four shapes, each row with its file and line.

A row is recognised by its keys:
- `src`, `tgt`: strings, or lists of strings that are the rounds of a conversation;
- `messages`: OpenAI chat messages (`role`, `content`);
- `instruction`, `input`, `output`: Alpaca (also `history`);
- `conversations`: ShareGPT (`from`, `value`).
What else they may say, and what is told of keys that nobody reads, is in `utils.data.keys`.
A file that holds one JSON array of such rows is read too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.data.builtin import resolve_built_in
from utils.data.keys import (
    checked,
    flags_of,
    ignored_of,
    is_learned,
    kind,
    row_is_learned,
    system_of,
    text,
    tools_of,
)
from utils.data.lines import DEEP, Line, RowFault, is_array, naming, read_lines
from utils.data.template import Message, Tools
from utils.errors import UserError, raise_if
from utils.splits import looks_like_path, split_files

SHOWN_FAULTS = 20
LAZY_CHECKED_ROWS = 1000
# The two spellings of who speaks, in OpenAI's and in ShareGPT's rows.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
}
_MAY_FOLLOW = {None: {"user"}, "user": {"assistant"}, "assistant": {"user"}, "tool": {"assistant", "tool"}}


@dataclass(frozen=True)
class Row:
    """One conversation of a dataset.

    Attributes:
        messages: an optional system message, then user and assistant in turn; behind an answer that calls functions
            what these give.
        file, line: where it stands (the line, counted from 1, where the row begins).
        raw: the row as written.
        tools: the functions that it offers, or None.
        ignored: what else it says, in words for the report.
    """

    messages: tuple[Message, ...]
    file: Path
    line: int
    raw: dict[str, Any]
    tools: Tools | None = None
    ignored: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """File and line, as messages to the user name them."""
        return f"{self.file} line {self.line}"

    @property
    def question(self) -> tuple[Message, ...]:
        """What a model is asked: everything up to the last turn of the user."""
        return self.messages if self.answer is None else self.messages[:-1]

    @property
    def answer(self) -> str | None:
        """The answer to the last question, if the row has one."""
        last = self.messages[-1]
        return last["content"] if last["role"] == "assistant" else None


def parse_row(raw: Any, *, require_answer: bool = True) -> tuple[Message, ...]:
    """The messages of one decoded JSON row.

    Args:
        raw: the row.
        require_answer: the last message must be an answer. Otherwise answers may be missing, and the
            answer after the last question is kept if it is there.

    Raises:
        RowFault: what is wrong with it.
    """
    if not isinstance(raw, dict):
        raise RowFault(f'expected a JSON object such as {{"src": ..., "tgt": ...}}, found {kind(raw)}')
    if "src" in raw:
        messages = _from_pairs(raw, require_answer)
    elif "messages" in raw:
        messages = _from_turns(raw, "messages", "role", "content")
    elif "conversations" in raw:
        messages = _from_turns(raw, "conversations", "from", "value")
    elif "instruction" in raw:
        messages = _from_alpaca(raw)
    else:
        keys = ", ".join(map(str, raw)) or "none"
        raise RowFault(f'no "src", "messages", "conversations" or "instruction" among its keys ({keys})')
    system = system_of(raw)
    if system is not None and messages[0] != {"role": "system", "content": system}:
        messages.insert(0, {"role": "system", "content": system})
    if not row_is_learned(raw):
        for message in messages:
            if message["role"] == "assistant":
                message["train"] = False
    _check_turns(messages, require_answer)
    return tuple(messages)


def _texts(value: Any, name: str) -> list[str]:
    if isinstance(value, list):
        return [text(part, f"{name}[{number}]") for number, part in enumerate(value)]
    if not isinstance(value, str):
        raise RowFault(f'"{name}" must be a string or a list of strings, found {kind(value)}')
    return [text(value, name)]


def _from_pairs(raw: dict[str, Any], require_answer: bool) -> list[Message]:
    asked = _texts(raw["src"], "src")
    if raw.get("tgt") is None:
        if require_answer:
            raise RowFault('"tgt" is missing')
        answers: list[str] = []
    else:
        answers = _texts(raw["tgt"], "tgt")
    if not asked:
        raise RowFault('"src" is an empty list')
    # Without answers required, a list of questions may end with the one to be answered.
    if len(answers) != len(asked) and (require_answer or len(answers) not in (0, len(asked) - 1)):
        raise RowFault(f'"src" has {len(asked)} rounds but "tgt" has {len(answers)}')
    if not answers and len(asked) > 1:
        raise RowFault(f'"src" has {len(asked)} rounds but "tgt" has none: the earlier answers are needed')
    messages: list[Message] = []
    flags = flags_of(raw, len(answers)) or [True] * len(answers)
    for number, question in enumerate(asked):
        messages.append({"role": "user", "content": question})
        if number < len(answers):
            messages.append({"role": "assistant", "content": answers[number]})
            if not flags[number]:
                messages[-1]["train"] = False
    return messages


def _from_turns(raw: dict[str, Any], key: str, who: str, what: str) -> list[Message]:
    turns = raw[key]
    if not isinstance(turns, list) or not turns:
        raise RowFault(f'"{key}" must be a list of turns, found {"an empty one" if turns == [] else kind(turns)}')
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        name = f"{key}[{number}]"
        if not isinstance(turn, dict):
            raise RowFault(f'"{name}" must be an object with "{who}" and "{what}", found {kind(turn)}')
        role = turn.get(who)
        if not isinstance(role, str) or role not in ROLES:
            raise RowFault(f'"{name}.{who}" must be one of {", ".join(ROLES)}, found {json.dumps(role)}')
        content = turn.get(what)
        if isinstance(content, list):  # OpenAI's list of parts
            parts = [part.get("text") if isinstance(part, dict) else part for part in content]
            content = "".join(text(part, f"{name}.{what}[{i}].text") for i, part in enumerate(parts))
        if content is None and ROLES[role] == "assistant" and turn.get("tool_calls"):
            content = ""  # OpenAI's answers that only call functions
        message: Message = {"role": ROLES[role], "content": text(content, f"{name}.{what}")}
        if message["role"] == "assistant":
            _add_to_answer(message, turn, name)
        elif message["role"] == "tool":
            for mark in ("name", "tool_call_id"):
                if turn.get(mark):
                    message[mark] = text(turn[mark], f"{name}.{mark}")
        messages.append(message)
    return messages


def _add_to_answer(message: Message, turn: dict[str, Any], name: str) -> None:
    """What an answer's turn says beside its text."""
    if not is_learned(turn, f"{name}."):
        message["train"] = False
    if turn.get("reasoning_content"):
        message["reasoning_content"] = text(turn["reasoning_content"], f"{name}.reasoning_content")
    calls = turn.get("tool_calls")
    if calls:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise RowFault(f'"{name}.tool_calls" must be a list of objects')
        message["tool_calls"] = checked(calls, f"{name}.tool_calls")


def _from_alpaca(raw: dict[str, Any]) -> list[Message]:
    messages: list[Message] = []
    history = raw.get("history") or []
    if not isinstance(history, list):
        raise RowFault(f'"history" must be a list of [question, answer], found {kind(history)}')
    for number, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowFault(f'"history[{number}]" must be [question, answer]')
        for place, role in enumerate(("user", "assistant")):
            messages.append({"role": role, "content": text(pair[place], f"history[{number}][{place}]")})
    question = text(raw["instruction"], "instruction")
    if raw.get("input"):
        question += "\n" + text(raw["input"], "input")
    messages.append({"role": "user", "content": question})
    if raw.get("output") is not None:
        messages.append({"role": "assistant", "content": text(raw["output"], "output")})
    return messages


def _check_turns(messages: Sequence[Message], require_answer: bool) -> None:
    """System first, then user and assistant in turn, none of them blank; an answer may only call functions, and what
    these give may follow it."""
    turns = list(messages)
    if turns and turns[0]["role"] == "system":
        turns.pop(0)
    before: Message | None = None
    rounds = 0
    for number, message in enumerate(turns):
        role = message["role"]
        calls = before is not None and bool(before.get("tool_calls"))
        if role not in _MAY_FOLLOW[before and before["role"]] and not (role == "tool" and calls):
            expected = "user" if before is None or before["role"] == "assistant" else "assistant"
            also = "; a tool's turn follows an answer with tool_calls" if role == "tool" else ""
            raise RowFault(
                f"turn {number + 1} must be the {expected}'s, found the {role}'s "
                f"(an optional system message, then user and assistant in turn{also})"
            )
        rounds += role == "user"
        needed = role != "tool" and (require_answer or role == "user" or number + 1 < len(turns))
        if needed and not message["content"].strip() and "tool_calls" not in message:
            what = 'the answer ("tgt")' if role == "assistant" else 'the question ("src")'
            raise RowFault(f"{what} of round {rounds} is blank")
        before = message
    if before is None:
        raise RowFault("no question in it")
    if require_answer and before["role"] != "assistant":
        raise RowFault('the last turn has no answer (for src/tgt rows: "tgt")')


def to_row(line: Line, file: Path, *, require_answer: bool = True) -> Row:
    """The row in a decoded line.

    Raises:
        RowFault: what is wrong with it.
    """
    if line.fault is not None:
        raise RowFault(line.fault)
    try:
        messages = parse_row(line.value, require_answer=require_answer)
        return Row(messages, file, line.number, line.value, tools_of(line.value), ignored_of(line.value))
    except RecursionError:  # a message that would show the value
        raise RowFault(DEEP) from None


def read_rows(paths: Path | Sequence[Path], *, require_answer: bool = True) -> Iterator[Row]:
    """Every row of one or more files, in order.

    Raises:
        UserError: a broken row or an unreadable file (`check_dataset` collects them all instead).
    """
    for file in [paths] if isinstance(paths, Path) else paths:
        for line in read_lines(file):
            with naming(f"{file} line {line.number}"):
                row = to_row(line, file, require_answer=require_answer)
            yield row


def check_dataset(folder: Path | str, splits: Sequence[str], *, lazy: bool = False) -> None:
    """Checks a dataset before anything is loaded: the files of a folder, or the name of a built-in one.

    Args:
        folder: `dataset_name_or_path`.
        splits: those that the run needs ("train", "dev", "test", "quant").
        lazy: only the first rows of the training files are read (a file may hold many GB; the rest is
            checked as it streams).

    Raises:
        UserError: an unknown name; every missing or empty file and every broken row, with file and
            line; of many broken rows the first ones and their number.
    """
    if isinstance(folder, str) and not looks_like_path(folder):
        resolve_built_in(folder)
        return
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"dataset_name_or_path {folder}: no such folder; it must hold train.json and dev.json "
            "(or train/*.json and dev/*.json), one JSON object per line"
        )
    faults: list[str] = []
    broken = 0
    for split in splits:
        files = split_files(folder, split)
        if not files:
            faults.append(f"{folder}: {split}.json (or {split}/*.json) is missing")
        rows = 0
        for file in files:
            if lazy and split == "train" and is_array(file):
                faults.append(f"{file}: one JSON array cannot be streamed with lazy; write one row per line")
                rows += 1
                continue
            for line in read_lines(file):
                rows += 1
                try:
                    to_row(line, file)
                except RowFault as fault:
                    broken += 1
                    if broken <= SHOWN_FAULTS:
                        faults.append(f"{file} line {line.number}: {fault}")
                if lazy and split == "train" and rows >= LAZY_CHECKED_ROWS:
                    break
        if files and not rows:
            names = ", ".join(map(str, files))
            faults.append(f'{names}: empty; expected one JSON object per line, {{"src": ..., "tgt": ...}}')
    if broken > SHOWN_FAULTS:
        faults.append(f"{folder}: {broken - SHOWN_FAULTS} more broken rows, {broken} in total")
    raise_if(faults)
