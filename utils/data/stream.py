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

from utils.data.encode import DataReport, Dropped, Example, encode_row
from utils.data.lines import RowFault, decode_line, is_array
from utils.data.packing import best_fit
from utils.data.rows import to_row
from utils.data.sources import FileSource
from utils.data.template import ChatTemplate
from utils.errors import UserError, notice

if TYPE_CHECKING:
    from utils.families.tokenizers import Tokenizer

BLOCK_PACKS = 128  # tokens of a block, in packs: enough that the last, half-empty pack hardly counts
BLOCK_ROWS = 8192  # and no more rows than this
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


class StreamDataset:
    """The rows of JSON Lines files as an endless stream of examples or packs.

    Not for several loader workers: each of them would read all rows.

    Attributes:
        report: what became of the rows read so far; each epoch counts anew.
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
        self._broken = 0
        self.report = DataReport()

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
        """What was kept, cut and dropped of the rows read so far in this epoch; one line each."""
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
        tokens, rows = 0, start.rows
        offset, line = start.offset, start.line
        if not rows:
            self.report = DataReport()
        for number in range(start.file, len(self._source.files)):
            with self._source.files[number].open("rb") as stream:
                stream.seek(offset)
                while content := stream.readline():
                    if rows == self._source.limit:
                        return examples, Position(start.epoch + 1)
                    if tokens >= self._block_tokens or len(examples) >= BLOCK_ROWS:
                        return examples, Position(start.epoch, number, offset, line, rows)
                    offset += len(content)
                    line += 1
                    if not content.strip():
                        continue
                    rows += 1
                    example = self._example(number, content, line)
                    if example is not None:
                        examples.append(example)
                        tokens += len(example.input_ids)
            offset, line = 0, 0
        return examples, Position(start.epoch + 1)

    def _example(self, number: int, content: bytes, line: int) -> Example | None:
        decoded = decode_line(content, line)
        if decoded is None:
            return None
        file = self._source.files[number]
        try:
            row = to_row(decoded, file)
            example = encode_row(row, self._tokenizer, self._template, self._src_length, self._max_length, self.report)
        except (RowFault, UserError) as fault:
            # Hours into a run a broken row is no reason to lose it; the first rows were checked at its start.
            self._broken += 1
            self.report.note("dropped, broken", f"{file} line {line}")
            if self._broken <= SHOWN_BROKEN:
                notice(f"{file} line {line}: row left out: {fault}")
            return None
        return None if isinstance(example, Dropped) else example


def _pack(examples: list[Example]) -> dict[str, Any]:
    return {
        "input_ids": np.concatenate([one.input_ids for one in examples]),
        "labels": np.concatenate([one.labels for one in examples]),
        "lengths": [len(one.input_ids) for one in examples],
    }


def open_stream(source: FileSource, tokenizer: Tokenizer, template: ChatTemplate, **options: Any) -> StreamDataset:
    """A `StreamDataset` that Paddle's DataLoader takes for an IterableDataset (imports Paddle)."""
    from paddle.io import IterableDataset

    class PaddleStream(StreamDataset, IterableDataset):
        """The same stream, under the base class that the loader asks for."""

        @property
        def __len__(self) -> Any:
            """Paddle's class has one that fails when called; a stream has none, and says so when asked."""
            raise AttributeError("a stream has no length")

    return PaddleStream(source, tokenizer, template, **options)
