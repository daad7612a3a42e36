"""Keys and values of all rows, allocated ahead and written in place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import paddle
from numpy.typing import NDArray

New: TypeAlias = "paddle.Tensor | NDArray[np.generic]"  # new keys and values, as a program gives them

_STEP = 32  # positions; room is added in steps of this, or of an eighth where that is more


class Cache(ABC):
    """Keys and values of rows 0, 1, 2, ...; a row's tokens stand at its places 0, 1, 2, ...

    Attributes:
        rows, room: what is allocated: rows, and places of each.
    """

    rows: int
    room: int

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: str) -> None:
        self._shape, self._dtype = (kv_heads, head_dim), dtype
        self.rows = self.room = 0

    def reserve(self, rows: int, places: int, *, only: bool = False) -> None:
        """Makes room; what is there of so many rows stays.

        Args:
            only: whether further rows, which nobody uses any more, go.
        """
        more_rows, more_room = rows if only else max(rows, self.rows), self.room
        if places > self.room:
            more_room = max(places, self.room + self.room // 8)
            more_room = -(-more_room // _STEP) * _STEP
        if (more_rows, more_room) != (self.rows, self.room):
            try:
                self._resize(more_rows, more_room)
            except BaseException:  # no memory, or an interrupt: what some layers have gained is taken back
                self._resize(self.rows, self.room)
                raise
            self.rows, self.room = more_rows, more_room

    def shrink(self, places: int) -> None:
        """Gives back room that is more than twice what the longest row, of `places` places, needs: unused room
        is computed and masked."""
        if self.room > 2 * max(places, _STEP):
            room = -(-places // _STEP) * _STEP
            self._resize(self.rows, room)
            self.room = room

    def clear(self) -> None:
        """Gives all memory back."""
        self._resize(0, 0)
        self.rows = self.room = 0

    @abstractmethod
    def _resize(self, rows: int, room: int) -> None:
        """Allocates anew and copies, layer by layer; leaves alone what has that size already."""

    @abstractmethod
    def tensors(self, rows: int) -> list[paddle.Tensor]:
        """Keys and values of every layer in turn, of the first rows, [rows, kv_heads, room, head_dim]."""

    @abstractmethod
    def write(self, new: Iterable[New], starts: Sequence[int], counts: Sequence[int], first: int = 0) -> None:
        """Stores keys and values of rows `first`, first + 1, ...

        Args:
            new: of all layers in turn, some in each, [2 * some, rows, kv_heads, length, head_dim]; of each row
                the first `counts` are real.
            starts: the place of each row's first one.
        """

    @abstractmethod
    def copy_row(self, source: int, target: int) -> None:
        """Makes a row the same as another."""


class HostCache(Cache):
    """In memory that NumPy and Paddle share, so that writing one token costs no operator."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: str) -> None:
        super().__init__(layers, kv_heads, head_dim, dtype)
        # of each layer [2, rows, kv_heads, room, head_dim]
        self._memory = [np.zeros((2, 0, kv_heads, 0, head_dim), dtype=dtype) for _ in range(layers)]
        self._views: list[paddle.Tensor] = []
        self._viewed = -1

    def _resize(self, rows: int, room: int) -> None:
        kv_heads, head_dim = self._shape
        self._views.clear()  # whoever still holds the list does not hold the memory
        self._views, self._viewed = [], -1
        for number, before in enumerate(self._memory):
            shape = (2, rows, kv_heads, room, head_dim)
            if before.shape == shape:
                continue
            new = np.zeros(shape, dtype=self._dtype)
            kept = tuple(slice(0, min(a, b)) for a, b in zip(before.shape, shape, strict=True))
            new[kept] = before[kept]
            self._memory[number] = new

    def tensors(self, rows: int) -> list[paddle.Tensor]:
        if rows != self._viewed:
            parts = [memory[kind, :rows] for memory in self._memory for kind in (0, 1)]
            self._views = [paddle.utils.dlpack.from_dlpack(part) for part in parts]
            self._viewed = rows
        return self._views

    def write(self, new: Iterable[New], starts: Sequence[int], counts: Sequence[int], first: int = 0) -> None:
        rows, memories = np.arange(first, first + len(starts)), iter(self._memory)
        for part in new:
            values = part if isinstance(part, np.ndarray) else np.from_dlpack(part.detach())
            # of each layer keys and values, as in the memory
            for layer, memory in zip(values.reshape(-1, 2, *values.shape[1:]), memories, strict=False):
                if all(count == 1 for count in counts):
                    memory[:, rows, :, starts] = layer[:, :, :, 0].transpose(1, 0, 2, 3)
                    continue
                for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
                    memory[:, first + row, :, start : start + count] = layer[:, row, :, :count]

    def copy_row(self, source: int, target: int) -> None:
        for memory in self._memory:
            memory[:, target] = memory[:, source]


class DeviceCache(Cache):
    """In the memory of the device that Paddle computes on."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: str) -> None:
        super().__init__(layers, kv_heads, head_dim, dtype)
        empty = paddle.zeros([0, kv_heads, 0, head_dim], dtype=dtype)
        self._memory = [empty] * (2 * layers)  # keys and values of each layer in turn

    def _resize(self, rows: int, room: int) -> None:
        kv_heads, head_dim = self._shape
        for number, before in enumerate(self._memory):
            if before.shape == [rows, kv_heads, room, head_dim]:
                continue
            new = paddle.zeros([rows, kv_heads, room, head_dim], dtype=self._dtype)
            held, places = min(rows, before.shape[0]), min(room, before.shape[2])
            if held and places:
                new[:held, :, :places] = before[:held, :, :places]
            self._memory[number] = new

    def tensors(self, rows: int) -> list[paddle.Tensor]:
        return [memory if rows == self.rows else memory[:rows] for memory in self._memory]

    def write(self, new: Iterable[New], starts: Sequence[int], counts: Sequence[int], first: int = 0) -> None:
        values = (part[number] for part in map(paddle.to_tensor, new) for number in range(part.shape[0]))
        for memory, layer in zip(self._memory, values, strict=True):
            for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
                if count:  # Paddle refuses to set nothing where tensors may share memory
                    memory[first + row, :, start : start + count] = layer[row, :, :count]

    def copy_row(self, source: int, target: int) -> None:
        for memory in self._memory:
            memory[target] = memory[source]
