"""Files that are never seen half-written: write beside, flush to disk, rename."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

COMPLETE = ".complete.json"  # lists the files and sizes of a folder that `atomic_directory` has written
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD


def cache_root() -> Path:
    """The folder of everything that can be made again: PADDLE_LLM_CACHE, else under the user's cache."""
    chosen = os.environ.get("PADDLE_LLM_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paddle-llm-toolchain"


def _sibling(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears as `path`, complete and on disk, when the block ends well.

    An exception in the block leaves what was at `path` before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = _sibling(path)
    try:
        with open(staging, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
        _sync_folder(path.parent)
    finally:
        staging.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Writes a whole file (text as UTF-8), see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file as people read it, see `atomic_file`."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `target`, complete and on disk, when the block ends well.

    What was at `target` before stays until then and is replaced as a whole. An exception leaves it as
    it was. A killed process leaves a hidden sibling `.NAME.tmp-...` that nothing reads.
    """
    target = Path(os.path.abspath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = _sibling(target)
    staging.mkdir()
    try:
        yield staging
        sizes = {}
        for file in sorted(path for path in staging.rglob("*") if path.is_file()):
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
            sizes[file.relative_to(staging).as_posix()] = file.stat().st_size
        atomic_write(staging / COMPLETE, json.dumps({"files": sizes}))
        for folder in (path for path in staging.rglob("*") if path.is_dir()):
            _sync_folder(folder)
        _replace_directory(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace_directory(source: Path, target: Path) -> None:
    """Puts `source` in the place of `target`; the old content, if any, is left under the name `source`."""
    if not target.exists():
        os.rename(source, target)
    elif not _exchange(source, target):
        aside = _sibling(target)
        os.rename(target, aside)
        os.rename(source, target)
        os.rename(aside, source)
    _sync_folder(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step; False where the system or its file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    if library.renameat2(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def renew_sizes(folder: Path) -> None:
    """Takes files that were added to a folder of `atomic_directory`, or changed in it, for its own from now on."""
    if (folder / COMPLETE).is_file():
        files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != COMPLETE)
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        atomic_write(folder / COMPLETE, json.dumps({"files": sizes}))


def is_complete(folder: Path) -> bool:
    """Whether `atomic_directory` finished this folder and all of its files still have their sizes."""
    try:
        sizes = _sizes(folder)
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def holds_nothing_else(folder: Path) -> bool:
    """Whether a folder holds only what `atomic_directory` put there, so that it may be replaced."""
    try:
        known = {*_sizes(folder), COMPLETE}
    except (OSError, ValueError, KeyError):
        return False
    return all(path.relative_to(folder).as_posix() in known for path in folder.rglob("*") if not path.is_dir())


def _sizes(folder: Path) -> dict[str, int]:
    return dict(json.loads((folder / COMPLETE).read_text())["files"])
