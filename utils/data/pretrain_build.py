"""JSON Lines become token files: every document through the tokenizer, in several processes, in order."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.checkpoints.files import atomic_file, atomic_write, json_bytes, sync
from utils.data.lines import decode_line, half_of_pair, naming
from utils.data.pretrain_files import MAGIC, META, index_bytes
from utils.data.pretrain_work import Progress, in_order, input_files
from utils.errors import UserError, raise_if

if TYPE_CHECKING:
    from utils.families.tokenizers import Tokenizer

SHOWN_FAULTS = 20  # of a block
BLOCK_BYTES, BLOCK_LINES = 1 << 18, 512  # of a worker's task
SENTENCES = re.compile(r"(?<=[。！？；])(?!\n)|(?<=[.!?])(?=\s)|(?<=\n)")
# Two tokenizers that give these ids alike are taken for the same, in whatever files they come.
PROBE = "The quick brown fox, 1234 times:\n\tdéjà vu! 你好，世界。 def f(x): return x ** 2"


@dataclass(frozen=True)
class BuildOptions:
    """The options of create_pretraining_data.py of the same names."""

    json_key: str = "text"
    split_sentences: bool = False
    append_eos: bool = False
    special_tokens_in_text: bool = False
    workers: int = 1
    log_interval: int = 10_000


@dataclass(frozen=True)
class Block:
    """Some lines of a file: its name, the number of the first line, and the lines."""

    file: str
    first: int
    lines: list[bytes]

    @property
    def size(self) -> int:
        return sum(map(len, self.lines))


@dataclass(frozen=True)
class Encoded:
    """The documents of a block.

    Attributes:
        ids: all ids one after another, in the type of the file.
        sizes: int32, tokens of every sequence.
        sequences: int32, sequences of every document.
        empty: lines that gave no token.
        read: bytes of the lines.
    """

    ids: bytes
    sizes: bytes
    sequences: bytes
    empty: int
    read: int


def id_type(tokenizer: Tokenizer) -> str:
    """The smallest type of the format that holds every id."""
    return "uint16" if tokenizer.vocabulary <= 1 << 16 else "int32"


def documents(block: Block, key: str) -> Iterator[tuple[str, str]]:
    """(place, text) of every row of a block; blank lines are left out.

    Raises:
        UserError: names each line that is no JSON object with text at `key`.
    """
    faults = []
    for number, content in enumerate(block.lines, block.first):
        line, place = decode_line(content, number), f"{block.file} line {number}"
        if line is None:
            continue
        row = line.value
        if line.fault is not None:
            faults.append(f"{place}: {line.fault}")
        elif not isinstance(row, dict) or key not in row:
            found = f"found {', '.join(map(str, row)) or 'none'}" if isinstance(row, dict) else "it is no object"
            faults.append(f"{place}: has no key {key} ({found}); name it with --json_key")
        elif not isinstance(row[key], str):
            faults.append(f"{place}: {key} is no text")
        elif (half := half_of_pair(row[key])) is not None:
            faults.append(f"{place}: {key} holds half of a surrogate pair at character {half}")
        else:
            yield place, row[key]
    raise_if(faults[:SHOWN_FAULTS])


def sentences(text: str) -> list[str]:
    """The sentences of a text, which joined give the text again."""
    return [part for part in SENTENCES.split(text) if part]


class _Worker:
    """What a process keeps between its tasks."""

    tokenizer: Tokenizer
    options: BuildOptions


def _prepare(folder: Path, config: dict[str, Any], options: BuildOptions) -> None:
    from utils.families.tokenizers import load_tokenizer

    _Worker.tokenizer, _Worker.options = load_tokenizer(folder, config), options


def encode_block(block: Block) -> Encoded:
    """The ids of a block's documents."""
    tokenizer, options = _Worker.tokenizer, _Worker.options
    encode = tokenizer.encode if options.special_tokens_in_text else tokenizer.encode_text
    ids: list[int] = []
    sizes, sequences = array("i"), array("i")
    empty = 0
    for place, text in documents(block, options.json_key):
        parts = sentences(text) if options.split_sentences else [text]
        with naming(place):
            encoded = [encode(part, continuation=number > 0) for number, part in enumerate(parts)]
        encoded = [part for part in encoded if part]
        if not encoded:
            empty += 1
            continue
        if options.append_eos:
            encoded[-1].append(tokenizer.eos_id)
        for part in encoded:
            ids += part
            sizes.append(len(part))
        sequences.append(len(encoded))
    values = np.array(ids, dtype=np.dtype(id_type(tokenizer)).newbyteorder("<"))
    return Encoded(values.tobytes(), sizes.tobytes(), sequences.tobytes(), empty, block.size)


def blocks(files: Sequence[Path]) -> Iterator[Block]:
    """The lines of all files in pieces of moderate size."""
    for file in files:
        with file.open("rb") as stream:
            lines: list[bytes] = []
            size, first = 0, 1
            for number, line in enumerate(stream, 1):
                lines.append(line)
                size += len(line)
                if size >= BLOCK_BYTES or len(lines) >= BLOCK_LINES:
                    yield Block(str(file), first, lines)
                    lines, size, first = [], 0, number + 1
            if lines:
                yield Block(str(file), first, lines)


def build(
    input_path: str, output_prefix: str, name: str, folder: Path, config: dict[str, Any], options: BuildOptions
) -> str:
    """Writes OUTPUT_PREFIX.bin and .idx, and what made them in .meta.json; returns a line about them.

    The files appear whole, the index last; a run that fails leaves those before as they were, and one that is killed
    while they appear leaves none that can be read. Memory: 4 bytes for each sequence and 8 for each document.

    Args:
        name: of the tokenizer, for the record.
        folder, config: of the checkpoint whose tokenizer is used, see `load_tokenizer`.

    Raises:
        UserError: a line that cannot be used, with file and number, no document at all, or an output that is an input.
    """
    from utils.families.tokenizers import load_tokenizer

    index, ids_path, record = (Path(f"{output_prefix}{ending}") for ending in (".idx", ".bin", META))
    files = input_files(input_path, lambda _: (index, ids_path, record), (".jsonl", ".json"))
    tokenizer = load_tokenizer(folder, config)
    progress = Progress(sum(file.stat().st_size for file in files), options.log_interval)
    sizes, firsts = array("i"), array("q", [0])
    empty = 0
    kind = id_type(tokenizer)
    # All three are on disk before one of them appears; the blocks end from the right, so that the index comes last.
    with (
        atomic_file(index) as index_file,
        atomic_file(record) as made_file,
        atomic_file(ids_path) as ids_file,
    ):
        for one in in_order(encode_block, blocks(files), options.workers, _prepare, (folder, config, options)):
            ids_file.write(one.ids)
            sizes.frombytes(one.sizes)
            counts = array("i")
            counts.frombytes(one.sequences)
            for count in counts:
                firsts.append(firsts[-1] + count)
            empty += one.empty
            progress.add(len(counts) + one.empty, one.read)
        if not sizes:
            raise UserError(f"input_path {input_path}: holds no document")
        lengths = np.frombuffer(sizes, dtype=np.int32)
        for part in index_bytes(kind, lengths, np.frombuffer(firsts, dtype=np.int64)):
            index_file.write(part)
        tokens, count = int(lengths.sum(dtype=np.int64)), len(firsts) - 1
        made = {
            "tokenizer": name,
            "vocabulary": tokenizer.vocabulary,
            "probe": tokenizer.encode(PROBE),
            "append_eos": options.append_eos,
            "special_tokens_in_text": options.special_tokens_in_text,
            "documents": count,
            "tokens": tokens,
        }
        made_file.write(json_bytes(made, indent=2) + b"\n")
        for file in (ids_file, made_file, index_file):
            sync(file)
        if index.exists():
            atomic_write(index, MAGIC)  # readers call it cut short; an older one must never stand beside the new ids
    left = f"; {empty:,} empty ones left out" if empty else ""
    return f"{output_prefix}.bin, {output_prefix}.idx: {count:,} documents, {tokens:,} tokens ({kind}){left}"


def check_tokenizer(prefix: str, tokenizer: Tokenizer, how: str) -> None:
    """Refuses token files that our tool made with another tokenizer; files of other tools do not say theirs.

    Args:
        how: what to do about it, for the message.

    Raises:
        UserError: the tokenizers differ.
    """
    file = Path(f"{prefix}{META}")
    if not file.is_file():
        return
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
        same = made["probe"] == tokenizer.encode(PROBE)
    except (OSError, ValueError, KeyError, TypeError):
        return  # a record that nobody can read says nothing against the ids
    if not same:
        raise UserError(
            f"{prefix}.bin was made with the tokenizer of {made.get('tokenizer')}, not with this one; {how}"
        )
