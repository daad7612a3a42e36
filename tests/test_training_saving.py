"""Folders that several ranks write together, at once or in the background; ranks are threads here."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from tiny_runs import tensors

from utils.checkpoints.files import atomic_directory, is_complete
from utils.checkpoints.locate import stored_tensors
from utils.checkpoints.tensors import LazyTensor, write_lazy
from utils.errors import UserError
from utils.parallel.process_group import ProcessGroup
from utils.parallel.topology import Layout
from utils.training import saving
from utils.training.saving import CheckpointShard, Saver


class Together(ProcessGroup):
    """One of several ranks in threads of this process."""

    def __init__(self, layout: Layout, barrier: threading.Barrier, shared: dict[int, Any]) -> None:
        super().__init__(layout)
        self.meeting, self.shared = barrier, shared

    def barrier(self, what: str, seconds: float = 10) -> None:
        self.meeting.wait(10)

    def gather(self, value: Any) -> list[Any]:
        self.shared[self.layout.rank] = value
        self.barrier("")
        found = [self.shared[rank] for rank in range(self.layout.world)]
        self.barrier("")
        return found


def ranks(count: int, work: Callable[[ProcessGroup], Any]) -> list[Any]:
    """What `work` returns on every rank."""
    if count == 1:
        return [work(ProcessGroup())]
    barrier, shared = threading.Barrier(count), {}
    layouts = [Layout(world=count, rank=rank, pipeline=count) for rank in range(count)]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda layout: work(Together(layout, barrier, shared)), layouts))


def tensor(name: str, values: np.ndarray) -> LazyTensor:
    return LazyTensor(name, "float32", values.shape, lambda: values)


def shards_of(processes: ProcessGroup, weights: np.ndarray) -> list[CheckpointShard]:
    rank = processes.layout.rank
    return [
        CheckpointShard("model", [tensor(f"w{rank}", weights)]),
        CheckpointShard("one", [tensor(f"v{rank}", weights)], single=True),
    ]


def beside(folder: Path) -> None:
    (folder / "notes.txt").write_text("beside")


class Slow:
    """A writer that does nothing until it may."""

    def __init__(self) -> None:
        self.may, self.begun = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any) -> None:
        self.begun.set()
        assert self.may.wait(10)
        write_lazy(*arguments)


@pytest.mark.parametrize("count", [1, 2])
def test_the_run_goes_on_while_a_checkpoint_is_written(count: int, tmp_path: Path) -> None:
    """What is written are the values of the moment of saving; the folder appears once all of it is there."""
    target, slow = tmp_path / "checkpoint-1", Slow()

    def train(processes: ProcessGroup) -> None:
        weights = np.full([3, 2], 1.0 + processes.layout.rank, dtype=np.float32)
        saver = Saver(processes, background=True)
        saver.save(partial(atomic_directory, target), shards_of(processes, weights), beside, target=target)
        for _ in range(5):  # steps of training
            weights += 10
            saver.check()
            processes.sums([1.0])
        assert slow.begun.wait(10) and not target.exists()
        processes.barrier("all have trained")
        slow.may.set()
        saver.wait()
        assert is_complete(target)

    with mock.patch.object(saving, "write_lazy", slow):
        ranks(count, train)

    def save(processes: ProcessGroup) -> None:
        weights = np.full([3, 2], 1.0 + processes.layout.rank, dtype=np.float32)
        place = partial(atomic_directory, tmp_path / "at once")
        Saver(processes).save(place, shards_of(processes, weights), beside)

    ranks(count, save)
    ours, wanted = ({path.name: path.read_bytes() for path in f.iterdir()} for f in (target, tmp_path / "at once"))
    assert ours == wanted
    stored = stored_tensors(target, "model")
    assert [stored[f"w{rank}"].read().max() for rank in range(count)] == [1.0 + rank for rank in range(count)]
    assert list(tensors(target / "one.safetensors")) == [f"v{rank}" for rank in range(count)]


def test_the_next_save_waits_for_the_one_before(tmp_path: Path) -> None:
    slow, saver, order = Slow(), Saver(ProcessGroup(), background=True), []
    with mock.patch.object(saving, "write_lazy", slow):
        for number in range(2):
            threading.Timer(0.2, slow.may.set).start()
            target, weights = tmp_path / f"checkpoint-{number}", np.zeros([2], dtype=np.float32)
            done = partial(order.append, number)
            saver.save(partial(atomic_directory, target), shards_of(saver.processes, weights), beside, after=done)
            assert order == list(range(number))
        saver.wait()
    assert order == [0, 1]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("count", "at"), [(1, 0), (2, 0), (2, 1)])
def test_a_full_disk(count: int, at: int, background: bool, tmp_path: Path) -> None:
    """The rank whose disk is full says so once; nothing is left, and what was there before stays."""
    target = tmp_path / "checkpoint-1"
    target.mkdir()
    (target / "before").write_text("")

    def write(path: Path, tensors: Sequence[LazyTensor], *arguments: Any) -> None:
        if tensors[0].name.endswith(str(at)):  # of the rank whose disk is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_lazy(path, tensors, *arguments)

    def train(processes: ProcessGroup) -> str:
        saver = Saver(processes, background=background)
        weights = np.zeros([2], dtype=np.float32)
        try:
            saver.save(partial(atomic_directory, target), shards_of(processes, weights), beside, target=target)
            if processes.layout.rank == at:
                saver.settle()
            saver.check()
        except UserError as error:
            if isinstance(processes, Together):
                processes.meeting.abort()
            return str(error)
        except threading.BrokenBarrierError:
            pass
        return ""

    with mock.patch.object(saving, "write_lazy", write), mock.patch.object(saving, "ALONE_SECONDS", 1.0):
        said = ranks(count, train)
    assert [bool(text) for text in said] == [rank == at for rank in range(count)]
    assert said[at] == f"{target} could not be written: No space left on device; what was there before stays"
    assert [path.name for path in target.iterdir()] == ["before"]
