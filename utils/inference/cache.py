"""Keys and values of all rows, allocated ahead; programs write into it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import paddle
from numpy.typing import NDArray

_STEP = 32  # positions; room is added in steps of this, or of an eighth where that is more


class Cache(ABC):
    """Keys and values of rows 0, 1, 2, ...; a row's tokens stand at its places 0, 1, 2, ...

    Attributes:
        rows, room: what is allocated: rows, and places of each.
        heads_first: whether a layer's keys are [rows, kv_heads, room, head_dim], not [rows, room, kv_heads, head_dim].
    """

    rows: int
    room: int

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: str, *, heads_first: bool = True) -> None:
        self._sizes, self._dtype, self.heads_first = (kv_heads, head_dim), dtype, heads_first
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

    def _shape(self, rows: int, room: int) -> tuple[int, int, int, int]:
        kv_heads, head_dim = self._sizes
        return (rows, kv_heads, room, head_dim) if self.heads_first else (rows, room, kv_heads, head_dim)

    @abstractmethod
    def _resize(self, rows: int, room: int) -> None:
        """Allocates anew and copies, layer by layer; leaves alone what has that size already."""

    @abstractmethod
    def tensors(self, rows: int, first: int = 0) -> list[paddle.Tensor]:
        """Keys and values of every layer in turn, of rows `first`, first + 1, ...

        They are the memory of the cache: what is written into them is in it. The same list as long as it is valid.
        """

    @abstractmethod
    def begin(self, row: int, values: NDArray[np.float32]) -> None:
        """Stores what a row begins with.

        Args:
            values: of every layer in turn, [2 * layers, kv_heads, length, head_dim].
        """

    @abstractmethod
    def copy_row(self, source: int, target: int) -> None:
        """Makes a row the same as another."""


class HostCache(Cache):
    """In memory that NumPy and Paddle share: rows are copied, and room is made, without an operator."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: str, *, heads_first: bool = True) -> None:
        super().__init__(layers, kv_heads, head_dim, dtype, heads_first=heads_first)
        self._memory = [np.zeros((2, *self._shape(0, 0)), dtype=dtype)] * layers  # keys and values of each layer
        self._views: list[paddle.Tensor] = []
        self._viewed = (0, 0)

    def _resize(self, rows: int, room: int) -> None:
        self._views.clear()  # whoever still holds the list does not hold the memory
        self._views, self._viewed = [], (0, 0)
        for number, before in enumerate(self._memory):
            shape = (2, *self._shape(rows, room))
            if before.shape == shape:
                continue
            new = np.zeros(shape, dtype=self._dtype)
            kept = tuple(slice(0, min(a, b)) for a, b in zip(before.shape, shape, strict=True))
            new[kept] = before[kept]
            self._memory[number] = new

    def tensors(self, rows: int, first: int = 0) -> list[paddle.Tensor]:
        if self._viewed != (rows, first):
            parts = [memory[kind, first : first + rows] for memory in self._memory for kind in (0, 1)]
            self._views = [paddle.utils.dlpack.from_dlpack(part) for part in parts]
            self._viewed = (rows, first)
        return self._views

    def begin(self, row: int, values: NDArray[np.float32]) -> None:
        for memory, layer in zip(self._memory, values.reshape(-1, 2, *values.shape[1:]), strict=True):
            if self.heads_first:
                memory[:, row, :, : values.shape[2]] = layer
            else:
                memory[:, row, : values.shape[2]] = layer.swapaxes(1, 2)

    def copy_row(self, source: int, target: int) -> None:
        for memory in self._memory:
            memory[:, target] = memory[:, source]


class DeviceCache(Cache):
    """In the memory of the device that Paddle computes on."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: str, *, heads_first: bool = True) -> None:
        super().__init__(layers, kv_heads, head_dim, dtype, heads_first=heads_first)
        self._memory = [paddle.zeros(self._shape(0, 0), dtype=dtype)] * (2 * layers)  # of each layer in turn

    def _resize(self, rows: int, room: int) -> None:
        for number, before in enumerate(self._memory):
            if tuple(before.shape) == (shape := self._shape(rows, room)):
                continue
            new = paddle.zeros(shape, dtype=self._dtype)
            kept = tuple(slice(0, min(a, b)) for a, b in zip(before.shape, shape, strict=True))
            if all(part.stop for part in kept):
                new[kept] = before[kept]
            self._memory[number] = new

    def tensors(self, rows: int, first: int = 0) -> list[paddle.Tensor]:
        if (rows, first) == (self.rows, 0):
            return self._memory
        return [memory._slice(first, first + rows) for memory in self._memory]  # always a view

    def begin(self, row: int, values: NDArray[np.float32]) -> None:
        if not self.heads_first:
            values = values.swapaxes(1, 2)
        for memory, layer in zip(self._memory, paddle.to_tensor(values).astype(self._dtype), strict=True):
            if self.heads_first:
                memory[row, :, : layer.shape[1]] = layer
            else:
                memory[row, : layer.shape[0]] = layer

    def copy_row(self, source: int, target: int) -> None:
        for memory in self._memory:
            memory[target] = memory[source]
