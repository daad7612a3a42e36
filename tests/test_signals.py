"""Signals end a process in order, whatever it is doing."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TAKE = "import os, signal, sys\nfrom utils import signals\nsignals.take()\n"


def run(code: str, root: Path, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", TAKE + code]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "Ctrl-C"),
        (signal.SIGTERM, 143, "SIGTERM"),
        (signal.SIGHUP, 129, "SIGHUP"),
    ],
)
def test_no_library_can_swallow_a_signal(number: signal.Signals, code: int, said: str, root: Path) -> None:
    done = run(f"try:\n    signal.raise_signal({int(number)})\nexcept:\n    pass\nprint('went on')", root)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"note: ended by {said}\n")


def test_what_is_half_written_is_removed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old").write_text("old")
    code = f"""
from pathlib import Path
from utils.checkpoints.files import atomic_directory, atomic_file
home = Path({str(tmp_path)!r})
with atomic_directory(home / "kept") as folder, atomic_file(home / "file") as file:
    (folder / "new").write_text("new")
    file.write(b"new")
    signal.raise_signal(signal.SIGTERM)
"""
    done = run(code, root)
    assert done.returncode == 143, done.stderr
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["kept", "kept/old"]


def test_no_thread_of_numpy_takes_a_signal_while_paddle_may_replace_its_handler(root: Path) -> None:
    code = """
import numpy  # starts a thread on each processor
with signals.kept(signal.SIGTERM):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)  # the process, not this thread
print("went on")
"""
    done = run(code, root, env={**os.environ, "OPENBLAS_NUM_THREADS": "4"})
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "note: ended by SIGTERM\n")


def test_nohup_is_heeded(root: Path) -> None:
    code = "signal.raise_signal(signal.SIGHUP)\nprint('went on')"
    ignoring = f"import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n{TAKE}{code}"
    done = subprocess.run([sys.executable, "-c", ignoring], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr


def test_a_forked_process_leaves_ctrl_c_to_its_parent(root: Path) -> None:
    code = """
child = os.fork()
if child == 0:
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), flush=True)
signal.raise_signal(signal.SIGINT)
"""
    done = run(code, root)
    assert (done.returncode, done.stdout, done.stderr) == (130, "-15\n", "note: ended by Ctrl-C\n")


def test_output_that_nobody_reads_ends_the_process_in_order(root: Path, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from utils.checkpoints.files import atomic_directory
with atomic_directory(Path({str(tmp_path / "folder")!r})) as folder:
    try:
        while True:
            print("a line" * 1000, flush=True)
    except:
        pass
"""
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE + code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()  # type: ignore[union-attr]
    process.stdout.close()  # type: ignore[union-attr]
    err = process.stderr.read()  # type: ignore[union-attr]
    assert (process.wait(60), err) == (141, "")
    assert not list(tmp_path.iterdir())


def test_every_script_takes_signals_before_it_imports_anything_slow(root: Path) -> None:
    scripts = [*root.glob("*.py"), *(root / "data" / "tools").glob("*.py"), root / "utils/checkpoints/convert_peft.py"]
    assert len(scripts) == 10
    for path in scripts:
        imports = []
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.If):
                assert ast.unparse(node) == "if __name__ == '__main__':\n    signals.take()", path
                break
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("utils"):
                imports.append(ast.unparse(node))
        assert imports in (["from utils import signals"], ["from utils import runtime, signals"]), path
