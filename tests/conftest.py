"""What every test shares: an environment set up as the scripts set it up, and a cache of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_cases import ServerProcess, serving_process

from utils import runtime

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("OMP_NUM_THREADS", "2")
runtime.prepare()


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A real server of a tiny model, shared by all tests: leave it as it was."""
    from tiny_models import write_tiny_llama

    folder = tmp_path_factory.mktemp("tiny_server")
    with serving_process(folder, write_tiny_llama(folder / "model"), "--served_model_name", "tiny") as server:
        yield server


@pytest.fixture(scope="session")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A real server of the embedded model, shared by all tests: leave it as it was."""
    folder = tmp_path_factory.mktemp("real_server")
    with serving_process(folder, "smollm2-135m-instruct", "--inference_model", "true") as server:
        yield server


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT
