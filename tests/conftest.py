"""What every test shares: an environment set up as the scripts set it up, and a cache of its own."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_processes import ServerProcess, server

from utils import runtime

ROOT = Path(__file__).resolve().parent.parent
SLOWEST = 10  # files told at the end
pytest_plugins = ["fake_sides"]

# Processes of pytest that run side by side have a thread each, one alone has two.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
runtime.prepare()


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A real server of a tiny model, shared by all tests: leave it as it was."""
    from tiny_models import write_tiny_llama

    folder = tmp_path_factory.mktemp("tiny_server")
    model = write_tiny_llama(folder / "model")
    with server(folder, "--model_name_or_path", model, "--served_model_name", "tiny") as running:
        yield running


@pytest.fixture(scope="session")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A real server of the embedded model, shared by all tests: leave it as it was."""
    folder = tmp_path_factory.mktemp("real_server")
    with server(folder, "--model_name_or_path", "smollm2-135m-instruct", "--inference_model") as running:
        yield running


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tells which files took longest, so that nobody has to wonder where the minutes of the suite go."""
    seconds: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):  # one for setup, call and teardown each
                seconds[report.nodeid.partition("::")[0]] += report.duration
    if len(seconds) > SLOWEST:
        terminalreporter.section(f"the {SLOWEST} slowest of {len(seconds)} files, {sum(seconds.values()):.0f} s")
        for file in sorted(seconds, key=lambda file: -seconds[file])[:SLOWEST]:
            terminalreporter.line(f"{seconds[file]:6.0f} s  {file}")
