"""Turns what the user wrote into a value of the declared type, or says what is wrong with it."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from typing import Any

from utils.arguments.fields import Option

TRUE_WORDS = ("true", "True", "TRUE", "1", "yes", "on")
FALSE_WORDS = ("false", "False", "FALSE", "0", "no", "off")
NONE_WORDS = ("none", "None", "null")
KIND_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list of texts",
}


class Misfit(Exception):
    """A value that an option does not accept; the message says what was expected and found."""


def from_json(option: Option, value: Any) -> Any:
    """The value of an option from a JSON value; nothing is converted but int to float.

    A text is taken for a list of texts, split at commas, as on the command line.

    Raises:
        Misfit: wrong type, out of range, or none of the choices.
    """
    if value is None or (value == "" and option.optional):
        if option.optional:
            return None
        raise Misfit(f"expected {_expected(option)}, found null")
    if value == "" and option.path:
        raise Misfit("expected a name, found an empty text")
    if isinstance(value, str) and _is_broken(value):
        raise Misfit(f"expected {_expected(option)}, found a character that no text or file name may hold")
    for kind in option.kinds:
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return _checked(option, value)
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return _checked(option, _finite(value))
        if kind is str and isinstance(value, str):
            return _checked(option, value)
        if kind is list and isinstance(value, list) and all(isinstance(item, str) for item in value):
            return _checked(option, list(value))
        if kind is list and isinstance(value, str):
            return _checked(option, _split(value))
    raise Misfit(f"expected {_expected(option)}, found {_described(value)}{_hint(option, value)}")


def from_text(option: Option, text: str) -> Any:
    """The value of an option from a word of the command line, read by the declared type.

    Raises:
        Misfit: as `from_json`.
    """
    if option.optional and (text in NONE_WORDS or text == ""):
        return None
    if text == "" and option.path:
        raise Misfit("expected a name, found an empty text")
    for kind in sorted(option.kinds, key=lambda kind: kind is str):  # text last: it accepts everything
        value = _read(kind, text)
        if value is not None:
            return _checked(option, value)
    raise Misfit(f'expected {_expected(option)}, found "{text}"')


def _is_broken(text: str) -> bool:
    """Whether a JSON text holds NUL or half of a surrogate pair."""
    return "\0" in text or any("\ud800" <= sign <= "\udfff" for sign in text)


def is_boolean_word(text: str) -> bool:
    """Whether a word of the command line is the value of a switch."""
    return text in TRUE_WORDS or text in FALSE_WORDS


def _read(kind: type, text: str) -> Any:
    if kind is bool:
        return text in TRUE_WORDS if is_boolean_word(text) else None
    if kind is int:
        return int(text) if re.fullmatch(r"[+-]?[0-9]{1,100}", text) else None
    if kind is float:
        number = re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text)
        return _finite(float(text)) if number else None
    return _split(text) if kind is list else text


def _split(text: str) -> list[str]:
    """The items of a list: a JSON list, or words with commas between them."""
    if text.startswith("["):
        try:
            items = json.loads(text)
        except ValueError as error:
            raise Misfit(f'expected a list such as a,b or ["a", "b"], found {text} ({error})') from None
        if not all(isinstance(item, str) for item in items):
            raise Misfit(f"expected a list of texts, found {text}")
        return list(items)
    return [item.strip() for item in text.split(",") if item.strip()]


def _finite(value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Misfit("expected a finite number")
    return number


def _checked(option: Option, value: Any) -> Any:
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str) and item in option.refused:
            raise Misfit(f'"{item}": {option.refused[item]}')
        if option.choices and isinstance(item, str) and item not in option.choices:
            near = {choice.lower(): choice for choice in option.choices}.get(item.lower()) or next(
                iter(difflib.get_close_matches(item, option.choices, 1)), None
            )
            guess = f"; did you mean {near}?" if near else ""
            raise Misfit(f'expected one of {choice_list(option)}, found "{item}"{guess}')
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        outside = (
            (option.minimum is not None and value < option.minimum)
            or (option.maximum is not None and value > option.maximum)
            or (option.above is not None and value <= option.above)
            or (option.below is not None and value >= option.below)
        )
        if outside:
            raise Misfit(f"expected {_expected(option)}, found {value}")
    if option.path and isinstance(value, str):
        return os.path.expanduser(value)
    return value


def choice_list(option: Option) -> str:
    """The choices of an option for messages and `--help`; the empty text is shown as ""."""
    return ", ".join(choice or '""' for choice in option.choices)


def value_range(option: Option) -> str:
    """The range of a number in words: "at least 1", "above 0 and at most 1"; empty without bounds."""
    bounds = (
        ("at least", option.minimum),
        ("above", option.above),
        ("at most", option.maximum),
        ("below", option.below),
    )
    return " and ".join(f"{word} {bound:.12g}" for word, bound in bounds if bound is not None)


def _expected(option: Option) -> str:
    if option.choices:
        return f"one of {choice_list(option)}"
    return " ".join([" or ".join(KIND_NAMES[kind] for kind in option.kinds), value_range(option)]).strip()


def _described(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'the text "{value}"'
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return str(value)


def _hint(option: Option, value: Any) -> str:
    """The next step where it is plain: the text between the quotes is what was meant."""
    if isinstance(value, float) and value.is_integer() and int in option.kinds:
        return f"; write {int(value)}"
    if not isinstance(value, str):
        return ""
    meant = [kind for kind in option.kinds if kind is not str and _reads(kind, value)]
    return f"; drop the quotes: {value.lower() if bool in meant else value}" if meant else ""


def _reads(kind: type, text: str) -> bool:
    try:
        return _read(kind, text) is not None
    except Misfit:
        return False
