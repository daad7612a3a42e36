"""The dataset of a split: tokenized once, kept in a cache, packed if the run asks for it."""

from __future__ import annotations

import hashlib
import json
import signal
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from utils import signals
from utils.checkpoints.files import atomic_directory, cache_root, is_complete, json_bytes
from utils.data.encode import DataReport, Dropped, encode_row
from utils.data.packing import best_fit, efficiency
from utils.data.rows import SHOWN_FAULTS, Row
from utils.data.sources import FileSource, Source, find_source
from utils.data.template import ChatTemplate
from utils.errors import UserError, notice, raise_if, reason

if TYPE_CHECKING:
    from utils.data.stream import StreamDataset
    from utils.families.tokenizers import Tokenizer
    from utils.parallel.process_group import ProcessGroup

FORMAT_VERSION = 2  # of the cached arrays and of how rows become ids; a change makes old entries unused
BAR_DELAY = 2.0  # seconds before a progress bar appears


class DataOptions(Protocol):
    """The arguments that this module reads."""

    dataset_name_or_path: str | None
    task_name: str | None
    intokens: bool
    lazy: bool
    src_length: int
    max_length: int
    max_train_samples: int | None
    max_eval_samples: int | None
    eval_with_do_generation: bool
    seed: int
    disable_tqdm: bool


@dataclass(frozen=True)
class Tokenized:
    """All examples of a split, one after another.

    Attributes:
        input_ids, labels: int32 [tokens].
        offsets: int64 [examples + 1]; example i is the tokens from offsets[i] to offsets[i + 1].
        report: what became of the rows.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    report: DataReport

    def save(self, folder: Path) -> None:
        for name in ("input_ids", "labels", "offsets"):
            np.save(folder / f"{name}.npy", getattr(self, name))
        (folder / "report.json").write_bytes(json_bytes(self.report.to_json()))

    @classmethod
    def load(cls, folder: Path) -> Tokenized:
        """Reads what `save` wrote; the arrays stay on disk (memory-mapped)."""
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("input_ids", "labels", "offsets")]
        report = DataReport.from_json(json.loads((folder / "report.json").read_text("utf-8")))
        return cls(arrays[0], arrays[1], arrays[2], report)


class SupervisedDataset:
    """Examples, or packs of them, by number; any loader can read it.

    Attributes:
        report: what became of the rows.
        capacity: tokens of a pack, None if not packed.
        lengths: int64 [len(self)], the tokens of each item.
    """

    def __init__(self, tokenized: Tokenized, capacity: int | None = None) -> None:
        self._tokenized = tokenized
        self.report = tokenized.report
        self.capacity = capacity
        sizes = np.diff(tokenized.offsets)
        self._packs = None if capacity is None else best_fit(sizes, capacity)
        if self._packs is None:
            self.lengths = sizes
        else:
            self.lengths = np.array([sizes[pack].sum() for pack in self._packs], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """`input_ids` and `labels`, int32 [n]; if packed also `lengths`, the tokens of each segment."""
        if self._packs is None:
            ids, labels = self._example(number)
            return {"input_ids": ids, "labels": labels}
        parts = [self._example(example) for example in self._packs[number]]
        return {
            "input_ids": np.concatenate([ids for ids, _ in parts]),
            "labels": np.concatenate([labels for _, labels in parts]),
            "lengths": [len(ids) for ids, _ in parts],
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))

    def fingerprint(self) -> str:
        """sha256 (hexadecimal) of the tokens, so that a continued run is known to see the same data."""
        digest = hashlib.sha256()
        for array_ in (self._tokenized.offsets, self._tokenized.input_ids, self._tokenized.labels):
            digest.update(np.ascontiguousarray(array_).data)
        return digest.hexdigest()

    def _example(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= number < len(self._tokenized.offsets) - 1:
            raise IndexError(number)
        place = slice(int(self._tokenized.offsets[number]), int(self._tokenized.offsets[number + 1]))
        return np.array(self._tokenized.input_ids[place]), np.array(self._tokenized.labels[place])

    @property
    def longest(self) -> int:
        """The tokens of the longest example (of a pack: of its longest segment)."""
        return int(np.diff(self._tokenized.offsets).max())

    @property
    def efficiency(self) -> float | None:
        """The share of places in the packs that hold tokens, 0 to 1; None if not packed."""
        if self._packs is None or self.capacity is None:
            return None
        return efficiency(self.lengths, self._packs, self.capacity)

    def summary(self) -> str:
        """What was kept, cut and dropped, and how well it is packed; one line each."""
        lines = [self.report.summary()]
        if self._packs is not None:
            used = f"{self.efficiency:.1%} of them used"
            lines.append(f"packed into {len(self):,} rows of up to {self.capacity} tokens, {used}")
        return "\n".join(lines)


def tokenize(
    source: Source,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    src_length: int,
    max_length: int,
    *,
    progress: bool = True,
) -> Tokenized:
    """Turns every row of a source into ids.

    Args:
        source: the rows.
        tokenizer, template: of the checkpoint.
        src_length, max_length: limits in tokens.
        progress: show a bar (rows/s, time left) if it takes more than a moment.

    Raises:
        UserError: names every broken row (many of them: the first), or no example at all.
    """
    from tqdm import tqdm

    report = DataReport()
    input_ids, labels, offsets, broken = array("i"), array("i"), array("q", [0]), 0
    with signals.kept_from_children(signal.SIGTERM):  # a bar starts a thread, which stays: see signals.kept
        bar = tqdm(
            source.rows(),
            desc="tokenizing",
            unit="row",
            total=source.total(),
            delay=BAR_DELAY,
            disable=not progress,
        )
    faults: dict[str, dict[Path, list[int]]] = {}  # what is wrong: the lines of each file
    for row in bar:
        try:
            example = encode_row(row, tokenizer, template, src_length, max_length, report)
        except UserError as error:
            for fault in error.faults:
                faults.setdefault(fault.removeprefix(f"{row.place}: "), {}).setdefault(row.file, []).append(row.line)
            broken += 1
            if broken == SHOWN_FAULTS:
                break
            continue
        if not isinstance(example, Dropped):
            input_ids.frombytes(example.input_ids.tobytes())
            labels.frombytes(example.labels.tobytes())
            offsets.append(len(input_ids))
    raise_if([f"{_places(lines)}: {fault}" for fault, lines in faults.items()])
    if not report.kept:
        raise UserError(f"{source.name}: no row could be used\n{report.summary()}")
    return Tokenized(
        np.frombuffer(input_ids, dtype=np.int32),
        np.frombuffer(labels, dtype=np.int32),
        np.frombuffer(offsets, dtype=np.int64),
        report,
    )


def _places(lines: dict[Path, list[int]]) -> str:
    """Lines of files, as messages to the user name them."""
    return ", ".join(f"{file} line {', '.join(map(str, numbers))}" for file, numbers in lines.items())


def _cached(source: Source, tokenizer: Tokenizer, template: ChatTemplate, args: DataOptions) -> Tokenized:
    """The tokenized rows, from the cache if they are there."""
    key = {
        "version": FORMAT_VERSION,
        "rows": source.fingerprint(),
        "limit": source.limit,
        "tokenizer": tokenizer.fingerprint(),
        "template": template.fingerprint(),
        "lengths": [args.src_length, args.max_length],
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_root() / "datasets" / name
    if is_complete(folder):
        return Tokenized.load(folder)
    made = tokenize(source, tokenizer, template, args.src_length, args.max_length, progress=not args.disable_tqdm)
    try:
        with atomic_directory(folder) as staging:
            made.save(staging)
    except OSError as error:
        notice(f"the tokenized data could not be cached ({reason(error)}); it is kept in memory")
        return made
    return Tokenized.load(folder)


def load_rows(args: DataOptions, split: str) -> list[Row]:
    """The rows of a split as they are, for evaluation by generation; those whose last answer counts.

    Raises:
        UserError: there are none.
    """
    source = _source(args, split)
    rows = [row for row in source.rows() if row.messages[-1].get("train", True)]
    if not rows:
        raise UserError(
            f"{source.name}: no row's last answer is to be learned (train, weight, loss), so generated ones have "
            "nothing to be compared with"
        )
    return rows


def _source(args: DataOptions, split: str) -> Source:
    if args.dataset_name_or_path is None:
        raise UserError("dataset_name_or_path is missing: a folder with train.json and dev.json")
    limit = args.max_train_samples if split == "train" else args.max_eval_samples
    if split == "quant":
        limit = None
    return find_source(args.dataset_name_or_path, args.task_name, split, limit)


def load_dataset(
    args: DataOptions, tokenizer: Tokenizer, template: ChatTemplate, split: str, processes: ProcessGroup | None = None
) -> SupervisedDataset | StreamDataset:
    """The dataset of one split.

    Args:
        args: the arguments of the run.
        tokenizer, template: of the checkpoint.
        split: "train", "dev", "test" or "quant".
        processes: the processes of the run.

    Returns:
        With `lazy`, the training set is a `StreamDataset` without end; all else has a length. With
        `intokens` the items are packs (not for evaluation by generation, which knows no packs).

    Raises:
        UserError: missing or broken data.
    """
    source = _source(args, split)
    if args.lazy and split == "train":
        from utils.data.stream import StreamDataset

        if not isinstance(source, FileSource):
            raise UserError(f"lazy reads files; the built-in dataset {source.name} is in memory: leave lazy out")
        return StreamDataset(
            source,
            tokenizer,
            template,
            src_length=args.src_length,
            max_length=args.max_length,
            packed=args.intokens,
            seed=args.seed,
            processes=processes,
        )
    packed = args.intokens and not (split in ("dev", "test") and args.eval_with_do_generation)
    tokenized = _cached(source, tokenizer, template, args)
    return SupervisedDataset(tokenized, args.max_length if packed else None)
