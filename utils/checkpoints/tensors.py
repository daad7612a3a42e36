"""Tensors in files: read without copying what is not asked for, written one at a time.

Arrays are NumPy; bfloat16, which NumPy lacks, is its 16 bits in an uint16 array, as Paddle does it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.checkpoints.files import atomic_file, write_json
from utils.errors import UserError

# name of the type -> (name in safetensors files, NumPy type of the stored bits)
DTYPES: dict[str, tuple[str, str]] = {
    "float64": ("F64", "<f8"),
    "float32": ("F32", "<f4"),
    "float16": ("F16", "<f2"),
    "bfloat16": ("BF16", "<u2"),
    "int64": ("I64", "<i8"),
    "int32": ("I32", "<i4"),
    "int16": ("I16", "<i2"),
    "int8": ("I8", "|i1"),
    "uint8": ("U8", "|u1"),
    "bool": ("BOOL", "|b1"),
}
FLOATS = ("float64", "float32", "float16", "bfloat16")
_BY_CODE = {code: name for name, (code, _) in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose values are read when asked for.

    Attributes:
        name: its name in the checkpoint.
        dtype: a key of `DTYPES`.
        shape: its sizes.
        read: returns the values; a mapped view of the file where that is possible.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype][1]).itemsize


def dtype_name(array: np.ndarray) -> str:
    """The name of an array's type; uint16 stands for bfloat16."""
    return "bfloat16" if array.dtype == np.uint16 else array.dtype.name


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """`array` in a floating-point type of `DTYPES`, rounded to nearest even; the array itself if it is so."""
    source = dtype_name(array)
    if source == dtype:
        return array
    if source == "bfloat16":
        array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype != "bfloat16":
        return array.astype(DTYPES[dtype][1], copy=False)
    bits = array.astype(np.float32).view(np.uint32)
    upper = bits >> np.uint32(16)
    rounded = (bits + np.uint32(0x7FFF) + (upper & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, upper | np.uint32(0x40), rounded).astype(np.uint16)


def is_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; uint16 stands for bfloat16."""
    if array.dtype == np.uint16:
        return not ((array & np.uint16(0x7F80)) == np.uint16(0x7F80)).any()  # all bits of the exponent
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def mapped(path: Path, dtype: str, shape: Sequence[int], offset: int) -> np.ndarray:
    """A read-only view of a file's bytes; its memory is given back as soon as the view is dropped."""
    if math.prod(shape) == 0:
        return np.empty(tuple(shape), DTYPES[dtype][1])
    return np.memmap(path, DTYPES[dtype][1], "r", offset, tuple(shape))


def safetensors_header(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; only its header is read.

    The format: 8 bytes little-endian header length, a JSON object, then the data
    (https://github.com/huggingface/safetensors).

    Raises:
        UserError: the file cannot be read, is cut short or is no safetensors file.
    """
    try:
        return _read_header(path)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> UserError:
    """What a file of weights that the system does not give is for the user."""
    return UserError(f"{path}: cannot be read: {error.strerror}; check its permissions and its disk, or copy it again")


def _read_header(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    size = path.stat().st_size
    broken = f"{path}: not a whole safetensors file ({{}}); download or save it again"
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise UserError(broken.format("its header is missing"))
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("it is no JSON object")
            metadata = dict(header.pop("__metadata__", None) or {})
            base = 8 + length
            tensors = {name: _stored(path, name, entry, base, size - base) for name, entry in header.items()}
        except RecursionError as error:
            raise UserError(broken.format("its header is damaged: nested too deeply")) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(broken.format(f"its header is damaged: {error}")) from error
    return tensors, metadata


def _stored(path: Path, name: str, entry: dict[str, Any], base: int, room: int) -> LazyTensor:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(value) is int for value in (begin, end, *shape)):
        raise ValueError(f"tensor {name} has sizes or places that are no whole numbers")
    dtype = _BY_CODE.get(entry["dtype"])
    if dtype is None:
        raise UserError(
            f"{path}: tensor {name} is stored as {entry['dtype']}, which is not read here; store it as F32, F16 or "
            "BF16, or take the model that it was made from"
        )
    tensor = LazyTensor(name, dtype, shape, lambda: mapped(path, dtype, shape, base + begin))
    if not 0 <= begin <= end <= room or end - begin != tensor.nbytes or min(shape, default=0) < 0:
        raise ValueError(f"tensor {name} lies outside the file")
    return tensor


def open_tensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a .safetensors, .bin (PyTorch) or .pdparams (Paddle) file, values not yet read.

    Raises:
        UserError: the file is damaged, of another kind, or holds anything but tensors.
    """
    if path.suffix == ".safetensors":
        return safetensors_header(path)[0]
    from utils.checkpoints import unpickle

    try:
        return unpickle.open_bin(path) if path.suffix == ".bin" else unpickle.open_pdparams(path)
    except OSError as error:
        raise unreadable(path, error) from error


def read_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values) of each tensor of a file, see `open_tensors`; bfloat16 comes as uint16."""
    for name, tensor in open_tensors(path).items():
        yield name, tensor.read()


def in_memory(name: str, array: np.ndarray) -> LazyTensor:
    """An array as a `LazyTensor`."""
    return LazyTensor(name, dtype_name(array), tuple(array.shape), lambda: array)


def write_lazy(path: Path, tensors: Sequence[LazyTensor], metadata: dict[str, str]) -> None:
    """Writes one safetensors file atomically; holds one tensor's values at a time."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": DTYPES[tensor.dtype][0],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned, as the format asks
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            values = tensor.read()
            if tuple(values.shape) != tensor.shape or dtype_name(values) != tensor.dtype:
                raise ValueError(f"{tensor.name}: {values.dtype} {values.shape} is not what was announced")
            file.write(np.ascontiguousarray(values).data if values.size else b"")


def write_safetensors(path: Path, tensors: Iterable[tuple[str, np.ndarray]], metadata: dict[str, str]) -> None:
    """Writes (name, values) pairs as one safetensors file atomically; uint16 is written as bfloat16."""
    write_lazy(path, [in_memory(name, array) for name, array in tensors], metadata)


def divided(tensors: Sequence[LazyTensor], max_bytes: int) -> list[list[LazyTensor]]:
    """Tensors in the groups that make a file each: at most `max_bytes`, one tensor at least."""
    shards: list[list[LazyTensor]] = []
    filled = 0
    for tensor in tensors:
        if not shards or filled + tensor.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def shard_names(stem: str, count: int) -> list[str]:
    """The names of the files of a set of tensors."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, stem: str, files: Mapping[str, Mapping[str, int]]) -> None:
    """Writes `STEM.safetensors.index.json`: which file holds which tensor.

    Args:
        files: the bytes of every tensor, by file and name.
    """
    size = sum(nbytes for tensors in files.values() for nbytes in tensors.values())
    places = {name: file for file, tensors in files.items() for name in tensors}
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": places})


def write_shards(
    folder: Path, tensors: Sequence[LazyTensor], metadata: dict[str, str], max_shard_bytes: int
) -> list[Path]:
    """Writes model.safetensors, or shards of at most `max_shard_bytes` (one tensor at least) and their index.

    Returns:
        The files of tensors, in order.
    """
    shards = divided(tensors, max_shard_bytes)
    names = shard_names("model", len(shards))
    for name, shard in zip(names, shards, strict=True):
        write_lazy(folder / name, shard, metadata)
    if len(names) > 1:
        sizes = [{tensor.name: tensor.nbytes for tensor in shard} for shard in shards]
        write_index(folder, "model", dict(zip(names, sizes, strict=True)))
    return [folder / name for name in names]
