"""The text of --help: every option with its type, default, range and unit, by topic."""

from __future__ import annotations

import shutil
import textwrap

from utils.arguments.fields import Arguments, Option, options_of, show
from utils.arguments.values import choice_list, value_range

PLACEHOLDERS = {str: "TEXT", int: "N", float: "X", bool: "true|false", list: "A,B"}
INDENT = " " * 4


def help_text(cls: type[Arguments], script: str) -> str:
    """What `script --help` prints."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    lines = [f"usage: python {script} [FILE.json] [--key value ...]", ""]
    lines += textwrap.wrap((cls.__doc__ or "").strip(), width)
    lines += textwrap.wrap(
        "Arguments come from a JSON file (one flat object), the command line, or both; the command line "
        "wins. A switch may stand alone: --key means --key true.",
        width,
    )
    group = ""
    for option in options_of(cls).values():
        if option.group != group:
            group = option.group
            lines += ["", f"{group}:"]
        kind = "|".join(PLACEHOLDERS[kind] for kind in option.kinds)
        lines.append(f"  --{option.name} {kind}")
        lines += textwrap.wrap(_sentence(option), width, initial_indent=INDENT, subsequent_indent=INDENT)
    return "\n".join(lines)


def _sentence(option: Option) -> str:
    facts = []
    if option.choices:
        facts.append(f"one of {choice_list(option)}")
    if value_range(option):
        facts.append(value_range(option))
    if option.unit:
        facts.append(f"in {option.unit}")
    if option.default is not None and option.default != []:
        facts.append(f"default {show(option.default)}")
    if option.needs:
        facts.append(f"with {' or '.join(option.needs)}")
    return f"{option.help} ({'; '.join(facts)})" if facts else option.help
