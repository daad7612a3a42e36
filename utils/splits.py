"""Which files of a dataset folder are a split's: one home for what argument checks and readers ask. No Paddle."""

from __future__ import annotations

import os
from pathlib import Path

SUFFIXES = (".json", ".jsonl")  # both are read alike: JSON Lines, or one JSON array


def looks_like_path(name: str) -> bool:
    """Whether a name means a place on disk rather than something built in or on a hub."""
    return name.startswith((".", "/", "~")) or os.path.exists(name)


def split_files(folder: Path | str, split: str) -> list[Path]:
    """The files of one split: DIR/SPLIT.json and DIR/SPLIT.jsonl, else all in DIR/SPLIT/, in order of name."""
    folder = Path(folder).expanduser()
    single = [file for suffix in SUFFIXES if (file := folder / f"{split}{suffix}").is_file()]
    inside = folder / split
    if single or not inside.is_dir():
        return single
    named = (file for file in inside.iterdir() if file.suffix in SUFFIXES and not file.name.startswith("."))
    return sorted(file for file in named if file.is_file())
