"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from full_disk import full_disk

from utils.checkpoints import files
from utils.checkpoints.files import (
    atomic_directory,
    atomic_file,
    atomic_write,
    cache_root,
    is_complete,
    remove,
    remove_leftovers,
    write_json,
)
from utils.errors import reason


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    atomic_write(tmp_path / "deep" / "a.txt", "old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "deep" / "a.txt") as file:
        file.write(b"half")
        raise RuntimeError
    assert (tmp_path / "deep" / "a.txt").read_text() == "old"
    atomic_write(tmp_path / "deep" / "a.txt", "né")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == "né".encode()
    assert names(tmp_path / "deep") == ["a.txt"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda _first, _second: False)
    for round_number in range(3):
        with atomic_directory(tmp_path / "model") as folder:
            (folder / f"file{round_number}").write_text("x")
            (folder / "sub").mkdir()
            (folder / "sub" / "y").write_text("y")
        assert names(tmp_path / "model") == [".complete.json", f"file{round_number}", "sub"]
        assert is_complete(tmp_path / "model")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "model") as folder:
        (folder / "other").write_text("x")
        raise RuntimeError
    assert names(tmp_path / "model") == [".complete.json", "file2", "sub"]
    assert names(tmp_path) == ["model"]


def test_incomplete_folders_are_known(tmp_path: Path) -> None:
    assert not is_complete(tmp_path)
    assert not is_complete(tmp_path / "nowhere")
    with atomic_directory(tmp_path / "model") as folder:
        (folder / "a").write_text("aaa")
        (folder / "b").write_text("bbb")
    (tmp_path / "model" / "c").write_text("what is added later does not matter")
    assert is_complete(tmp_path / "model")
    (tmp_path / "model" / "a").write_text("aa")
    assert not is_complete(tmp_path / "model")
    (tmp_path / "model" / "a").unlink()
    assert not is_complete(tmp_path / "model")


def test_kill_while_writing_leaves_the_old_folder(tmp_path: Path, root: Path) -> None:
    with atomic_directory(tmp_path / "model") as folder:
        (folder / "a").write_text("old")
    script = (
        "import sys, time; from pathlib import Path; from utils.checkpoints.files import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'a').write_text('new'); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "model")], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "model" / "a").read_text() == "old"
    assert is_complete(tmp_path / "model")
    left = [name for name in names(tmp_path) if name != "model"]
    assert len(left) == 1 and left[0].startswith(".model.tmp-") and not is_complete(tmp_path / left[0])
    with atomic_directory(tmp_path / "model") as folder:
        (folder / "a").write_text("newer")
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "a").read_text() == "newer"


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PADDLE_LLM_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("PADDLE_LLM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "paddle-llm-toolchain"


def test_permissions_are_the_users_usual_ones(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "model") as folder:
        atomic_write(folder / "a", "x")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a").write_text("x")
    assert os.stat(tmp_path / "model").st_mode == os.stat(tmp_path / "plain").st_mode
    assert os.stat(tmp_path / "model" / "a").st_mode == os.stat(tmp_path / "plain" / "a").st_mode


def test_links_are_followed(tmp_path: Path) -> None:
    """What is written to a link comes beside its target and takes its place; the link stays one."""
    (tmp_path / "disk").mkdir()
    atomic_write(tmp_path / "disk" / "a.txt", "old")
    (tmp_path / "a.txt").symlink_to("disk/a.txt")
    (tmp_path / "new.txt").symlink_to(tmp_path / "disk" / "deep" / "new.txt")
    (tmp_path / "model").symlink_to("disk/model")
    for name in ("a.txt", "new.txt"):
        with atomic_file(tmp_path / name) as file:
            file.write(b"new")
            assert [left for left in names(tmp_path) if ".tmp-" in left] == []
    for content in ("first", "second"):
        with atomic_directory(tmp_path / "model") as folder:
            assert folder.parent == tmp_path / "disk"
            (folder / "a").write_text(content)
    assert all((tmp_path / name).is_symlink() for name in ("a.txt", "new.txt", "model"))
    assert names(tmp_path / "disk") == ["a.txt", "deep", "model"]
    assert (tmp_path / "disk" / "a.txt").read_text() == (tmp_path / "disk" / "deep" / "new.txt").read_text() == "new"
    assert (tmp_path / "disk" / "model" / "a").read_text() == "second" and is_complete(tmp_path / "model")


def test_what_is_no_ordinary_file_is_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        atomic_write(tmp_path / name, "some text")
        assert os.read(reader, 100) == b"some text"
        os.close(reader)
    assert names(tmp_path) == ["link", "pipe"] and (tmp_path / "pipe").is_fifo()


def test_a_file_that_is_mounted_is_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container has single files; tests may mount nothing, so this is what the system says then."""
    atomic_write(tmp_path / "a.txt", "a longer old text")
    file = (tmp_path / "a.txt").stat().st_ino

    def busy(source: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(source))

    monkeypatch.setattr(os, "replace", busy)
    atomic_write(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new" and (tmp_path / "a.txt").stat().st_ino == file
    assert names(tmp_path) == ["a.txt"]


def test_an_open_file_keeps_what_is_written_there(tmp_path: Path, root: Path) -> None:
    """A process writes to its own standard output, which is a file, under the name that the system has for it."""
    code = (
        "from pathlib import Path; from utils.checkpoints.files import atomic_write\n"
        "print('before')\natomic_write(Path('/dev/stdout'), 'between\\n')\nprint('after')\n"
    )
    with open(tmp_path / "out", "wb") as file:
        file.write(b"first\n")
        file.flush()
        subprocess.run([sys.executable, "-c", code], stdout=file, cwd=root, check=True)
    assert (tmp_path / "out").read_text() == "first\nbefore\nbetween\nafter\n"
    assert names(tmp_path) == ["out"]


def test_what_is_read_only_is_refused(tmp_path: Path) -> None:
    """Also by root, whom the system lets write."""
    atomic_write(tmp_path / "a.txt", "old")
    (tmp_path / "model").mkdir()
    for path, mode in ((tmp_path / "a.txt", 0o444), (tmp_path / "model", 0o555)):
        path.chmod(mode)
        with pytest.raises(PermissionError) as refused:
            if path.is_dir():
                with atomic_directory(path):
                    pass
            else:
                atomic_write(path, "new")
        assert reason(refused.value) == f"{path}: is read-only; chmod u+w allows to replace it"
    assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == ["a.txt", "model"]
    (tmp_path / "model").chmod(0o755)
    (tmp_path / "model" / "kept").write_text("old")
    (tmp_path / "model" / "link").symlink_to(tmp_path / "a.txt")  # which stays, whatever becomes of its name here
    (tmp_path / "model" / "kept").chmod(0o444)
    with pytest.raises(PermissionError, match="is read-only") as refused, atomic_directory(tmp_path / "model"):
        pass
    assert refused.value.filename == str(tmp_path / "model" / "kept")
    (tmp_path / "model" / "kept").chmod(0o644)
    with atomic_directory(tmp_path / "model"):
        pass
    assert (tmp_path / "a.txt").read_text() == "old" and not (tmp_path / "model" / "kept").exists()
    with pytest.raises(NotADirectoryError), atomic_directory(tmp_path / "a.txt"):
        pass


def test_what_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    for mode in (0o600, 0o664):
        atomic_write(tmp_path / "a.txt", "x")
        (tmp_path / "a.txt").chmod(mode)
        atomic_write(tmp_path / "a.txt", "y")
        with atomic_directory(tmp_path / "model"):
            pass
        (tmp_path / "model").chmod(mode | 0o100)
        with atomic_directory(tmp_path / "model"):
            pass
        assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode
        assert (tmp_path / "model").stat().st_mode & 0o777 == mode | 0o100


def test_leftovers_of_the_dead_only(tmp_path: Path) -> None:
    """A process number says nothing, in a container least of all: what counts is whether anybody holds the lock."""
    dead, mine = ".a.tmp-1-0123abcd", [".a.tmp-1-0123abcd.txt", ".a.tmp-yes", "a.tmp-1-0123abcd", ".b.tmp-1-0123abcd"]
    for name in (dead, *mine):
        (tmp_path / name).write_text("x")
    (tmp_path / ".model.tmp-1-0123abcd" / "sub").mkdir(parents=True)
    with atomic_file(tmp_path / "a") as file, atomic_directory(tmp_path / "model") as folder:
        file.write(b"mine")
        (folder / "b").write_text("mine")
        code = (
            "import sys; from pathlib import Path; from utils.checkpoints.files import *\n"
            "atomic_write(Path(sys.argv[1], 'a'), 'other')\n"
            "with atomic_directory(Path(sys.argv[1], 'model')) as folder: (folder / 'b').write_text('other')\n"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(files.__file__).parents[2])
        assert (tmp_path / "a").read_text() == (tmp_path / "model" / "b").read_text() == "other"
        assert dead not in names(tmp_path) and ".model.tmp-1-0123abcd" not in names(tmp_path)
    assert (tmp_path / "a").read_text() == (tmp_path / "model" / "b").read_text() == "mine"
    assert names(tmp_path) == sorted([*mine, "a", "model"])
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*mine[:3], "a", "model"])


def test_an_old_folder_that_a_dead_process_had_put_aside_stays(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "model") as folder:
        (folder / "a").write_text("old")
    os.rename(tmp_path / "model", tmp_path / ".model.tmp-1-0123abcd")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".model.tmp-1-0123abcd"]
    os.rename(tmp_path / ".model.tmp-1-0123abcd", tmp_path / "model")
    assert is_complete(tmp_path / "model")


def test_a_full_disk_is_told_with_the_name_that_was_given(tmp_path: Path) -> None:
    """Whatever the system's own error names: nothing, or the place where the file was being made."""
    atomic_write(tmp_path / "a.txt", "old")
    with atomic_directory(tmp_path / "model") as folder:
        (folder / "a").write_text("old")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "source").write_text("x" * 10_000)
    place = str(tmp_path / "link")
    with full_disk(1000):
        with pytest.raises(OSError) as found:
            atomic_write(tmp_path / "a.txt", "x" * 10_000)
        assert (found.value.errno, found.value.filename) == (errno.EFBIG, str(tmp_path / "a.txt"))
        with pytest.raises(OSError) as found, atomic_directory(tmp_path / "link") as folder:
            atomic_write(folder / "deep" / "a", "x" * 10_000)
        assert (found.value.errno, found.value.filename) == (errno.EFBIG, place)
        with pytest.raises(OSError) as found, atomic_directory(tmp_path / "link") as folder:
            shutil.copyfile(tmp_path / "source", folder / "copy")
        assert (found.value.errno, found.value.filename) == (errno.EFBIG, place)
        with pytest.raises(FileNotFoundError) as found, atomic_directory(tmp_path / "link") as folder:
            (folder / "nowhere").read_text()
        assert found.value.filename == place
    (tmp_path / "source").unlink()
    with pytest.raises(OSError) as found:  # of the name under which it would be made
        atomic_write(tmp_path / ("x" * 240), "x")
    assert (found.value.errno, found.value.filename) == (errno.ENAMETOOLONG, str(tmp_path / ("x" * 240)))
    assert names(tmp_path) == ["a.txt", "link", "model"]
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "model" / "a").read_text() == "old"


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.json")
    write_json(tmp_path / name, {"file": name, "text": "né"})
    content = (tmp_path / name).read_text("utf-8")
    assert json.loads(content) == {"file": name, "text": "né"} and "né" in content
    assert names(tmp_path) == [name]


def test_of_a_link_only_the_link_is_removed(tmp_path: Path) -> None:
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("link", "dangling"):
        remove(tmp_path / name)
    assert names(tmp_path) == ["disk"] and (tmp_path / "disk" / "deep").is_dir()
    remove(tmp_path / "disk")
    assert names(tmp_path) == []
