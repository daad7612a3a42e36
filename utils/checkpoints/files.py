"""Files that are never seen half-written: write beside, flush to disk, rename.

Every process keeps what it writes locked, so that the next one of the same target can tell, and remove, what a dead
one has left; also in other containers and on other machines, where a process number says nothing.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from utils.errors import raise_if
from utils.paths import READ_ONLY, descriptor, is_read_only, is_stream, read_only_in
from utils.signals import unfinished

COMPLETE = ".complete.json"  # lists the files and sizes of a folder that `atomic_directory` has written
_SHOWN = 3
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)  # of a file that lies on no disk


def cache_root() -> Path:
    """The folder of everything that can be made again: PADDLE_LLM_CACHE, else under the user's cache."""
    chosen = os.environ.get("PADDLE_LLM_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paddle-llm-toolchain"


def _check_target(path: Path, target: Path) -> None:
    """Raises `OSError` for `path`, which names `target`, if that is closed to everybody."""
    if is_read_only(target):
        raise PermissionError(errno.EACCES, READ_ONLY, str(path))


def check_replaceable(paths: Iterable[Path]) -> None:
    """For files and folders that a run is going to replace or remove: asked before it has done any work.

    Raises:
        UserError: something there is read-only; names the first ones.
    """
    raise_if([f"{path}: {READ_ONLY}" for path in read_only_in(paths)[:_SHOWN]])


@contextmanager
def _named(path: Path, target: Path) -> Iterator[None]:
    """Names `path` in an error of the system that names no file, or only the place where `target` is made."""
    try:
        yield
    except OSError as error:
        names = (str(error.filename), str(error.filename2))  # of a copy the second one is written
        made = any(name.startswith(_beginning(target)) for name in names)
        if error.errno is None or (error.filename is not None and not made):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


# --- what is being made ----------------------------------------------------------------------------


def _beginning(target: Path) -> str:
    """How the names of the places begin where `target` is made."""
    return str(target.with_name(f".{target.name}.tmp-"))


def _sibling(target: Path) -> Path:
    return Path(f"{_beginning(target)}{os.getpid()}-{secrets.token_hex(4)}")


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes what dead processes have left of the files and folders that they were writing into `folder`.

    Args:
        name: of the only file or folder to look after.
    """
    left = re.compile(rf"\.({'.+' if name is None else re.escape(name)})\.tmp-\d+-[0-9a-f]{{8}}", re.DOTALL)
    with suppress(OSError):
        for path in folder.iterdir():
            if (match := left.fullmatch(path.name)) is None or path.is_symlink() or is_stream(path):
                continue
            whole = path.is_dir() and is_complete(path) and not (folder / match[1]).exists()
            if not whole:  # else its process died while it put the new folder in the place of the old one
                with suppress(OSError):
                    _remove_unlocked(path)


def remove(path: Path) -> None:
    """Removes a file or a folder; of a link, not what it names."""
    path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)


def _remove_unlocked(path: Path) -> None:
    """Removes a file or folder, unless a process keeps it locked."""
    inside = path / COMPLETE if path.is_dir() else path
    with open(inside, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink() if inside == path else shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(path, ignore_errors=True)  # network file systems keep the files that are open


def _locked(file: BinaryIO) -> bool:
    """Locks a new file; False if another process has taken it for a leftover and removed it."""
    with suppress(OSError):  # a file system without locks; where nobody can lock, nobody removes
        fcntl.flock(file, fcntl.LOCK_EX)
    return os.fstat(file.fileno()).st_nlink > 0


def _new_file(target: Path) -> tuple[Path, BinaryIO]:
    while True:
        staging = _sibling(target)
        file = open(staging, "wb")  # noqa: SIM115 - closed by the caller
        if _locked(file):
            return staging, file
        file.close()


def _new_folder(target: Path) -> tuple[Path, BinaryIO]:
    """A new folder beside `target`, and its lock: the file COMPLETE in it."""
    while True:
        staging = _sibling(target)
        staging.mkdir()
        try:
            file = open(staging / COMPLETE, "wb")  # noqa: SIM115 - closed by the caller
        except FileNotFoundError:  # taken for a leftover
            continue
        if _locked(file):
            return staging, file
        file.close()


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` for what is to be moved from there; it is removed in the end."""
    with _named(target, target), _staging(target) as (folder, _):
        yield folder


@contextmanager
def _staging(target: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A hidden folder beside `target`, and its file COMPLETE."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, target.name)
    staging, lock = _new_folder(target)
    with unfinished(staging):
        try:
            yield staging, lock
        finally:
            with suppress(OSError):  # of what could not be written; what counts has been flushed
                lock.close()


def sync(file: BinaryIO) -> None:
    """Has the system put on disk what was written, which may fail only now."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- files -----------------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears as `path`, complete and on disk, when the block ends well.

    An exception in the block leaves what was at `path` before. Links are followed. What is no ordinary file
    (`is_stream`) is written into as it is, and so is, in the end, a file that is mounted.

    Raises:
        OSError: it cannot be written, or is read-only; names `path`.
    """
    path = Path(path)
    if is_stream(path):
        with _named(path, path), _opened_stream(path) as file:
            yield file
            sync(file)
        return
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    _check_target(path, target)
    with _named(path, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, target.name)
        staging, file = _new_file(target)
        with unfinished(staging), file:
            yield file
            sync(file)
            _keep_mode(target, staging)
            _replace_file(staging, target)
            _sync_folder(target.parent)


def _replace_file(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        with open(source, "rb") as whole, open(target, "wb") as file:  # a mount of its own, as in containers
            shutil.copyfileobj(whole, file)
            sync(file)


def _opened_stream(path: Path) -> BinaryIO:
    """An open file of this process shares its place, so that what else is written there stays."""
    place = descriptor(path)
    if place is not None and os.path.dirname(place) == os.path.realpath("/proc/self/fd"):
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        return os.fdopen(os.dup(int(os.path.basename(place))), "wb")
    return open(path, "ab")


def _keep_mode(target: Path, new: Path) -> None:
    """What is replaced may be read by whom it could be read before."""
    if target.exists():
        os.chmod(new, stat.S_IMODE(target.stat().st_mode))


def atomic_write(path: Path, content: bytes | str) -> None:
    """Writes a whole file (text as UTF-8), see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def json_bytes(value: object, indent: int | None = None) -> bytes:
    """JSON as people read it, in UTF-8.

    Half of a surrogate pair, which names that are no UTF-8 consist of in Python, is written as JSON's \\udXXX.
    """
    return json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace")


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file as people read it, see `atomic_file`."""
    atomic_write(path, json_bytes(value, indent=2) + b"\n")


# --- folders ---------------------------------------------------------------------------------------


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `target`, complete and on disk, when the block ends well.

    What was at `target` before stays until then and is replaced as a whole. An exception leaves it as
    it was. Links are followed.

    Raises:
        OSError: it cannot be written, names `target`; or something in it is read-only, names that.
    """
    named = Path(os.path.abspath(target))
    target = Path(os.path.realpath(named))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(named))
    for path in read_only_in([target])[:1]:
        raise PermissionError(errno.EACCES, READ_ONLY, str(named / path.relative_to(target)))
    with _named(named, target), _staging(target) as (staging, complete):
        yield staging
        sizes = {}
        for file in sorted(path for path in staging.rglob("*") if path.is_file() and path != staging / COMPLETE):
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
            sizes[file.relative_to(staging).as_posix()] = file.stat().st_size
        complete.write(json_bytes({"files": sizes}))
        sync(complete)
        for folder in (path for path in (staging, *staging.rglob("*")) if path.is_dir()):
            _sync_folder(folder)
        _keep_mode(target, staging)
        _replace_directory(staging, target)


def _replace_directory(source: Path, target: Path) -> None:
    """Puts `source` in the place of `target`; the old content, if any, is left under the name `source`."""
    if not target.exists():
        os.rename(source, target)
    elif not _exchange(source, target):
        aside = _sibling(target)
        os.rename(target, aside)
        try:
            os.rename(source, target)
        except BaseException:
            os.rename(aside, target)
            raise
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
        atomic_write(folder / COMPLETE, json_bytes({"files": sizes}))


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
