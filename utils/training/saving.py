"""Checkpoints that all ranks write together, each its own files, and that appear whole or not at all.

The files do not tell the layout of the run: every tensor in them is whole.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from utils.checkpoints.save import MAX_SHARD_BYTES
from utils.checkpoints.tensors import LazyTensor, divided, in_memory, open_tensors, shard_names, write_index, write_lazy
from utils.errors import UserError
from utils.parallel.process_group import ALONE_SECONDS, ProcessGroup

_METADATA = {"format": "np"}
_LOOK_SECONDS = 0.1  # between two looks for the files of other ranks
_SETTLE_SECONDS = 60.0  # of a run that fails, for what it is writing


@dataclass(frozen=True)
class CheckpointShard:
    """What a rank has for the files of one name.

    Attributes:
        stem: the files are `STEM.safetensors`, or numbered with an index if there are several.
        tensors: in their order. Reading may be an exchange with other ranks, so every rank reads all of its own.
        writes: whether this rank writes them; another one has the same, or is to be helped by reading.
        single: one file, whatever the number of ranks.
        own: one file of each rank, whose `stem` is its own.
    """

    stem: str
    tensors: Sequence[LazyTensor]
    writes: bool = True
    single: bool = False
    own: bool = False


class Saver:
    """Writes folders of tensors with the other ranks.

    Args:
        background: values are copied, and the run goes on while a thread writes them.
    """

    def __init__(
        self, processes: ProcessGroup, *, background: bool = False, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self.processes, self.background, self.max_shard_bytes = processes, background, max_shard_bytes
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self,
        place: Callable[[], AbstractContextManager[Path]],
        checkpoint_shards: Sequence[CheckpointShard],
        alone: Callable[[Path], None],
        *,
        target: Path | None = None,
        after: Callable[[], None] = lambda: None,
        background: bool | None = None,
    ) -> None:
        """Writes a folder; every rank calls this.

        Args:
            place: opens the folder on the first rank, and puts it into place when all is written.
            checkpoint_shards: of this rank, the same names in the same order on all ranks.
            alone: writes what belongs beside, on the first rank.
            target: where the folder will be, for messages.
            after: what the first rank does when the folder is in place.
            background: instead of the saver's own way.

        Raises:
            UserError: it could not be written.
        """
        self.wait()
        background = self.background if background is None else background
        with ExitStack() as opened, _said(target):
            own = str(opened.enter_context(place())) if self.processes.first else ""
            folder = Path(self.processes.gather(own)[0])
            plans = [self._plan(checkpoint_shard) for checkpoint_shard in checkpoint_shards]
            if background:
                checkpoint_shards = [_copied(checkpoint_shard) for checkpoint_shard in checkpoint_shards]
            closing = opened.pop_all()

        def work(together: bool) -> None:
            with _said(target), closing:
                try:
                    for checkpoint_shard, plan in zip(checkpoint_shards, plans, strict=True):
                        self._write(folder, checkpoint_shard, plan)
                except FileNotFoundError:
                    if self.processes.first or folder.is_dir():
                        raise
                    # else rank 0 has given up, and says why
                if together:
                    self.processes.barrier("waiting for other ranks to write")
                if self.processes.first:
                    self._complete(folder, checkpoint_shards, plans)
                    alone(folder)
            if self.processes.first:
                after()

        if background:
            self._thread = threading.Thread(target=self._guarded, args=(work,), name="saving", daemon=True)
            self._thread.start()
        else:
            work(True)
            self.processes.barrier("waiting for rank 0 to save")

    def wait(self) -> None:
        """Returns when what is being written in the background is in place, on all ranks.

        Raises:
            UserError: it could not be written.
        """
        if self._thread is None:
            return
        while self._thread.is_alive():
            self._thread.join(_LOOK_SECONDS)
            self.processes.check()
        self._thread = None
        self.check()
        self.processes.barrier("waiting for rank 0 to save")

    def check(self) -> None:
        """Returns at once; raises `UserError` if what this rank has been writing in the background cannot be."""
        if self._failure is not None:
            raise self._failure

    def settle(self) -> None:
        """Gives what is being written the time to end, before the run ends for another reason."""
        started = time.monotonic()
        with suppress(UserError):  # another rank has failed before, and writes nothing more
            while self._thread and self._thread.is_alive() and time.monotonic() - started < _SETTLE_SECONDS:
                self._thread.join(_LOOK_SECONDS)
                self.processes.check()

    def _guarded(self, work: Callable[[bool], None]) -> None:
        try:
            work(False)
        except BaseException as error:  # raised by `wait`, in the run's own thread
            self._failure = error

    def _plan(self, checkpoint_shard: CheckpointShard) -> list[dict[str, dict[str, int]]]:
        """The files of every rank with the sizes of their tensors."""
        shards = divided(checkpoint_shard.tensors, self.max_shard_bytes) if checkpoint_shard.writes else []
        if (checkpoint_shard.single or checkpoint_shard.own) and shards:
            shards = [list(checkpoint_shard.tensors)]
        sizes = [{tensor.name: tensor.nbytes for tensor in shard} for shard in shards]
        if checkpoint_shard.own:
            return self.processes.gather({f"{checkpoint_shard.stem}.safetensors": shard for shard in sizes})
        ranks = self.processes.gather(sizes)
        names = iter(shard_names(checkpoint_shard.stem, sum(map(len, ranks))))
        return [{next(names): shard for shard in shards} for shards in ranks]

    def _write(self, folder: Path, checkpoint_shard: CheckpointShard, plan: list[dict[str, dict[str, int]]]) -> None:
        if not checkpoint_shard.writes:
            for tensor in checkpoint_shard.tensors:
                tensor.read()
            return
        tensors = {tensor.name: tensor for tensor in checkpoint_shard.tensors}
        for file, names in plan[self.processes.layout.rank].items():
            write_lazy(folder / file, [tensors[name] for name in names], _METADATA)

    def _complete(
        self, folder: Path, checkpoint_shards: Sequence[CheckpointShard], plans: list[list[dict[str, dict[str, int]]]]
    ) -> None:
        """Waits for the files of all ranks and joins or lists them."""
        started = time.monotonic()
        for checkpoint_shard, plan in zip(checkpoint_shards, plans, strict=True):
            files = {file: tensors for rank in plan for file, tensors in rank.items()}
            while missing := [file for file in files if not (folder / file).is_file()]:
                if time.monotonic() - started > ALONE_SECONDS:
                    raise UserError(f"{folder}: other ranks have not written {', '.join(missing)}")
                time.sleep(_LOOK_SECONDS)
            if checkpoint_shard.own:
                continue
            if len(files) > 1 and checkpoint_shard.single:
                parts = [tensor for file in files for tensor in open_tensors(folder / file).values()]
                write_lazy(folder / shard_names(checkpoint_shard.stem, 1)[0], parts, _METADATA)
                for file in files:
                    (folder / file).unlink()
            elif len(files) > 1:
                write_index(folder, checkpoint_shard.stem, files)


def _copied(checkpoint_shard: CheckpointShard) -> CheckpointShard:
    """The shard with its present values, of which a rank that does not write keeps none."""
    copies = []
    for tensor in checkpoint_shard.tensors:
        values = tensor.read()
        if checkpoint_shard.writes:
            copies.append(in_memory(tensor.name, np.array(values)))
    return replace(checkpoint_shard, tensors=copies)


@contextmanager
def _said(target: Path | None) -> Iterator[None]:
    """Turns errors of the file system into what the user can mend."""
    try:
        yield
    except OSError as error:
        said = f"{target or error.filename or 'a folder'} could not be written: {error.strerror or error}"
        raise UserError(f"{said}; what was there before stays") from error
