"""Runs scripts of one version, each in a process of its own: python tools/versions/worker.py, in the version's folder.

Each line of standard input is a job in JSON; each line of standard output tells that one has ended. A job's process is
a fork of this one, which has loaded the libraries: they take five seconds, most jobs on a tiny model take one.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import sys
from typing import Any

PAUSE = 0.02  # seconds between looks at what has ended
SKIPPED = ("utils.serving",)  # no job serves


def load() -> None:
    """Imports what the scripts will need. What a version imports late, it imports late here too."""
    from utils import runtime

    runtime.prepare()
    getattr(runtime, "load_library", runtime.load_paddle)()
    for module in pkgutil.walk_packages(["utils"], "utils."):
        if not module.name.startswith(SKIPPED):
            with contextlib.suppress(Exception):  # the job that needs it will say so
                importlib.import_module(module.name)
    runtime.prepare = lambda **_: None  # it is done, and refuses to come after Paddle


def next_job() -> dict[str, Any]:
    """Starts jobs until the input ends; returns only in the process of a job, with that job."""
    running: dict[int, int] = {}  # process -> the number of its job
    waiting = b""
    while True:
        if select.select([0], [], [], PAUSE)[0]:
            read = os.read(0, 1 << 16)
            if not read:
                for process in running:
                    os.kill(process, signal.SIGKILL)
                os._exit(0)
            *lines, waiting = (waiting + read).split(b"\n")
            for line in lines:
                job = json.loads(line)
                process = os.fork()
                if process == 0:
                    return job
                running[process] = job["number"]
        while running:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                break
            ended = {"number": running.pop(process), "code": os.waitstatus_to_exitcode(status)}
            os.write(1, json.dumps(ended).encode() + b"\n")


def run(job: dict[str, Any]) -> None:
    """The script as Python would run it. Its alarm ends it when its time is over."""
    os.environ.update(job["environment"])
    for path, flags, target in ((os.devnull, os.O_RDONLY, [0]), (job["log"], os.O_WRONLY | os.O_CREAT, [1, 2])):
        opened = os.open(path, flags)
        for number in target:
            os.dup2(opened, number)
        os.close(opened)
    signal.alarm(job["seconds"])
    sys.argv = [job["script"], *job["words"]]
    runpy.run_path(job["script"], run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    load()
    os.write(1, b'{"ready": true}\n')
    run(next_job())
