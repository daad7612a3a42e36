"""Training rows read from their files without end, in constant memory, and resumed where they were.

The files are read in blocks of some packs' worth of tokens. What happens within a block (packing, order
of the items) depends on its rows, the seed and the block's number alone. So the place in the stream is
the place where the current block begins, and how many of its items have gone: nothing else has to be
saved for an exact resume.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.checkpoints.fingerprint import file_sample
from utils.data.ahead import ahead
from utils.data.encode import DataReport, Dropped, Example, encode_row
from utils.data.lines import decode_line, is_array, naming
from utils.data.packing import best_fit
from utils.data.rows import to_row
from utils.data.sources import FileSource
from utils.data.template import ChatTemplate
from utils.errors import UserError, notice
from utils.parallel.process_group import ProcessGroup

if TYPE_CHECKING:
    from utils.families.tokenizers import Tokenizer

BLOCK_PACKS = 128  # tokens of a block, in packs: enough that the last, half-empty pack hardly counts
BLOCK_ROWS = 8192  # and no more rows than this
CHUNK_ROWS = 64  # rows that a rank makes into tokens between two exchanges with others
CHUNKS_AHEAD = 8  # made while the training uses those before
SHOWN_BROKEN = 3


@dataclass(frozen=True)
class Position:
    """Where a block begins.

    Attributes:
        epoch: how often the files have been read to their end.
        file, offset, line: the next row: number of the file, byte in it, lines before it.
        rows: how many rows of this epoch have been read.
        block: the block's number.
        items: how many items all blocks before it gave.
    """

    epoch: int = 0
    file: int = 0
    offset: int = 0
    line: int = 0
    rows: int = 0
    block: int = 0
    items: int = 0


class FileLost(UserError):
    """A file of a stream has changed or gone while it was read."""


class StreamDataset:
    """The rows of JSON Lines files as an endless stream of examples or packs.

    Of several processes each has the whole stream, but makes only its part of the rows into tokens: all must take
    the same items at the same time.

    Attributes:
        report: what became of the rows of the last epoch that was read to its end, before that of those read so far.
    """

    def __init__(
        self,
        source: FileSource,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        src_length: int,
        max_length: int,
        packed: bool = False,
        shuffle: bool = True,
        seed: int = 42,
        block_packs: int = BLOCK_PACKS,
        processes: ProcessGroup | None = None,
    ) -> None:
        """Opens nothing yet.

        Args:
            source: the files, and how many rows of them to use.
            tokenizer, template: of the checkpoint.
            src_length, max_length: limits in tokens, see `encode_row`.
            packed: pack each block best-fit up to `max_length` (InTokens).
            shuffle: shuffle the items within each block.
            seed: of the shuffle.
            block_packs: size of a block in units of `max_length` tokens.
            processes: the processes that share the work.

        Raises:
            UserError: a file that is not JSON Lines.
        """
        for file in source.files:
            if is_array(file):
                raise UserError(f"{file}: one JSON array cannot be streamed with lazy; write one row per line")
        self._source = source
        self._tokenizer = tokenizer
        self._template = template
        self._src_length = src_length
        self._max_length = max_length
        self._packed = packed
        self._shuffle = shuffle
        self._seed = seed
        self._block_tokens = block_packs * max_length
        self._files = [[file.name, file.stat().st_size] for file in source.files]
        self._blocks = [Position()]  # where blocks begin, in order; some 100 bytes for each block read
        self._skip = 0
        self._following: tuple[Position, Iterator[tuple[Position, dict[str, Any]]]] | None = None
        self._broken = 0
        self._processes = processes or ProcessGroup()
        self._counting = DataReport()
        self._counted: DataReport | None = None

    @property
    def report(self) -> DataReport:
        return self._counting if self._counted is None else self._counted

    def fingerprint(self) -> list[list[Any]]:
        """Name, size in bytes and sample of each file, so that other data is told from these without reading it all."""
        sizes = zip(self._source.files, self._files, strict=True)
        return [[name, size, file_sample(file)] for file, (name, size) in sizes]

    # --- place in the stream ---------------------------------------------------------------------

    def state_after(self, items: int) -> dict[str, Any]:
        """The state, ready for JSON, from which the stream goes on after its first `items` items.

        Items are counted from the very beginning, those before a resume included. If they have not
        been read here (a loader's worker did it), the stream is read up to there.
        """
        if items < self._blocks[0].items:
            raise ValueError(f"this stream was resumed after item {self._blocks[0].items}, asked for {items}")
        while self._blocks[-1].items < items:
            self._blocks.append(self._read_block(self._blocks[-1])[1])
        place = bisect_right(self._blocks, items, key=lambda position: position.items) - 1
        position = self._blocks[place]
        return {"position": asdict(position), "items": items, "files": self._files, "seed": self._seed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to a place that `state_after` gave; the next iteration begins there.

        Raises:
            UserError: the files or the seed are not those of the state.
        """
        if [list(file) for file in state["files"]] != self._files or state["seed"] != self._seed:
            raise UserError(
                f"{self._source.name}: the training files (names, sizes) or the seed have changed since the "
                "checkpoint, so the run cannot go on where it was; restore them, or start from the "
                "checkpoint's weights as model_name_or_path"
            )
        position = Position(**state["position"])
        self._blocks = [position]
        self._skip = int(state["items"]) - position.items

    def iter_from(self, state: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The items that follow a state of `state_after`."""
        self.restore(state)
        return iter(self)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Items without end: those of `SupervisedDataset`, from where the stream was put last.

        Raises:
            UserError: no row of the files can be used.
        """
        position, skip = self._blocks[0], self._skip
        while True:
            items, following = self._read_block(position)
            if following.items > self._blocks[-1].items:
                self._blocks.append(following)
            yield from items[skip:]
            position, skip = following, 0

    def summary(self) -> str:
        """What was kept, cut and dropped, see `report`; one line each."""
        return self.report.summary()

    # --- blocks ----------------------------------------------------------------------------------

    def _read_block(self, start: Position) -> tuple[list[dict[str, Any]], Position]:
        """The items of the block that begins at `start`, and where the next one begins.

        A block ends with its epoch, so an epoch gives every row once.
        """
        examples, behind = self._read_examples(start)
        if not examples and start.rows:  # only blank or unusable rows were left of the epoch
            examples, behind = self._read_examples(behind)
        if not examples:
            raise UserError(f"{self._source.name}: no row could be used\n{self.report.summary()}")
        if self._packed:
            packs = best_fit([len(example.input_ids) for example in examples], self._max_length)
            items = [_pack([examples[number] for number in pack]) for pack in packs]
        else:
            items = [{"input_ids": one.input_ids, "labels": one.labels} for one in examples]
        if self._shuffle:
            order = np.random.default_rng([self._seed, start.block]).permutation(len(items))
            items = [items[number] for number in order]
        return items, replace(behind, block=start.block + 1, items=start.items + len(items))

    def _read_examples(self, start: Position) -> tuple[list[Example], Position]:
        """Examples of one block, and the place behind them."""
        examples: list[Example] = []
        tokens, behind = 0, replace(start, block=0, items=0)
        if not start.rows:
            self._counting = DataReport()
        if self._following is None or self._following[0] != behind:
            self._following = (behind, self._rows(behind))
        _, rows = self._following
        for behind, read in rows:
            example = self._take(read)
            if example is not None:
                examples.append(example)
                tokens += len(example.input_ids)
            if tokens >= self._block_tokens or len(examples) >= BLOCK_ROWS:
                self._following = (behind, rows)
                return examples, behind
        self._counted = self._counting
        return examples, Position(start.epoch + 1)

    def _take(self, read: dict[str, Any]) -> Example | None:
        """The example of a row, after it has been counted."""
        report = DataReport.from_json(read["report"])
        self._counting.merge(report)
        for fault in read["faults"]:
            # Hours into a run a broken row is no reason to lose it; the first rows were checked at its start.
            self._broken += 1
            if self._broken <= SHOWN_BROKEN:
                notice(f"row left out: {fault}")
        if not report.kept:
            return None
        return Example(np.array(read["input_ids"], dtype=np.int32), np.array(read["labels"], dtype=np.int32))

    # --- rows, read ahead and shared among ranks ---------------------------------------------------

    def _rows(self, start: Position) -> Iterator[tuple[Position, dict[str, Any]]]:
        """(place behind it, what became of it) of every row from `start` to the end of its epoch."""
        for places, own in ahead(self._chunks(start), CHUNKS_AHEAD):
            parts = self._processes.gather(own)
            for number, place in enumerate(places):
                yield place, parts[number % len(parts)][number // len(parts)]

    def _chunks(self, start: Position) -> Iterator[tuple[list[Position], list[dict[str, Any]]]]:
        """Rows from `start` on, some at a time: the places behind all of them, and what became of this rank's part.

        All ranks need all rows: how blocks are packed depends on every length. Each makes tokens of one row in
        `world` and gets the others'.
        """
        layout = self._processes.layout
        places: list[Position] = []
        own: list[dict[str, Any]] = []
        for place, number, content in self._lines(start):
            if len(places) % layout.world == layout.rank:
                own.append(self._read(number, content, place.line))
            places.append(place)
            if len(places) == CHUNK_ROWS * layout.world:
                yield places, own
                places, own = [], []
        if places:
            yield places, own

    def _lines(self, start: Position) -> Iterator[tuple[Position, int, bytes]]:
        """(place behind it, number of the file, content) of every line from `start` that is not blank.

        Raises:
            FileLost: a file has changed or gone since the run began.
        """
        rows, offset, line = start.rows, start.offset, start.line
        for number in range(start.file, len(self._source.files)):
            file = self._source.files[number]
            try:
                with file.open("rb") as stream:
                    stream.seek(offset)
                    while content := stream.readline():
                        if rows == self._source.limit:
                            return
                        offset += len(content)
                        line += 1
                        if not content.strip():
                            continue
                        rows += 1
                        if rows % CHUNK_ROWS == 0:
                            self._check_unchanged(number)
                        yield Position(start.epoch, number, offset, line, rows), number, content
                self._check_unchanged(number)
            except OSError as error:
                raise FileLost(
                    f"{file}: cannot be read any more ({error.strerror}); put it back, and give the same command again"
                ) from None
            offset, line = 0, 0

    def _check_unchanged(self, number: int) -> None:
        file, size = self._source.files[number], self._files[number][1]
        if (found := file.stat().st_size) != size:
            raise FileLost(
                f"{file}: has changed during the run ({size:,} bytes before, {found:,} now); restore it, and give the "
                "same command again"
            )

    def _read(self, number: int, content: bytes, line: int) -> dict[str, Any]:
        """What becomes of a row, as a JSON value: its ids and labels if it can be used, the report, and faults."""
        file = self._source.files[number]
        decoded, place, report = decode_line(content, line), f"{file} line {line}", DataReport()
        found: Example | Dropped | None = None
        faults: tuple[str, ...] = ()
        try:
            if decoded is not None:
                with naming(place):
                    row = to_row(decoded, file)
                found = encode_row(row, self._tokenizer, self._template, self._src_length, self._max_length, report)
        except UserError as error:
            report, faults = DataReport(), error.faults
            report.note("dropped, broken", place)
        read: dict[str, Any] = {"report": report.to_json(), "faults": list(faults)}
        if isinstance(found, Example):
            read |= {"input_ids": found.input_ids.tolist(), "labels": found.labels.tolist()}
        return read


def _pack(examples: list[Example]) -> dict[str, Any]:
    return {
        "input_ids": np.concatenate([one.input_ids for one in examples]),
        "labels": np.concatenate([one.labels for one in examples]),
        "lengths": [len(one.input_ids) for one in examples],
    }
