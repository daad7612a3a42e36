"""What a `Service` is asked to do, and these commands as JSON: they cross from process to process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from utils.inference.grammar import Grammar
from utils.inference.sampling import SamplingOptions


@dataclass(frozen=True)
class Submit:
    """Answer a prompt.

    Attributes:
        key: what news of the answer are marked with; of no other request that is still unanswered.
        model: served name.
        prompt: token ids.
        options, number, stream: see `Scheduler.submit`.
    """

    key: int
    model: str
    prompt: Sequence[int]
    options: SamplingOptions
    number: int = 0
    stream: bool = False


@dataclass(frozen=True)
class Cancel:
    """Forget a request; one that is complete, or was never made, is fine."""

    key: int


@dataclass(frozen=True)
class Embed:
    """Give a vector for each prompt (token ids)."""

    key: int
    model: str
    prompts: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Stop:
    """Forget all requests and take no more."""


Command = Submit | Cancel | Embed | Stop
_KINDS: dict[str, type[Command]] = {"submit": Submit, "cancel": Cancel, "embed": Embed, "stop": Stop}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def to_json(command: Command) -> list[Any]:
    """A command as a JSON value."""
    values = [getattr(command, field.name) for field in fields(command)]
    return [
        _NAMES[type(command)],
        *(_options(value) if isinstance(value, SamplingOptions) else value for value in values),
    ]


def from_json(value: Sequence[Any]) -> Command:
    """The command that `to_json` has written.

    Raises:
        UserError: sampling options out of range.
    """
    name, *values = value
    kind: Any = _KINDS[name]
    command: Command = kind(*(_read_options(one) if isinstance(one, dict) else one for one in values))
    return command


def _options(options: SamplingOptions) -> dict[str, Any]:
    """Those that are not as by default."""
    found = {field.name: getattr(options, field.name) for field in fields(options)}
    found = {name: value for name, value in found.items() if value != getattr(_DEFAULT, name)}
    if (grammar := found.get("grammar")) is not None:
        found["grammar"] = [grammar.kind, grammar.text]
    return found


def _read_options(value: dict[str, Any]) -> SamplingOptions:
    found = {name: _tuples(one) for name, one in value.items()}
    if "grammar" in found:
        found["grammar"] = Grammar(*found["grammar"])
    return SamplingOptions(**found)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


_DEFAULT = SamplingOptions()
