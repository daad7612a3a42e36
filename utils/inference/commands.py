"""What a `Service` is asked to do, and these commands as JSON: they cross from process to process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from utils.inference.grammar import Grammar
from utils.inference.sampling import SamplingOptions


@dataclass(frozen=True)
class Job:
    """One answer that is wanted. Of n answers to one prompt each is a job, with numbers from 0.

    Attributes:
        model: served name; of the base or of an adapter.
        prompt: token ids.
        options: how to answer.
        number: what the random numbers depend on beside the seed.
        stream: whether text is wanted before the answer is complete.
    """

    model: str
    prompt: Sequence[int]
    options: SamplingOptions
    number: int = 0
    stream: bool = False

    @property
    def prompts(self) -> list[Sequence[int]]:
        return [self.prompt]


@dataclass(frozen=True)
class EmbedJob:
    """Vectors that are wanted, one for each prompt (token ids); to a queue they are one answer."""

    model: str
    prompts: Sequence[Sequence[int]]
    number: ClassVar[int] = 0
    stream: ClassVar[bool] = False


AnyJob = Job | EmbedJob


@dataclass(frozen=True)
class Submit:
    """Do a job.

    Attributes:
        key: what its news are marked with; of no other job that is still undone.
    """

    key: int
    job: AnyJob


@dataclass(frozen=True)
class Cancel:
    """Forget a job; one that is complete, or was never given, is fine."""

    key: int


@dataclass(frozen=True)
class Stop:
    """Forget all jobs and take no more."""


Command = Submit | Cancel | Stop


def to_json(command: Command) -> list[Any]:
    """A command as a JSON value."""
    match command:
        case Submit(key, job):
            values = [getattr(job, field.name) for field in fields(job)]
            written = [_options(value) if isinstance(value, SamplingOptions) else value for value in values]
            return ["answer" if isinstance(job, Job) else "embed", key, *written]
        case Cancel(key):
            return ["cancel", key]
        case Stop():
            return ["stop"]


def from_json(value: Sequence[Any]) -> Command:
    """The command that `to_json` has written.

    Raises:
        UserError: sampling options out of range.
        ValueError: no command.
    """
    match value:
        case ["answer", key, model, prompt, options, *rest]:
            return Submit(key, Job(model, prompt, _read_options(options), *rest))
        case ["embed", key, *values]:
            return Submit(key, EmbedJob(*values))
        case ["cancel", key]:
            return Cancel(key)
        case ["stop"]:
            return Stop()
    raise ValueError(f"no command: {value!r:.80}")


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
