"""Runs of the real scripts as several processes, by Paddle's own launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tiny_runs import ROOT, Result, Tiny


@dataclass
class Launched:
    """A run under way.

    Attributes:
        logs: the folder of the launcher's log files, one per rank.
    """

    process: subprocess.Popen[str]
    output: Path
    logs: Path

    def log(self, rank: int) -> str:
        """What a rank has printed."""
        path = self.logs / f"workerlog.{rank}"
        return path.read_text("utf-8", errors="replace") if path.exists() else ""

    def worker(self, rank: int) -> int:
        """The process number of a rank."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"PADDLE_LOG_DIR={self.logs}".encode() in words and f"PADDLE_TRAINER_ID={rank}".encode() in words:
                return int(folder.name)
        raise ProcessLookupError(f"no rank {rank}")

    def wait(self, seconds: float = 120) -> Result:
        """The end of the run: exit code of the launcher, its output, and that of all ranks as `err`."""
        try:
            out, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.communicate()
            raise
        said = "".join(self.log(rank) for rank in range(8))
        return Result(self.output, self.process.returncode, out, said)


def start_launched(
    tiny: Tiny,
    output: Path,
    *options: object,
    processes: int = 2,
    script: str = "finetune_generation.py",
    words: Sequence[str] | None = None,
) -> Launched:
    """Starts a script as several processes; the launcher finds free ports by itself.

    Args:
        options: after those of `Tiny.arguments`.
        words: the whole command line of the script instead.
    """
    logs = output.parent / f"{output.name}_logs"
    launcher = [sys.executable, "-u", "-m", "paddle.distributed.launch"]
    launcher += ["--nproc_per_node", str(processes), "--log_dir", str(logs), "--log_overwrite", "true"]
    words = tiny.arguments(output, options) if words is None else words
    environment = {**os.environ, **tiny.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*launcher, str(script), *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Launched(process, output, logs)


def launch(tiny: Tiny, output: Path, *options: object, processes: int = 2, expect: int = 0) -> Result:
    """finetune_generation.py as several processes, to its end."""
    result = start_launched(tiny, output, *options, processes=processes).wait()
    assert result.code == expect, result.out + result.err
    return result
