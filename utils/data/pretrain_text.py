"""Plain text becomes JSON Lines: documents between separating lines, shuffled, one in each line."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from utils.checkpoints.files import atomic_file, staging_folder
from utils.data.pretrain_work import Progress, in_order, input_files
from utils.errors import UserError, raise_if

ENDING = ".jsonl"


@dataclass(frozen=True)
class TextOptions:
    """How text is read: the options of trans_to_json.py of the same names."""

    json_key: str = "text"
    doc_spliter: str = ""
    min_doc_length: int = 10
    no_merge: bool = False
    no_shuffle: bool = False
    workers: int = 1
    log_interval: int = 10_000
    seed: int = 42


@dataclass(frozen=True)
class Converted:
    """One input file as JSON Lines: where, how many documents, how many were too short, bytes read."""

    file: Path
    documents: int
    short: int
    size: int


def read_documents(file: Path, separator: str) -> Iterator[tuple[str, int]]:
    """The documents of a text file, and the bytes that each took; empty ones are left out.

    Raises:
        UserError: a line that is no UTF-8 text.
    """
    lines: list[str] = []
    size = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            size += len(line)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(f"{file} line {number}: is no UTF-8 text ({error.reason}); convert the file") from None
            if text.strip() != separator:
                lines.append(text)
                continue
            if document := "\n".join(lines).strip():
                yield document, size
                size = 0
            lines.clear()
    if document := "\n".join(lines).strip():
        yield document, size


def convert_file(
    file: Path, *, folder: Path, options: TextOptions, report: Callable[[int, int], None] | None = None
) -> Converted:
    """Writes the documents of one file as JSON Lines into `folder`, in their order."""
    descriptor, name = tempfile.mkstemp(ENDING, dir=folder)
    documents = short = 0
    with os.fdopen(descriptor, "w", encoding="utf-8") as target:
        for document, size in read_documents(file, options.doc_spliter.strip()):
            if len(document) < options.min_doc_length:
                short += 1
            else:
                documents += 1
                target.write(json.dumps({options.json_key: document}, ensure_ascii=False) + "\n")
            if report is not None:
                report(1, size)
    return Converted(Path(name), documents, short, file.stat().st_size)


def _nothing() -> None:
    """A worker needs no preparation."""


def trans_to_json(input_path: str, output_path: str, options: TextOptions) -> list[str]:
    """Converts a file or a folder; returns what was written, one line each.

    Each output appears whole or not at all. In memory is one document at a time, and 8 bytes for each in order
    to shuffle.

    Raises:
        UserError: no text, no document long enough, or an output that is an input or twice the same.
    """
    target = Path(output_path)
    root = Path(input_path) if Path(input_path).is_dir() else Path(input_path).parent

    def output_of(file: Path) -> Path:
        if options.no_merge:
            return target / ("_".join(file.relative_to(root).parts) + ENDING)
        return target.with_name(target.name + ENDING)

    files = input_files(input_path, lambda file: [output_of(file)])
    first = {output_of(file): file for file in reversed(files)}
    raise_if(
        [
            f"input_path {input_path}: {first[output_of(file)]} and {file} would both become {output_of(file)}; "
            "rename one of them"
            for file in files
            if options.no_merge and first[output_of(file)] != file
        ]
    )
    progress = Progress(sum(file.stat().st_size for file in files), options.log_interval)
    with staging_folder(target) as folder:
        work = partial(convert_file, folder=folder, options=options)
        found = []
        if options.workers == 1:
            found = [work(file, report=progress.add) for file in files]
        else:
            for one in in_order(work, files, options.workers, _nothing):
                progress.add(one.documents + one.short, one.size)
                found.append(one)
        if not any(one.documents for one in found):
            raise UserError(
                f"input_path {input_path}: holds no document of {options.min_doc_length} characters or more"
            )
        said = []
        if options.no_merge:
            for file, one in zip(files, found, strict=True):
                said.append(_write(output_of(file), [one], options))
        else:
            said.append(_write(output_of(files[0]), found, options))
    return said


def _write(target: Path, pieces: Sequence[Converted], options: TextOptions) -> str:
    """Joins pieces into one file, shuffled if the options want it; returns a line about it."""
    place = array("q", [0])
    with atomic_file(target) as output, tempfile.TemporaryFile(dir=target.parent) as joined:
        for piece in pieces:
            with piece.file.open("rb") as stream:
                for line in stream:
                    joined.write(line)
                    place.append(place[-1] + len(line))
        _copy(joined, output, np.frombuffer(place, dtype=np.int64), options)
    documents, short = sum(piece.documents for piece in pieces), sum(piece.short for piece in pieces)
    left = f"; {short:,} shorter than {options.min_doc_length} characters left out" if short else ""
    return f"{target}: {documents:,} documents, {place[-1] / 1e6:.2f} MB{left}"


def _copy(source: BinaryIO, target: BinaryIO, place: np.ndarray, options: TextOptions) -> None:
    order = np.arange(len(place) - 1)
    if not options.no_shuffle:
        np.random.default_rng(options.seed).shuffle(order)
    for number in order:
        source.seek(int(place[number]))
        target.write(source.read(int(place[number + 1] - place[number])))
