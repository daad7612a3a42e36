"""The file of answers of an unfinished run, without a model."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from full_disk import full_disk

from utils.errors import UserError
from utils.inference.journal import Journal


def test_journal_drops_a_torn_line_and_locks(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    journal = Journal(output, "key", {"seed": 1}, resume=True)
    journal.record(0, {"output": "zero"})
    journal.record(2, {"output": "zwei ü"})
    with pytest.raises(UserError, match="another run is writing"):
        Journal(output, "key", {"seed": 2}, resume=True)
    journal.close(remove=False)
    whole = journal.path.read_bytes()
    for torn in range(1, len('{"row": 2, "answer": {"output": "zwei ü"}}'.encode()) + 1):
        journal.path.write_bytes(whole)
        os.truncate(journal.path, len(whole) - torn)
        again = Journal(output, "key", {"seed": 2}, resume=True)
        assert again.facts == {"seed": 1} and again.answers == {0: {"output": "zero"}}
        again.record(2, {"output": "zwei ü"})
        again.close(remove=False)
        assert journal.path.read_bytes() == whole
    journal = Journal(output, "other", {"seed": 3}, resume=True)
    assert journal.other_run and journal.answers == {} and journal.facts == {"seed": 3}
    journal.close(remove=True)
    assert list(tmp_path.iterdir()) == []


def test_a_journal_on_a_full_disk(tmp_path: Path) -> None:
    """The error names the file, and what was recorded before stays."""
    output = tmp_path / "out.json"
    journal = Journal(output, "key", {"seed": 1}, resume=True)
    journal.record(0, {"output": "zero"})
    with full_disk(200):
        with pytest.raises(OSError) as full:
            journal.record(1, {"output": "x" * 1000})
        journal.close(remove=False)
    assert (full.value.errno, full.value.filename) == (errno.EFBIG, str(journal.path))
    again = Journal(output, "key", {"seed": 2}, resume=True)
    assert again.answers == {0: {"output": "zero"}}
    again.close(remove=True)
