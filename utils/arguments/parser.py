"""The strict parser of all scripts: a JSON file, the command line, and every fault at once."""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from utils import runtime
from utils.arguments import helptext, jsonfile, values
from utils.arguments.fields import Arguments, Option, options_of
from utils.errors import UserError, notice, raise_if

Run = TypeVar("Run", bound=Arguments)


@dataclass(frozen=True)
class Given:
    """One key with its value as the user wrote it: a JSON value, or a word of the command line."""

    key: str
    value: Any
    origin: str
    is_word: bool


class _Undecided(Exception):
    """A check looked at a key whose value could not be read, so it has nothing to say."""


class _View:
    """The arguments as the checks see them: keys that could not be read stop the check that asks."""

    def __init__(self, run: Arguments, broken: set[str]) -> None:
        self._run, self._broken = run, broken

    def __getattr__(self, name: str) -> Any:
        if name in self._broken:
            raise _Undecided
        return getattr(self._run, name)


def parse(cls: type[Run], argv: Sequence[str] | None = None, script: str = "") -> Run:
    """Reads the arguments of a script: `script.py [FILE.json] [--key value ...]`.

    The command line overrides the file. `--help` prints the options and leaves with exit code 0.

    Args:
        cls: the argument class of the script.
        argv: the words after the script's name; those of this process by default.
        script: the script's name, for messages and `--help`.

    Raises:
        UserError: everything that is wrong with the arguments, one message each.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        print(helptext.help_text(cls, script))
        raise SystemExit(0)
    options = options_of(cls)
    faults: list[str] = []
    file, line_given = _read_words(words, options, cls, faults)
    file_given: list[Given] = []
    broken: set[str] = set()
    if file is not None:
        try:
            origin = jsonfile.display(file) + " line {}"
            file_given = [
                Given(entry.key, entry.value, origin.format(entry.line), is_word=False)
                for entry in jsonfile.read_object(file)
            ]
        except UserError as error:
            faults.extend(error.faults)
            broken.update(options)  # what the file says of them is not known

    run = cls()
    run.command = shlex.join([script, *words])
    for source in (file_given, line_given):
        _take(run, source, options, script, faults, broken)
    notices = run.settle() + list(_without_effect(run, options))
    faults.extend(_check(run, broken))
    if "device" in options and cls.uses_device:
        explicit = "device" in run.provided
        try:
            if explicit or not faults:
                setattr(run, "device", runtime.check_device(getattr(run, "device"), explicit=explicit))  # noqa: B009, B010
        except UserError as error:
            place = run.origin("device")
            faults.extend(fault if place == "--device" else f"{place}: {fault}" for fault in error.faults)
    raise_if(faults)
    for text in notices:
        notice(text)
    return run


def _read_words(
    words: list[str], options: dict[str, Option], cls: type[Arguments], faults: list[str]
) -> tuple[str | None, list[Given]]:
    """The JSON file, if any, and the keys of the command line."""
    file: str | None = None
    given: list[Given] = []
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not word.startswith("--"):
            if file is None and not word.startswith("-"):
                file = word
            else:
                faults.append(f'unexpected "{word}" on the command line; options are written --key value')
            continue
        key, equals, value = word[2:].partition("=")
        key = cls.spellings.get(key, key)
        known = cls.renamed.get(key, key)
        option = options.get(known) or cls.foreign.get(known)
        following = words[at] if at < len(words) and not words[at].startswith("--") else None
        if equals:
            pass
        elif option is not None and bool in option.kinds and _stands_alone(following):
            value = "true"
        elif option is not None and option.many and not _stands_alone(following):
            end = next((place for place in range(at, len(words)) if _is_no_item(words[place])), len(words))
            value = ",".join(words[at:end])
            at = end
        elif following is not None:
            value = following
            at += 1
        elif option is not None:
            faults.append(f"--{key}: a value must follow it")
            continue
        given.append(Given(key, value, f"--{key}", is_word=True))
    return file, given


def _stands_alone(following: str | None) -> bool:
    """Whether a switch has no value: nothing follows it, or the JSON file does."""
    return following is None or following.endswith(".json")


def _is_no_item(word: str) -> bool:
    """Whether a word is none of the items of a list: it is the next option, or the JSON file."""
    return word.startswith("--") or word.endswith(".json")


def _take(
    run: Arguments,
    source: Sequence[Given],
    options: dict[str, Option],
    script: str,
    faults: list[str],
    broken: set[str],
) -> None:
    """Sets the values of one source (file or command line), in place, and collects its faults."""
    seen: dict[str, Given] = {}
    for given in source:
        key = run.renamed.get(given.key, given.key)
        option = options.get(key)
        if option is None and key in run.foreign:
            notice(f"{given.origin}: {key} has no effect here; it is an option of another script")
            continue
        if option is None:
            faults.append(f"{given.origin}: unknown key {given.key}{_nearest(given.key, options, script)}")
            continue
        if key in seen:
            faults.append(f"{given.origin}: {key} is given twice, before at {seen[key].origin}; keep one")
            continue
        seen[key] = given
        if key != given.key:
            notice(f"{given.origin}: {given.key} is now called {key}")
        try:
            read = values.from_text if given.is_word else values.from_json
            run.set_from(key, read(option, given.value), given.origin)
            broken.discard(key)
        except values.Misfit as misfit:
            named = given.origin if given.is_word else f"{given.origin}: {given.key}"
            faults.append(f"{named}: {misfit}")
            broken.add(key)


def _nearest(key: str, options: dict[str, Option], script: str) -> str:
    near = difflib.get_close_matches(key.replace("-", "_").lower(), options, 1, cutoff=0.7)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; python {script} --help lists the known ones" if script else ""


def _without_effect(run: Arguments, options: dict[str, Option]) -> Iterator[str]:
    """Options that the user set and that do nothing, because the switch they belong to is off."""
    for key in sorted(run.provided):
        option = options[key]
        changed = getattr(run, key) != option.default
        if option.needs and changed and not any(getattr(run, name) for name in option.needs):
            yield f"{run.origin(key)}: {key} has no effect without {' or '.join(option.needs)}"


def _check(run: Arguments, broken: set[str]) -> Iterator[str]:
    view: Any = _View(run, broken)
    for check in type(run).checks:
        try:
            yield from check(view)
        except _Undecided:
            continue
        except OSError as error:  # a folder that may not be listed
            yield f"{error.filename}: cannot be read ({error.strerror})"
