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
from utils.parallel.peers import ALONE_SECONDS, Alone

_METADATA = {"format": "np"}
_LOOK_SECONDS = 0.1  # between two looks for the files of other ranks
_SETTLE_SECONDS = 60.0  # of a run that fails, for what it is writing


@dataclass(frozen=True)
class Piece:
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

    def __init__(self, peers: Alone, *, background: bool = False, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.peers, self.background, self.max_shard_bytes = peers, background, max_shard_bytes
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self,
        place: Callable[[], AbstractContextManager[Path]],
        pieces: Sequence[Piece],
        alone: Callable[[Path], None],
        *,
        target: Path | None = None,
        after: Callable[[], None] = lambda: None,
        background: bool | None = None,
    ) -> None:
        """Writes a folder; every rank calls this.

        Args:
            place: opens the folder on the first rank, and puts it into place when all is written.
            pieces: of this rank, the same names in the same order on all ranks.
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
            own = str(opened.enter_context(place())) if self.peers.first else ""
            folder = Path(self.peers.gather(own)[0])
            plans = [self._plan(piece) for piece in pieces]
            if background:
                pieces = [_copied(piece) for piece in pieces]
            closing = opened.pop_all()

        def work(together: bool) -> None:
            with _said(target), closing:
                try:
                    for piece, plan in zip(pieces, plans, strict=True):
                        self._write(folder, piece, plan)
                except FileNotFoundError:
                    if self.peers.first or folder.is_dir():
                        raise
                    # else rank 0 has given up, and says why
                if together:
                    self.peers.gate("waiting for other ranks to write")
                if self.peers.first:
                    self._complete(folder, pieces, plans)
                    alone(folder)
            if self.peers.first:
                after()

        if background:
            self._thread = threading.Thread(target=self._guarded, args=(work,), name="saving", daemon=True)
            self._thread.start()
        else:
            work(True)
            self.peers.gate("waiting for rank 0 to save")

    def wait(self) -> None:
        """Returns when what is being written in the background is in place, on all ranks.

        Raises:
            UserError: it could not be written.
        """
        if self._thread is None:
            return
        while self._thread.is_alive():
            self._thread.join(_LOOK_SECONDS)
            self.peers.check()
        self._thread = None
        self.check()
        self.peers.gate("waiting for rank 0 to save")

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
                self.peers.check()

    def _guarded(self, work: Callable[[bool], None]) -> None:
        try:
            work(False)
        except BaseException as error:  # raised by `wait`, in the run's own thread
            self._failure = error

    def _plan(self, piece: Piece) -> list[dict[str, dict[str, int]]]:
        """The files of every rank with the sizes of their tensors."""
        shards = divided(piece.tensors, self.max_shard_bytes) if piece.writes else []
        if (piece.single or piece.own) and shards:
            shards = [list(piece.tensors)]
        sizes = [{tensor.name: tensor.nbytes for tensor in shard} for shard in shards]
        if piece.own:
            return self.peers.gather({f"{piece.stem}.safetensors": shard for shard in sizes})
        ranks = self.peers.gather(sizes)
        names = iter(shard_names(piece.stem, sum(map(len, ranks))))
        return [{next(names): shard for shard in shards} for shards in ranks]

    def _write(self, folder: Path, piece: Piece, plan: list[dict[str, dict[str, int]]]) -> None:
        if not piece.writes:
            for tensor in piece.tensors:
                tensor.read()
            return
        tensors = {tensor.name: tensor for tensor in piece.tensors}
        for file, names in plan[self.peers.layout.rank].items():
            write_lazy(folder / file, [tensors[name] for name in names], _METADATA)

    def _complete(self, folder: Path, pieces: Sequence[Piece], plans: list[list[dict[str, dict[str, int]]]]) -> None:
        """Waits for the files of all ranks and joins or lists them."""
        started = time.monotonic()
        for piece, plan in zip(pieces, plans, strict=True):
            files = {file: tensors for rank in plan for file, tensors in rank.items()}
            while missing := [file for file in files if not (folder / file).is_file()]:
                if time.monotonic() - started > ALONE_SECONDS:
                    raise UserError(f"{folder}: other ranks have not written {', '.join(missing)}")
                time.sleep(_LOOK_SECONDS)
            if piece.own:
                continue
            if len(files) > 1 and piece.single:
                parts = [tensor for file in files for tensor in open_tensors(folder / file).values()]
                write_lazy(folder / shard_names(piece.stem, 1)[0], parts, _METADATA)
                for file in files:
                    (folder / file).unlink()
            elif len(files) > 1:
                write_index(folder, piece.stem, files)


def _copied(piece: Piece) -> Piece:
    """The piece with its present values, of which a rank that does not write keeps none."""
    copies = []
    for tensor in piece.tensors:
        values = tensor.read()
        if piece.writes:
            copies.append(in_memory(tensor.name, np.array(values)))
    return replace(piece, tensors=copies)


@contextmanager
def _said(target: Path | None) -> Iterator[None]:
    """Turns errors of the file system into what the user can mend."""
    try:
        yield
    except OSError as error:
        said = f"{target or error.filename or 'a folder'} could not be written: {error.strerror or error}"
        raise UserError(f"{said}; what was there before stays") from error
