"""What a script says and returns when it cannot go on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
from pathlib import Path
from utils.checkpoints.files import atomic_write
from utils.errors import run_script

def main():
    {main}

run_script(main)
"""


@pytest.mark.parametrize(
    ("main", "output", "error"),
    [
        ("atomic_write(Path('/dev/full'), 'x')", "", "/dev/full: No space left on device"),
        ("Path('nowhere/a').read_text()", "", "nowhere/a: No such file or directory"),
        ("print('a line')", "/dev/full", "No space left on device"),
    ],
)
def test_an_error_of_the_file_system_is_one_line(main: str, output: str, error: str, root: Path) -> None:
    with open(output or os.devnull, "w") as file:
        done = subprocess.run(
            [sys.executable, "-c", CODE.format(main=main)], cwd=root, stdout=file, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (2, f"error: {error}\n")


@pytest.mark.parametrize("error", ["OSError('an operator failed')", "ConnectionResetError(104, 'reset')"])
def test_what_is_no_error_of_the_file_system_keeps_its_traceback(error: str, root: Path) -> None:
    """Paddle makes an OSError of whatever goes wrong in a backward pass."""
    code = CODE.format(main=f"raise {error}")
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and "error: " not in done.stderr


def test_names_that_no_terminal_can_show(root: Path) -> None:
    code = CODE.format(main="print('written to', sys.argv[1])")
    command = [os.fsencode(sys.executable), b"-c", code.encode(), b"caf\xe9"]
    done = subprocess.run(command, cwd=root, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"written to caf\\udce9\n", b"")
