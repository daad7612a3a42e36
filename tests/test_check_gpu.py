"""The tool that checks a GPU, on a CPU."""

from __future__ import annotations

import re
import subprocess
import sys

from tiny_runs import ROOT


def test_what_a_gpu_computes_agrees_with_float32_on_a_cpu() -> None:
    command = [sys.executable, "tools/check_gpu.py", "--device", "cpu", "--short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == "6 of 6 agree" and all(line.endswith("  agrees") for line in lines)
    errors = [float(found) for found in re.findall(r"within (\S+) of", done.stdout)]
    assert len(errors) == 2 and min(errors) > 0  # half precision is not float32
