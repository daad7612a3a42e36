"""What the keys of a row say beside its texts, and which of them nobody reads.

A key that is not read is counted and named in the data report, so that nothing which a row says gets lost without a
word; only keys that say nothing about the text (where a row comes from, how somebody rates it) are passed over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from utils.data.lines import RowFault, half_of_pair

SYSTEM_KEYS = ("system", "system_message", "system_prompt")
LEARN_KEYS = ("train", "weight", "loss")  # of a turn: whether it is learned
SHOWN_CHARACTERS = 60  # of a key
DEEPEST = 64  # lists and objects within each other, of tools
# Recognises a row, and what is read of it beside SYSTEM_KEYS, LEARN_KEYS, tools and context.
FORMATS = {
    "src": ("src", "tgt", "label"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "input", "output", "history"),
}
_HARMLESS = """
    id idx index uid uuid guid hash md5 sha256 row_id qid question_id prompt_id conversation_id session_id turn
    source dataset dataset_name origin url link license author category categories topic subject domain
    task task_name task_type type tag tags keywords lang language locale split difficulty level
    score scores rating quality reward votes likes length tokens num_tokens token_count num_turns
    model model_name generator created created_at timestamp date time version meta metadata extra info comment
"""
HARMLESS = frozenset(_HARMLESS.split())


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def text(value: Any, name: str) -> str:
    """A string of a row.

    Raises:
        RowFault: it is none, or holds half a character.
    """
    if not isinstance(value, str):
        raise RowFault(f'"{name}" must be a string, found {kind(value)}')
    half = half_of_pair(value)
    if half is not None:  # "\\ud800" in JSON
        raise RowFault(f'"{name}" holds half of a surrogate pair at character {half}')
    return value


def system_of(raw: Mapping[str, Any]) -> str | None:
    """The system message that a row has beside its turns.

    Raises:
        RowFault: it has several different ones.
    """
    context = raw.get("context")
    named = [(key, raw.get(key)) for key in SYSTEM_KEYS]
    named.append(("context.system", context.get("system") if isinstance(context, dict) else None))
    found = {name: text(value, name) for name, value in named if value}
    if len(set(found.values())) > 1:
        raise RowFault(f"{' and '.join(found)} say different things; keep one of them")
    return next(iter(found.values()), None)


def is_learned(said: Mapping[str, Any], name: str, keys: tuple[str, ...] = LEARN_KEYS) -> bool:
    """Whether a turn or a row is learned: nothing of what it says about that is false or 0.

    Raises:
        RowFault: a value that means neither yes nor no.
    """
    values = {key: said[key] for key in keys if said.get(key) is not None}
    for key, value in values.items():
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise RowFault(f'"{name}{key}" must be true, false, 0 or 1, found {json.dumps(value)[:40]}')
    return all(values.values())


def row_is_learned(raw: Mapping[str, Any]) -> bool:
    """The same of a whole row, whose `loss` may also be a number that somebody has measured."""
    keys = LEARN_KEYS if isinstance(raw.get("loss"), bool) else ("train", "weight")
    return is_learned(raw, "", keys)


def flags_of(raw: Mapping[str, Any], answers: int) -> list[bool] | None:
    """`label` of a src/tgt row: for each answer 1 or 0; None if it says something else."""
    labels = raw.get("label")
    if not isinstance(labels, list) or len(labels) != answers or any(label not in (0, 1) for label in labels):
        return None
    return [bool(label) for label in labels]


def tools_of(raw: Mapping[str, Any]) -> list[Any] | None:
    """The functions that a row offers, a list or the JSON text of one; None if there are none.

    Raises:
        RowFault: they are nested too deeply, or hold half a character.
    """
    tools = raw.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            return None
    return checked(tools, "tools") if isinstance(tools, list) and tools else None


def checked(value: Any, name: str, depth: int = 0) -> Any:
    """A JSON value that a template may write.

    Raises:
        RowFault: it is nested too deeply, or holds half a character.
    """
    if depth > DEEPEST:
        raise RowFault(f'"{name}" is nested too deeply')
    if isinstance(value, str):
        text(value, name)
    for part in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        checked(part, name, depth + 1)
    return value


def ignored_of(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """What a valid row says that nobody reads, in words for the report."""
    form = next(key for key in FORMATS if key in raw)
    read = {*FORMATS[form], *SYSTEM_KEYS, "train", "weight", "tools", "context"}
    names = _left_out(raw, read | ({"loss"} if isinstance(raw.get("loss"), bool) else set()))
    if raw.get("tools") and tools_of(raw) is None:
        names.append("tools")
    context = raw.get("context")
    names += _left_out(context, {"system"}, "context.") if isinstance(context, dict) else ["context"] if context else []
    if form == "src" and raw.get("label") and flags_of(raw, len(_list(raw.get("tgt")))) is None:
        names.append("label")
    said = [f'"{name}" ignored' for name in names]
    said += [f'"{key}" other than 0 and 1 counts as 1' for key in ("train", "weight") if _between(raw.get(key))]
    for turn in raw[form] if form in ("messages", "conversations") else ():
        said += _ignored_of_turn(turn, form)
    return tuple(dict.fromkeys(said))


def _ignored_of_turn(turn: Mapping[str, Any], form: str) -> Iterator[str]:
    who, what = ("role", "content") if form == "messages" else ("from", "value")
    answers = turn[who] not in ("system", "developer", "user", "human", "tool")
    more = ("name", "tool_call_id") if turn[who] == "tool" else ("tool_calls", "reasoning_content") if answers else ()
    for name in _left_out(turn, {who, what, *LEARN_KEYS, *more}, f"{form}."):
        yield f'"{name}" ignored'
    for key in LEARN_KEYS:
        if answers and _between(turn.get(key)):
            yield f'"{form}.{key}" other than 0 and 1 counts as 1'
        if not answers and key != "weight" and turn.get(key):
            yield f'"{form}.{key}" ignored: only answers are learned'


def _left_out(said: Mapping[str, Any], read: set[str], place: str = "") -> list[str]:
    """Names of keys with a value that are neither read nor harmless."""
    return [
        place + _shown(key)
        for key, value in said.items()
        if key not in read | HARMLESS and value not in (None, "", [], {})
    ]


def _shown(key: str) -> str:
    """A key as a line of a report can hold it."""
    key = " ".join(key.encode("utf-8", "backslashreplace").decode().split())
    return key if len(key) <= SHOWN_CHARACTERS else f"{key[:SHOWN_CHARACTERS]}..."


def _between(value: Any) -> bool:
    return isinstance(value, (int, float)) and value not in (0, 1)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
