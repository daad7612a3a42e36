"""What every test shares: an environment set up as the scripts set it up, and a cache of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from utils import runtime

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("OMP_NUM_THREADS", "2")
runtime.prepare()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT
