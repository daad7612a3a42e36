"""Where the rows of a split come from: the files of a folder, or a dataset that PaddleNLP knows by name."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from utils import runtime
from utils.data.builtin import resolve_built_in
from utils.data.lines import Line, RowFault
from utils.data.rows import Row, read_rows, to_row
from utils.errors import UserError
from utils.splits import looks_like_path, split_files

# How the built-in datasets name question and answer.
BUILT_IN_KEYS = (("source", "target"), ("first", "second"), ("article", "highlights"))
BLOCK = 1 << 20


class Source(ABC):
    """The rows of one split.

    Attributes:
        name: for messages.
        limit: only so many leading rows are used; None for all.
    """

    name: str
    limit: int | None = None

    def rows(self) -> Iterator[Row]:
        """The rows; the same each time.

        Raises:
            UserError: a broken row.
        """
        return islice(self._all(), self.limit)

    @abstractmethod
    def _all(self) -> Iterator[Row]: ...

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 (hexadecimal) of the rows' contents."""

    @abstractmethod
    def total(self) -> int:
        """How many rows there are at most (blank lines may be counted); for a progress bar."""


class FileSource(Source):
    """JSON Lines files, in order."""

    def __init__(self, files: list[Path], limit: int | None) -> None:
        self.files = files
        self.limit = limit
        self.name = ", ".join(map(str, files))

    def _all(self) -> Iterator[Row]:
        return read_rows(self.files)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(os.fsencode(f"{file.absolute()}\0{file.stat().st_size}\0"))
            with file.open("rb") as stream:
                while block := stream.read(BLOCK):
                    digest.update(block)
        return digest.hexdigest()

    def total(self) -> int:
        count = 0
        for file in self.files:
            with file.open("rb") as stream:
                while block := stream.read(BLOCK):
                    count += block.count(b"\n")
        return count if self.limit is None else min(count, self.limit)


class BuiltInSource(Source):
    """Rows of a dataset of PaddleNLP's, which it downloads: the user has asked for it by name."""

    def __init__(self, name: str, rows: list[Mapping[str, Any]], limit: int | None) -> None:
        self.name = name
        self.limit = limit
        self._rows = rows

    def _all(self) -> Iterator[Row]:
        for number, raw in enumerate(self._rows, 1):
            line = Line(number, _with_known_keys(dict(raw)))
            try:
                yield to_row(line, Path(self.name))
            except RowFault as fault:
                raise UserError(f"built-in dataset {self.name}, row {number}: {fault}") from None

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.name.encode())
        for raw in self._rows:
            digest.update(json.dumps(raw, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def total(self) -> int:
        return len(self._rows) if self.limit is None else min(len(self._rows), self.limit)


def _with_known_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """Renames what a built-in dataset calls question and answer to src and tgt."""
    if "src" in raw or "instruction" in raw:
        return raw
    for question, answer in BUILT_IN_KEYS:
        if isinstance(raw.get(question), str) and isinstance(raw.get(answer), str):
            # The couplets separate their characters by a control character.
            return {"src": raw[question].replace("\x02", ""), "tgt": raw[answer].replace("\x02", "")}
    return raw


def _load_built_in(name: str, task: str | None, split: str, limit: int | None) -> BuiltInSource:
    known_as = resolve_built_in(name)  # before the slow import, which an unknown name need not wait for
    runtime.load_library()
    from paddlenlp.datasets import load_dataset

    try:
        loaded = load_dataset(known_as, name=task, splits=split, lazy=False)
    except Exception as error:  # whatever a download or PaddleNLP's reader raises
        which = f"{name}/{task}" if task else name
        raise UserError(
            f"built-in dataset {which}, split {split}: could not be loaded ({error}). PaddleNLP "
            "downloads it; without network, put train.json and dev.json into a folder and name that folder"
        ) from None
    return BuiltInSource(f"{name}/{split}", list(loaded), limit)


def find_source(name: str, task: str | None, split: str, limit: int | None = None) -> Source:
    """The rows of one split of a dataset.

    Args:
        name: `dataset_name_or_path`.
        task: `task_name`, the task within a built-in dataset.
        split: "train", "dev", "test", or "quant", which is the training set if there is no file for it.
        limit: use so many rows at most.

    Raises:
        UserError: the split is missing, or a built-in dataset cannot be had.
    """
    if not looks_like_path(name):
        return _load_built_in(name, task, "train" if split == "quant" else split, limit)
    folder = Path(name).expanduser()
    files = split_files(folder, split)
    if not files and split == "quant":
        files = split_files(folder, "train")
    if not files:
        raise UserError(f"{folder}: {split}.json (or {split}/*.json) is missing")
    return FileSource(files, limit)
