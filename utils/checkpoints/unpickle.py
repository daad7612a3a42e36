"""Tensors out of pickled checkpoints (.bin of PyTorch, .pdparams of Paddle) without running what is in them.

A pickle is a program that may call anything. The unpickler here knows only the few names that tensor
files need and gives its own stand-ins for them; any other name refuses the file. Large values are
not read but remembered by their place in the file, so that opening costs neither time nor memory.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from utils.checkpoints.tensors import DTYPES, LazyTensor, mapped
from utils.errors import UserError

_LAZY_BYTES = 4096  # longer byte strings stay in the file
_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,  # a damaged length
    RecursionError,
    struct.error,
    zipfile.BadZipFile,
)
# storage class of PyTorch -> key of DTYPES
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


@dataclass(frozen=True)
class _FileBytes:
    """A byte string that was left in the file."""

    offset: int
    size: int


class _Dtype:
    """Stands for numpy.dtype."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        self.code = code
        self.order = "="

    def restore(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    @property
    def name(self) -> str:
        kind = np.dtype(self.code)
        if kind.hasobject or self.order == ">":
            raise ValueError(f"array of type {self.order}{self.code}")
        name = "bfloat16" if kind == np.uint16 else kind.name
        if name not in DTYPES:
            raise ValueError(f"array of type {kind.name}")
        return name


class _Array:
    """Stands for numpy.ndarray while its pickle is read."""

    shape: tuple[int, ...]
    dtype: _Dtype
    fortran: bool
    data: _FileBytes | bytes

    def restore(self, state: tuple[Any, ...]) -> None:
        _, shape, self.dtype, self.fortran, self.data = state
        self.shape = tuple(int(length) for length in shape)

    def lazy(self, name: str, path: Path) -> LazyTensor:
        dtype, shape, data = self.dtype.name, self.shape, self.data
        stored = shape[::-1] if self.fortran else shape
        size = data.size if isinstance(data, _FileBytes) else len(data)

        def read() -> np.ndarray:
            if isinstance(data, _FileBytes):
                values = mapped(path, dtype, stored, data.offset)
            else:
                values = np.frombuffer(data, DTYPES[dtype][1]).reshape(stored)
            return values.T if self.fortran else values

        tensor = LazyTensor(name, dtype, shape, read)
        if tensor.nbytes != size or min(shape, default=0) < 0:
            raise ValueError(f"tensor {name} has {size} bytes, expected {tensor.nbytes}")
        if isinstance(data, _FileBytes) and data.offset + size > path.stat().st_size:
            raise ValueError(f"tensor {name} is cut short")
        return tensor


@dataclass(frozen=True)
class _Storage:
    """A flat block of values of a PyTorch file."""

    dtype: str
    key: str


@dataclass(frozen=True)
class _TorchTensor:
    """A view of a storage; offset and strides count values."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _torch_tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *_rest: Any) -> _TorchTensor:
    return _TorchTensor(storage, int(offset), tuple(shape), tuple(strides))


def _torch_parameter(tensor: _TorchTensor, *_rest: Any) -> _TorchTensor:
    return tensor


def _numpy_array(*_arguments: Any) -> _Array:
    return _Array()


def _encode(text: str, _encoding: str) -> bytes:
    return text.encode("latin-1")  # how protocol 2 writes byte strings


def _no_bytes() -> bytes:
    return b""  # how protocol 2 writes an empty byte string


def _paddle_dense(expression: str, scope: Mapping[str, Any]) -> Any:
    """Stands for the `eval("data", {"data": array})` that Paddle writes for some tensors."""
    if expression != "data":
        raise ValueError("an expression to evaluate")
    return scope["data"]


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "tuple"): tuple,
    ("builtins", "eval"): _paddle_dense,
    ("builtins", "bytes"): _no_bytes,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _numpy_array,
    ("numpy._core.multiarray", "_reconstruct"): _numpy_array,
    ("torch._utils", "_rebuild_tensor_v2"): _torch_tensor,
    ("torch._utils", "_rebuild_parameter"): _torch_parameter,
    **{("torch", storage): dtype for storage, dtype in _STORAGES.items()},
}


class _Unpickler(pickle._Unpickler):  # the one in Python: its handling of each opcode can be replaced
    """Knows the names of tensor files only and leaves large byte strings in the file."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: mmap.mmap | io.BytesIO, path: Path) -> None:
        super().__init__(file)
        self._path = path
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module.replace("__builtin__", "builtins"), name]  # its name in protocol 2
        except KeyError:
            if module == "torch._utils" and name.startswith("_rebuild_"):
                raise UserError(
                    f"{self._path}: holds tensors of a kind that is not read here ({name}: quantized, sparse or of a "
                    "newer type); save the model as safetensors in float32, float16 or bfloat16"
                ) from None
            raise UserError(
                f"{self._path}: refused: it asks for {module}.{name} to be run while loading, which files of "
                "tensors never need; get the weights as safetensors from a source that you trust"
            ) from None

    def persistent_load(self, identity: Any) -> _Storage:
        kind, dtype, key, *_ = identity
        if kind != "storage" or dtype not in DTYPES:
            raise ValueError("an unknown kind of storage")
        return _Storage(dtype, str(key))

    def _bytes(self, size: int) -> bytes | _FileBytes:
        unframer = self._unframer  # type: ignore[attr-defined]  # set by load(), as are read and append
        if size < _LAZY_BYTES or unframer.current_frame is not None:
            return self.read(size)  # type: ignore[attr-defined]
        place = _FileBytes(self._file.tell(), size)
        self._file.seek(size, 1)
        return place

    def load_binbytes(self) -> None:
        self.append(self._bytes(struct.unpack("<I", self.read(4))[0]))  # type: ignore[attr-defined]

    def load_binbytes8(self) -> None:
        self.append(self._bytes(struct.unpack("<Q", self.read(8))[0]))  # type: ignore[attr-defined]

    def load_build(self) -> None:
        state = self.stack.pop()  # type: ignore[attr-defined]
        subject = self.stack[-1]  # type: ignore[attr-defined]
        if isinstance(subject, (_Array, _Dtype)):
            subject.restore(state)
        elif not isinstance(subject, OrderedDict):  # PyTorch hangs version numbers on it: not needed
            raise ValueError("an object that is no tensor")

    dispatch[pickle.BINBYTES[0]] = load_binbytes
    dispatch[pickle.BINBYTES8[0]] = load_binbytes8
    dispatch[pickle.BUILD[0]] = load_build


def _load(file: mmap.mmap | io.BytesIO, path: Path) -> Mapping[str, Any]:
    content = _Unpickler(file, path).load()
    if not isinstance(content, Mapping):
        raise ValueError(f"a {type(content).__name__} instead of named tensors")
    return content


def _damaged(path: Path, error: BaseException) -> UserError:
    return UserError(
        f"{path}: not a readable file of tensors ({error}); download it again, or convert it to safetensors "
        "with the tool that wrote it"
    )


def open_pdparams(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file written by `paddle.save(state_dict, path)`.

    Raises:
        UserError: the file is damaged or holds anything but named tensors.
    """
    tensors: dict[str, LazyTensor] = {}
    try:
        # A map of the file gives what there is, however much a damaged length asks for.
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            content = _load(view, path)
            if view.read(1):
                raise ValueError("bytes after its end")
        for name, value in content.items():
            if name == "StructuredToParameterName@@":  # Paddle's internal names beside the tensors
                continue
            array = value[1] if isinstance(value, tuple) and len(value) == 2 else value
            if not isinstance(array, _Array):
                raise ValueError(f"{name} is no tensor")
            tensors[str(name)] = array.lazy(str(name), path)
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    return tensors


def open_bin(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file written by `torch.save(state_dict, path)` of PyTorch 1.6 or newer.

    Raises:
        UserError: the file is damaged, of the older format, or holds anything but named tensors.
    """
    tensors: dict[str, LazyTensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1:
                raise ValueError("not a PyTorch archive")
            root = names[0].removesuffix("data.pkl")
            if f"{root}byteorder" in archive.namelist() and _stored(archive, f"{root}byteorder") != b"little":
                raise ValueError("its values are big-endian")
            content = _load(io.BytesIO(_stored(archive, names[0])), path)
            entries = {info.filename.removeprefix(f"{root}data/"): info for info in archive.infolist()}
        for name, tensor in content.items():
            if not isinstance(tensor, _TorchTensor):
                raise ValueError(f"{name} is no tensor")
            tensors[str(name)] = _view(str(name), tensor, path, entries[tensor.storage.key])
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    return tensors


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """An entry that lies in the archive as it is, as PyTorch writes all of them: no larger than the file."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    return archive.read(name)


def _view(name: str, tensor: _TorchTensor, path: Path, entry: zipfile.ZipInfo) -> LazyTensor:
    kind = np.dtype(DTYPES[tensor.storage.dtype][1])
    room = entry.file_size // kind.itemsize
    last = tensor.offset + sum(
        (length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    empty = 0 in tensor.shape
    if entry.compress_type != zipfile.ZIP_STORED or min((tensor.offset, *tensor.strides, *tensor.shape)) < 0:
        raise ValueError(f"tensor {name} is stored in an unknown way")
    if not empty and last >= room:
        raise ValueError(f"tensor {name} lies outside its storage")

    def read() -> np.ndarray:
        if empty:
            return np.empty(tensor.shape, kind)
        flat = mapped(path, tensor.storage.dtype, (room,), _data_offset(path, entry))[tensor.offset :]
        strides = [stride * kind.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)

    return LazyTensor(name, tensor.storage.dtype, tensor.shape, read)


def _data_offset(path: Path, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind its local header, whose name and extra field vary in length."""
    with open(path, "rb") as file:
        file.seek(entry.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    return entry.header_offset + 30 + int(name) + int(extra)
