"""The processes of benchmarks/inference.py: all sides alive at once, measured in turn, one at a time.

A shared machine changes its speed for minutes. Measurements that are compared must therefore lie within seconds of
each other, so every side waits, loaded, for its turn; inference_protocol.py is what it does in there.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from inference_report import LABELS, Round

from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SETTLE = 0.3  # seconds; the threads of OpenMP look for more work for 0.2 s before they sleep
LAST_WORDS = 15  # lines shown of what a failed process said
SECONDS = {  # expected of one side; only for how long is left, and corrected by what the steps before took
    "start": 4.5,
    "warm_up": 2.5,
    "prefill": 1.3,
    "first_token": 0.4,
    "decode_1": 3.8,
    "decode_8": 7.0,
    "growth": 3.5,  # for 1,024 tokens
    "end": 0.3,
}

Command = Mapping[str, Any]  # such as {"measure": "decode_1", "prompt": 0}


def end_of(text: str) -> str:
    return "\n".join(text.splitlines()[-LAST_WORDS:])


def run_child(command: Sequence[str], label: str, environment: Mapping[str, str]) -> str:
    """Runs a process to its end and returns what it printed. `label`: what it is, for people.

    Raises:
        UserError: it failed; with the end of what it said.
    """
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{label} ended with exit code {done.returncode}; it said:\n{end_of(done.stderr)}")
    return done.stdout


class Side:
    """A process that measures one side on command; as a context manager it never outlives the block."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name, self.asked = name, "its first answer"
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - a file never blocks the writer; closed by `__exit__`
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            encoding="utf-8",
        )

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(OSError):  # what could not be written to it any more
                if stream is not None:
                    stream.close()

    def read(self) -> dict[str, Any]:
        """The next answer, once the process has come to rest.

        Raises:
            UserError: the process ended or said something else.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        with contextlib.suppress(json.JSONDecodeError):
            answer = json.loads(line)
            if isinstance(answer, dict):
                time.sleep(SETTLE)
                return answer
        raise self.fault(f"printed {line.strip()[:200]!r}" if line else "")

    def ask(self, command: Command) -> dict[str, Any]:
        """The answer to a command.

        Raises:
            UserError: the process ended or said something else.
        """
        assert self.process.stdin is not None
        self.asked = str(command.get("measure", "its peak memory"))
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise self.fault("") from error
        return self.read()

    def finish(self) -> int:
        """Ends the process; its peak memory in bytes.

        Raises:
            UserError: it failed even now.
        """
        peak: int = self.ask({"end": True})["peak"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self.process.wait(timeout=30) == 0:
                return peak
        raise self.fault("")

    def fault(self, instead: str) -> UserError:
        """What to raise where an answer was expected: what came `instead`, by default the end of the process."""
        if not instead:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10)
            code = self.process.poll()
            instead = "stopped answering" if code is None else f"ended with exit code {code}"
        self.errors.seek(0)
        said = end_of(self.errors.read().decode("utf-8", errors="replace")) or "(nothing)"
        return UserError(
            f"{LABELS[self.name]}: expected a line of JSON with {self.asked}, but the process {instead}. What it said "
            f"last tells what to mend (--corners leaves a corner out):\n{said}"
        )


class Progress:
    """Lines that say which step comes and how long all that is left will take."""

    def __init__(self, steps: Sequence[tuple[str, float]]) -> None:
        """steps: what each one is, and the seconds that are expected of it."""
        self.steps, self.number, self.started = steps, 0, time.monotonic()

    def next(self) -> None:
        expected = sum(seconds for _, seconds in self.steps[: self.number])
        pace = (time.monotonic() - self.started) / expected if expected else 1.0
        left = pace * sum(seconds for _, seconds in self.steps[self.number :])
        what, _ = self.steps[self.number]
        self.number += 1
        print(f"[{self.number}/{len(self.steps)}] {what} (about {left:.0f} s left)", flush=True)


def key_of(command: Command) -> str:
    """The name under which the values of a command are kept: the figure, or the context of a growth curve."""
    return str(command["context"]) if command["measure"] == "growth" else str(command["measure"])


def steps_of(sides: int, rounds: int, plan: Sequence[Command]) -> list[tuple[str, float]]:
    """What `in_turn` does, step by step, with the seconds that are expected of all sides together."""
    steps = []
    for turn in range(1, rounds + 1):
        parts = [("starting", SECONDS["start"])]
        for command in plan:
            what, context = str(command["measure"]), command.get("context")
            name = f"growth at {context}" if context else what.replace("_", " ")
            parts.append((name, SECONDS[what] * (context / 1024 if context else 1)))
        for name, seconds in [*parts, ("ending", SECONDS["end"])]:
            steps.append((f"round {turn} of {rounds}, {name}, {sides} sides", seconds * sides))
    return steps


def in_turn(
    commands: Mapping[str, Sequence[str]], rounds: int, plan: Sequence[Command], environment: Mapping[str, str]
) -> dict[str, list[Round]]:
    """What every side (its `commands` start it) measures in every round: fresh processes, all alive at once.

    Each command of the plan goes round the sides before the next one; every other time in reverse order, so that no
    side always goes first.
    """
    found: dict[str, list[Round]] = {side: [] for side in commands}
    progress = Progress(steps_of(len(commands), rounds, plan))
    for turn in range(rounds):
        names = list(commands)
        orders = [names, names[::-1]] if turn % 2 == 0 else [names[::-1], names]
        with contextlib.ExitStack() as stack:
            progress.next()
            alive: dict[str, Side] = {}
            for name in orders[0]:
                side = alive[name] = stack.enter_context(Side(name, commands[name], environment))
                ready = side.read()
                cold = ready["first_token_at"] - side.started  # on the clock that all processes share
                found[name].append({"values": {"cold_start": [cold]}, "answers": {}, "versions": ready["versions"]})
            for number, command in enumerate(plan):
                progress.next()
                for name in orders[number % 2]:
                    keep(found[name][-1], command, alive[name].ask(command))
            progress.next()
            for name, side in alive.items():
                found[name][-1]["values"]["peak"] = [side.finish()]
    return found


def keep(measured: Round, command: Command, answer: Mapping[str, Any]) -> None:
    """Adds an answer to a round. A warm-up has no value, and only decoding has answers of the model."""
    if "value" in answer:
        measured["values"].setdefault(key_of(command), []).append(answer["value"])
    if "answers" in answer:
        measured["answers"].setdefault(key_of(command), []).append(answer["answers"])


def libraries_alone(python: str, imports: str, label: str) -> int:
    """Peak memory of a process that imports a side's libraries and does nothing else."""
    code = f"{imports}; from inference_protocol import peak_memory; print(peak_memory())"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent)}
    return int(run_child([python, "-c", code], label, environment).split()[-1])
