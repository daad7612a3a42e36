"""Token files of pretraining: documents as ids in one long array on disk, read without loading it.

Two formats. PREFIX.bin + PREFIX.idx is Megatron's memory-mapped one: the ids of all sequences one after
another, and an index with the size and place of each sequence and the first sequence of each document.
PREFIX_ids.npy + PREFIX_idx.npz is an older one of the same content.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from utils.errors import UserError

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, type code, number of sequences, length of the document index
CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16", 9: "uint32", 10: "uint64"}
FLOATS = (6, 7)
META = ".meta.json"  # beside the files of our own tool: which tokenizer made the ids
CHECKED_BLOCKS, CHECKED_BLOCK = 64, 1 << 18  # ids looked at before a run starts, in blocks all over the file
HASHED_BLOCKS, HASHED_BLOCK = 64, 1 << 14  # bytes of the file that its fingerprint is made of


@dataclass(frozen=True)
class TokenFile:
    """The documents of one token file.

    Attributes:
        prefix: its name without the endings.
        tokens: ids of all documents, any integer type, [tokens]; on disk.
        starts: int64 [documents + 1]; document i is the tokens from starts[i] to starts[i + 1].
    """

    prefix: str
    tokens: np.ndarray
    starts: np.ndarray

    @property
    def documents(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hexadecimal) of sizes and of blocks all over the ids; costs milliseconds for any size."""
        digest = hashlib.sha256(f"{self.tokens.dtype.name} {len(self.tokens)}\0".encode())
        digest.update(np.ascontiguousarray(self.starts).data)
        for block in _blocks(self.tokens, HASHED_BLOCKS, HASHED_BLOCK // self.tokens.dtype.itemsize):
            digest.update(np.ascontiguousarray(block).data)
        return digest.hexdigest()

    def check_ids(self, vocabulary: int) -> None:
        """Looks at ids all over the file (at every one of a file of up to 16 million).

        Raises:
            UserError: an id that a model of this vocabulary does not have.
        """
        for block in _blocks(self.tokens, CHECKED_BLOCKS, CHECKED_BLOCK):
            check_range(block, vocabulary, self.prefix)


def check_range(ids: np.ndarray, vocabulary: int, prefix: str) -> None:
    """Raises `UserError` if one of `ids` (any integer type, at least one) is none of 0..vocabulary - 1."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise UserError(
            f"{prefix}: holds the token id {high if high >= vocabulary else low}, the model has ids from 0 to "
            f"{vocabulary - 1}; build the data with the model's own tokenizer (data/tools/create_pretraining_data.py)"
        )


def _blocks(tokens: np.ndarray, count: int, size: int) -> list[np.ndarray]:
    """`count` evenly spaced blocks of an array, or all of it in one where that is no more."""
    if len(tokens) <= count * size:
        return [tokens]
    return [tokens[start : start + size] for start in np.linspace(0, len(tokens) - size, count).astype(np.int64)]


# --- finding and opening ---------------------------------------------------------------------------


def prefixes_in(folder: Path) -> list[str]:
    """The prefixes of the token files of a folder, sorted."""
    names = {str(path)[: -len(".idx")] for path in folder.glob("*.idx")}
    return sorted(names | {str(path)[: -len("_idx.npz")] for path in folder.glob("*_idx.npz")})


def find_files(path: str) -> list[str]:
    """The prefixes that a path means: those of a folder, or the path itself.

    Raises:
        UserError: there are none.
    """
    is_prefix = Path(f"{path}.idx").is_file() or Path(f"{path}_idx.npz").is_file()  # a folder may be called alike
    found = prefixes_in(Path(path)) if Path(path).is_dir() and not is_prefix else [path]
    if not found:
        raise UserError(f"{path}: holds no PREFIX.bin with PREFIX.idx")
    return found


def open_tokens(prefix: str) -> TokenFile:
    """Opens one token file and checks that index and ids belong together.

    Raises:
        UserError: a file is missing, cut short, of another format, or holds no tokens.
    """
    index = Path(f"{prefix}.idx")
    if index.is_file():
        return _open_mmap(prefix, index)
    if Path(f"{prefix}_idx.npz").is_file():
        return _open_older(prefix)
    raise UserError(f"{prefix}: no such token file; expected {prefix}.bin and {prefix}.idx")


def _open_mmap(prefix: str, index: Path) -> TokenFile:
    ids = Path(f"{prefix}.bin")
    if not ids.is_file():
        raise UserError(f"{ids}: is missing beside {index.name}; build both again")
    with index.open("rb") as file:
        header = file.read(HEADER.size)
    if header[: len(MAGIC)] != MAGIC:
        raise UserError(f"{index}: is no index of a token file (it does not begin with MMIDIDX)")
    if len(header) < HEADER.size:
        raise UserError(f"{index}: is cut short; build the data again")
    _, version, code, sequences, marks = HEADER.unpack(header)
    if version != VERSION:
        raise UserError(f"{index}: is of version {version}; version {VERSION} is known")
    if code not in CODES:
        what = "numbers with fractions, which are no token ids" if code in FLOATS else "not known"
        raise UserError(f"{index}: its type code {code} is {what}; known are {', '.join(map(str, CODES))}")
    expected = HEADER.size + sequences * (4 + 8) + marks * 8
    _check_size(index, expected)
    if not sequences:
        raise UserError(f"{index}: holds no documents")
    place = HEADER.size
    sizes = np.memmap(index, "<i4", "r", place, (sequences,))
    pointers = np.memmap(index, "<i8", "r", place + 4 * sequences, (sequences,))
    documents = np.memmap(index, "<i8", "r", place + 12 * sequences, (marks,)) if marks else np.empty(0, np.int64)
    kind = np.dtype(CODES[code]).newbyteorder("<")
    width = kind.itemsize
    ends = pointers + sizes.astype(np.int64) * width
    if pointers[0] or (sizes < 0).any() or (ends[:-1] != pointers[1:]).any():
        raise UserError(f"{index}: its sequences do not follow one another; build it again")
    _check_size(ids, int(ends[-1]))
    if not ends[-1]:
        raise UserError(f"{ids}: holds no tokens")
    bounds = np.append(pointers, ends[-1]) // width
    return TokenFile(prefix, np.memmap(ids, kind, "r"), _starts(index, bounds, documents))


def _check_size(file: Path, expected: int) -> None:
    size = file.stat().st_size
    if size != expected:
        raise UserError(f"{file}: has {size:,} bytes where its index says {expected:,}; build the data again")


def _open_older(prefix: str) -> TokenFile:
    ids, index = Path(f"{prefix}_ids.npy"), Path(f"{prefix}_idx.npz")
    try:
        tokens = np.load(ids, mmap_mode="r")
        with np.load(index) as content:
            sizes = np.asarray(content["lens"], dtype=np.int64)
            documents = np.asarray(content["docs"], dtype=np.int64) if "docs" in content else np.empty(0, np.int64)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: is missing beside {index.name}") from None
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise UserError(f"{prefix}_ids.npy, {prefix}_idx.npz: cannot be read as token files ({error})") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise UserError(f"{ids}: expected one row of token ids, found {tokens.dtype.name} {list(tokens.shape)}")
    if (sizes < 0).any() or sizes.sum() != len(tokens) or not len(tokens):
        raise UserError(f"{ids}: has {len(tokens):,} ids where its index says {int(sizes.sum()):,}; build it again")
    return TokenFile(prefix, tokens, _starts(index, np.append(0, np.cumsum(sizes)), documents))


def _starts(index: Path, bounds: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """`TokenFile.starts` from the bounds of the sequences and the first sequence of each document."""
    last = len(bounds) - 1
    if not len(documents):  # nothing said: every sequence is a document
        return bounds.astype(np.int64)
    marks: Sequence[int] | np.ndarray = documents
    if documents[0]:  # some writers leave the first one out
        marks = np.append(0, documents)
    if marks[-1] != last or (np.diff(marks) < 0).any():
        raise UserError(f"{index}: its documents do not cover its {last} sequences; build it again")
    return bounds[np.asarray(marks)].astype(np.int64)


# --- writing ---------------------------------------------------------------------------------------


def index_bytes(kind: str, sizes: np.ndarray, documents: np.ndarray) -> list[bytes]:
    """The content of PREFIX.idx in parts.

    Args:
        kind: type of the ids, one of `CODES`.
        sizes: int32 [sequences], tokens of each.
        documents: int64 [documents + 1]; the first sequence of each document, and their number at the end.
    """
    code = next(number for number, name in CODES.items() if name == kind)
    ends = np.cumsum(sizes, dtype=np.int64) * np.dtype(kind).itemsize
    pointers = np.append(np.zeros(1, np.int64), ends[:-1]) if len(sizes) else ends
    return [
        HEADER.pack(MAGIC, VERSION, code, len(sizes), len(documents)),
        sizes.astype("<i4").tobytes(),
        pointers.astype("<i8").tobytes(),
        documents.astype("<i8").tobytes(),
    ]
