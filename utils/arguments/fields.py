"""What one option is, and the base of the argument classes: values that know where they came from."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Option:
    """One option of a script: everything that the parser and `--help` know about it.

    Attributes:
        name: the key in a JSON file, and `--name` on the command line.
        kinds: the accepted types, of str, int, float, bool and list.
        optional: whether None (JSON null, or "none" on the command line) is a value.
        default: the value when the user gives none.
        help: one sentence for users.
        group: the heading in `--help`.
        choices: the accepted values, where only some are.
        refused: values of other toolchains that are no choices here, and why.
        minimum, maximum: bounds that belong to the range.
        above, below: bounds that do not.
        unit: of a number, for `--help`.
        needs: switches of which one must be on for this option to have an effect.
        path: whether the text names a file or folder, so that a leading ~ means the home folder.
        many: of a list, whether its items may be several words of the command line.
    """

    name: str
    kinds: tuple[type, ...]
    optional: bool
    default: Any
    help: str
    group: str
    choices: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    unit: str = ""
    needs: tuple[str, ...] = ()
    path: bool = False
    many: bool = False


def arg(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    refused: Mapping[str, str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    unit: str = "",
    needs: Sequence[str] = (),
    path: bool = False,
    many: bool = False,
) -> Any:
    """A dataclass field that carries an option's facts; see `Option` for what they mean."""
    facts = {
        "help": help,
        "choices": tuple(choices),
        "refused": dict(refused or {}),
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
        "unit": unit,
        "needs": tuple(needs),
        "path": path,
        "many": many,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=facts)
    return field(default=default, metadata=facts)


@dataclass
class Arguments:
    """Base of the argument classes of the scripts: flat dataclasses put together from groups.

    Class attributes that subclasses set:
        group: the heading in `--help` of the fields that the class itself declares.
        renamed: keys of earlier scripts and what they are called now.
        spellings: other spellings of keys, which nobody needs to hear about.
        foreign: options of another script that commands for it may bring along; they are read and do nothing.
        checks: functions that yield what contradicts itself or is missing, one message each.
        uses_device: whether `device` has an effect; else any is accepted, for older commands.

    Attributes:
        command: the script and its arguments as the user typed them.
    """

    group: ClassVar[str] = ""
    renamed: ClassVar[Mapping[str, str]] = {}
    spellings: ClassVar[Mapping[str, str]] = {}
    foreign: ClassVar[Mapping[str, Option]] = {}
    checks: ClassVar[tuple[Callable[[Any], Iterator[str]], ...]] = ()
    uses_device: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._origins: dict[str, str] = {}
        self.command = ""

    @property
    def provided(self) -> frozenset[str]:
        """The keys that the user wrote, in the JSON file or on the command line."""
        return frozenset(self._origins)

    def origin(self, key: str) -> str:
        """Where a value came from: "llama/lora_argument.json line 12", "--key" or "default"."""
        return self._origins.get(key, "default")

    def where(self, key: str) -> str:
        """A key, its value and its origin, for messages: `max_length 512 (--max_length)`."""
        return f"{key} {show(getattr(self, key))} ({self.origin(key)})"

    def set_from(self, key: str, value: Any, origin: str) -> None:
        """Sets a value that the user wrote at `origin`."""
        setattr(self, key, value)
        self._origins[key] = origin

    def to_json(self) -> dict[str, Any]:
        """All values by key, fit for json.dump; a file of them gives the same run again."""
        return dataclasses.asdict(self)

    def settle(self) -> list[str]:
        """Fills in the defaults that depend on other options; returns what the user should know."""
        return []


def show(value: Any) -> str:
    """A value as users write it in JSON: text without its quotes where that is clear."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return value if value and not set(value) & set(' \t\n"') else f'"{value}"'
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)


def options_of(cls: type[Arguments]) -> dict[str, Option]:
    """The options of an argument class by name, in the order of its groups."""
    hints = typing.get_type_hints(cls)
    found = {}
    for item in dataclasses.fields(cls):
        kinds, optional = _kinds(hints[item.name])
        default = item.default
        if default is dataclasses.MISSING and item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        home = next(base for base in cls.__mro__ if item.name in inspect.get_annotations(base))
        group = str(getattr(home, "group", ""))
        found[item.name] = Option(item.name, kinds, optional, default, group=group, **item.metadata)
    return found


def _kinds(hint: Any) -> tuple[tuple[type, ...], bool]:
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    parts = typing.get_args(hint) if union else (hint,)
    kinds = tuple(typing.get_origin(part) or part for part in parts if part is not type(None))
    return kinds, type(None) in parts
