"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utils.checkpoints import files
from utils.checkpoints.files import atomic_directory, atomic_file, atomic_write, cache_root, is_complete


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
    assert all(name.startswith(".model.tmp-") for name in left)
    assert not any(is_complete(tmp_path / name) for name in left)


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
