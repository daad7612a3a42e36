"""Answers that survive an interrupted run: one line each, beside the output file until it is written."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.checkpoints.files import json_bytes
from utils.errors import UserError
from utils.paths import PARTIAL

_START = b'{"key": "'  # of the file; a killed process may have left less


class Answers:
    """The answers of one run so far, of a process that does not write them.

    Attributes:
        path: where another process may write them; links are followed.
        answers, facts, other_run: as of `Journal`.
    """

    def __init__(self, output: Path, answers: dict[int, dict[str, Any]], facts: dict[str, Any]) -> None:
        self.path = Path(os.path.realpath(output) + PARTIAL)
        self.answers, self.facts, self.other_run = answers, facts, False

    def record(self, row: int, answer: dict[str, Any]) -> None:
        self.answers[row] = answer

    def close(self, *, remove: bool) -> None:
        pass


class Journal(Answers):
    """The answers of one run so far.

    The file's first line names the run (`key`); every further line is one answer. It is locked while
    the run lasts, so that two runs cannot write the same output. A line that a killed process left
    half-written is dropped. What is there of another run stays until this one has its first answer, and a run
    without any leaves nothing.

    Attributes:
        answers: row number to what was recorded.
        facts: what the first run recorded about itself beside the key (the seed it drew).
        other_run: whether answers of another run were found, which the first answer of this one replaces.
    """

    def __init__(self, output: Path, key: str, facts: dict[str, Any], *, resume: bool) -> None:
        """
        Args:
            output: the file that the run will write in the end.
            key: identifies inputs and arguments; answers of another key are not taken.
            facts: JSON-able; recorded for those who continue.
            resume: False takes nothing of what is there.

        Raises:
            UserError: another process is writing the same output, or the file is none of a run.
        """
        super().__init__(output, {}, facts)
        self._file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"{output}: another run is writing it right now; wait for it, or give another --output_file"
            ) from None
        start = self._file.read(len(_START))
        if not start.startswith(_START[: len(start)]):
            self._file.close()
            raise UserError(
                f"{self.path}: holds something else, where answers are kept until all are there; move it away"
            )
        self._file.seek(0)
        lines = self._whole_lines()
        matches = bool(lines) and lines[0].get("key") == key
        self.other_run = len(lines) > 1 and not matches
        self._head: dict[str, Any] | None = None  # what the file is to begin with instead, once there is an answer
        if resume and matches:
            self.facts = lines[0]["facts"]
            self.answers = {line["row"]: line["answer"] for line in lines[1:]}
        else:
            self._head = {"key": key, "facts": facts}

    def record(self, row: int, answer: dict[str, Any]) -> None:
        """Adds one answer; it outlives the process from here on."""
        super().record(row, answer)
        if self._head is not None:
            self._file.seek(0)
            self._file.truncate()
            self._append(self._head)
            self._head = None
        self._append({"row": row, "answer": answer})

    def close(self, *, remove: bool) -> None:
        """Ends the run; `remove` once the output is written."""
        if remove or not os.fstat(self._file.fileno()).st_size:
            self.path.unlink(missing_ok=True)
        with suppress(OSError):  # of a line that could not be written
            self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json_bytes(line) + b"\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _whole_lines(self) -> list[dict[str, Any]]:
        """The lines that are complete; the file ends behind them afterwards."""
        lines, end = [], 0
        for line in self._file.read().splitlines(keepends=True):
            try:
                value = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(value, dict):
                break
            lines.append(value)
            end += len(line)
        self._file.seek(end)
        self._file.truncate()
        return lines
