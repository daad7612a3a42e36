"""Copies of a tiny checkpoint with something changed, and what loading says of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from utils.checkpoints import locate
from utils.checkpoints.load import load_model
from utils.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"


def tiny_copy(folder: Path, **config: Any) -> Path:
    """llama_tiny with some fields of its config.json replaced."""
    shutil.copytree(FIXTURES / "llama_tiny", folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **config}))
    return folder


def faults(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(locate(folder), "float32")
    return "\n".join(caught.value.faults)
