"""Many trainings of the real scripts in one launch: starting several processes takes longer than a tiny run.

As a script it is a process of such a launch: python many_runs.py JOBS.json
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Job:
    """One run of a script.

    Attributes:
        words: the whole command line.
    """

    output: Path
    words: Sequence[str]
    script: str = "finetune_generation"

    @property
    def mark(self) -> Path:
        """Lies there once the run has ended well."""
        return self.output.with_name(f"{self.output.name}.done")


def launch_jobs(jobs: Sequence[Job], logs: Path, processes: int, cache: Path) -> str:
    """Runs all jobs, one after another, as so many processes; returns what they have printed.

    Raises:
        AssertionError: with the ends of the logs; jobs behind one that fails are run all the same.
    """
    left, faults, said = list(jobs), [], ""
    while left:
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
        listed = logs / "jobs.json"
        listed.write_text(json.dumps([[job.script, str(job.mark), list(job.words)] for job in left]), "utf-8")
        launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(processes), "--log_dir", str(logs)]
        done = subprocess.run(
            [sys.executable, "-u", *launcher, str(Path(__file__).resolve()), str(listed)],
            cwd=ROOT,
            env={**os.environ, "PADDLE_LLM_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=1200,
        )
        texts = [path.read_text("utf-8", "replace") for path in sorted(logs.glob("workerlog.*"))]
        said += "".join(texts)
        ended = [job for job in left if job.mark.is_file()]
        if done.returncode == 0 and len(ended) == len(left):
            break
        failed = next((job for job in left if not job.mark.is_file()), left[-1])
        faults.append(f"{failed.output}:\n" + "\n".join(text[-3000:] for text in texts) + done.stdout[-500:])
        left = [job for job in left if job not in ended and job != failed]
    assert not faults, "\n\n".join(faults)
    return said


def work(listed: Path) -> None:
    """Runs the jobs of a file in this process, over the connections of the first."""
    from utils import runtime

    runtime.prepare()
    import finetune_generation
    import run_pretrain
    from utils.errors import run_script
    from utils.parallel import process_group

    mains = {"finetune_generation": finetune_generation.main, "run_pretrain": run_pretrain.main}
    runtime.prepare = lambda **_: None  # once is enough
    connect, known = process_group.start, []

    def start_once(layout: Any, device: str) -> Any:
        if not known:
            known.append(connect(layout, device))
        [found] = known
        assert replace(layout, stage=0, virtual=1) == replace(found.layout, stage=0, virtual=1), "another layout"
        found.layout = layout
        return found

    process_group.start = start_once

    def main() -> None:
        for script, mark, words in json.loads(listed.read_text("utf-8")):
            sys.argv = [f"{script}.py", *words]
            try:
                mains[script]()
            except BaseException:
                traceback.print_exc()
                raise
            if known[0].first:
                Path(mark).write_text("")

    run_script(main)


def figures(output: Path) -> Iterator[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every step of a run."""
    state = json.loads((output / "trainer_state.json").read_text("utf-8"))
    for log in state["log_history"]:
        if "loss" in log:
            yield log["step"], log["loss"], log["grad_norm"]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
