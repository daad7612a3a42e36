"""Keys and values of all rows, allocated ahead; programs write into it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray

from utils.kernels.arrays import shared

_STEP = 32  # positions; capacity is added in steps of this, or of an eighth where that is more


class Cache(ABC):
    """Keys and values of rows 0, 1, 2, ...; a row's tokens stand at its places 0, 1, 2, ...

    Attributes:
        rows, capacity: what is allocated: rows, and places of each.
        heads_first: whether a layer's keys are [rows, kv_heads, capacity, head_dim], not [rows, capacity, kv_heads,
            head_dim].
    """

    rows: int
    capacity: int

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: str, *, heads_first: bool = True) -> None:
        self._sizes, self._dtype, self.heads_first = (kv_heads, head_dim), dtype, heads_first
        self._layers = layers
        self.rows = self.capacity = 0

    def reserve(self, rows: int, places: int, *, only: bool = False) -> None:
        """Makes memory for them; what is there of so many rows stays.

        Args:
            only: whether further rows, which nobody uses any more, go.
        """
        more_rows, more_capacity = rows if only else max(rows, self.rows), self.capacity
        if places > self.capacity:
            more_capacity = max(places, self.capacity + self.capacity // 8)
            more_capacity = -(-more_capacity // _STEP) * _STEP
        if (more_rows, more_capacity) != (self.rows, self.capacity):
            try:
                self._resize(more_rows, more_capacity)
            except BaseException:  # no memory, or an interrupt: what some layers have gained is taken back
                self._resize(self.rows, self.capacity)
                raise
            self.rows, self.capacity = more_rows, more_capacity

    def shrink(self, places: int) -> None:
        """Gives back capacity that is more than twice what the longest row, of `places` places, needs: unused capacity
        is computed and masked."""
        if self.capacity > 2 * max(places, _STEP):
            capacity = -(-places // _STEP) * _STEP
            self._resize(self.rows, capacity)
            self.capacity = capacity

    def clear(self) -> None:
        """Gives all memory back."""
        self._resize(0, 0)
        self.rows = self.capacity = 0

    @property
    def place_bytes(self) -> int:
        """Memory of the keys and values of one place of a row."""
        kv_heads, head_dim = self._sizes
        return 2 * self._layers * kv_heads * head_dim * (4 if self._dtype == "float32" else 2)

    def _shape(self, rows: int, capacity: int) -> tuple[int, int, int, int]:
        kv_heads, head_dim = self._sizes
        return (rows, kv_heads, capacity, head_dim) if self.heads_first else (rows, capacity, kv_heads, head_dim)

    @abstractmethod
    def _resize(self, rows: int, capacity: int) -> None:
        """Allocates anew and copies, layer by layer; leaves alone what has that size already."""

    @abstractmethod
    def tensors(self, rows: int, first: int = 0) -> list[paddle.Tensor]:
        """Keys and values of every layer in turn, of rows `first`, first + 1, ...

        They are the memory of the cache: what is written into them is in it. The same list as long as it is valid.
        """

    @abstractmethod
    def put(self, row: int, first: int, pieces: Sequence[Any]) -> None:
        """Stores what a row has from its place `first` on.

        Args:
            pieces: consecutive ones, each keys and values of every layer in turn, [2 * layers, kv_heads, length,
                head_dim]: arrays, or what `take` gave.
        """

    @abstractmethod
    def take(self, row: int, borders: Sequence[int]) -> list[Any]:
        """Copies of what a row has between places that follow one another, each as `put` takes it."""

    @abstractmethod
    def copy_row(self, source: int, target: int) -> None:
        """Makes a row the same as another."""


class HostCache(Cache):
    """In memory that NumPy and Paddle share: rows are copied, and memory is added, without an operator."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: str, *, heads_first: bool = True) -> None:
        super().__init__(layers, kv_heads, head_dim, dtype, heads_first=heads_first)
        self._memory = [np.zeros((2, *self._shape(0, 0)), dtype=dtype)] * layers  # keys and values of each layer
        self._views: list[paddle.Tensor] = []
        self._viewed = (0, 0)

    def _resize(self, rows: int, capacity: int) -> None:
        self._views.clear()  # whoever still holds the list does not hold the memory
        self._views, self._viewed = [], (0, 0)
        for number, before in enumerate(self._memory):
            shape = (2, *self._shape(rows, capacity))
            if before.shape == shape:
                continue
            new = np.zeros(shape, dtype=self._dtype)
            kept = tuple(slice(0, min(a, b)) for a, b in zip(before.shape, shape, strict=True))
            new[kept] = before[kept]
            self._memory[number] = new

    def tensors(self, rows: int, first: int = 0) -> list[paddle.Tensor]:
        if self._viewed != (rows, first):
            parts = [memory[kind, first : first + rows] for memory in self._memory for kind in (0, 1)]
            self._views = [shared(part) for part in parts]
            self._viewed = (rows, first)
        return self._views

    def put(self, row: int, first: int, pieces: Sequence[NDArray[np.float32]]) -> None:
        for number in range(self._layers):
            held, place = self._row(number, row), first
            for piece in pieces:
                held[:, :, place : place + piece.shape[2]] = piece[2 * number : 2 * number + 2]
                place += piece.shape[2]

    def take(self, row: int, borders: Sequence[int]) -> list[NDArray[np.float32]]:
        kv_heads, head_dim = self._sizes
        spans = list(pairwise(borders))
        pieces = [
            np.empty((2 * self._layers, kv_heads, end - start, head_dim), dtype=self._dtype) for start, end in spans
        ]
        for number in range(self._layers):
            held = self._row(number, row)
            for piece, (start, end) in zip(pieces, spans, strict=True):
                piece[2 * number : 2 * number + 2] = held[:, :, start:end]
        return pieces

    def _row(self, layer: int, row: int) -> NDArray[np.float32]:
        """The memory of keys and values of a row, [2, kv_heads, capacity, head_dim]."""
        held = self._memory[layer][:, row]
        return held if self.heads_first else held.swapaxes(1, 2)

    def copy_row(self, source: int, target: int) -> None:
        for memory in self._memory:
            memory[:, target] = memory[:, source]


class DeviceCache(Cache):
    """In the memory of the device that Paddle computes on."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: str, *, heads_first: bool = True) -> None:
        super().__init__(layers, kv_heads, head_dim, dtype, heads_first=heads_first)
        self._memory = [paddle.zeros(self._shape(0, 0), dtype=dtype)] * (2 * layers)  # of each layer in turn

    def _resize(self, rows: int, capacity: int) -> None:
        for number, before in enumerate(self._memory):
            if tuple(before.shape) == (shape := self._shape(rows, capacity)):
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

    def put(self, row: int, first: int, pieces: Sequence[Any]) -> None:
        tensors = [piece if isinstance(piece, paddle.Tensor) else paddle.to_tensor(piece) for piece in pieces]
        values = (tensors[0] if len(tensors) == 1 else paddle.concat(tensors, axis=2)).astype(self._dtype)
        end = first + values.shape[2]
        if not self.heads_first:
            values = values.transpose([0, 2, 1, 3])
        for memory, layer in zip(self._memory, values, strict=True):
            if self.heads_first:
                memory[row, :, first:end] = layer
            else:
                memory[row, first:end] = layer

    def take(self, row: int, borders: Sequence[int]) -> list[paddle.Tensor]:
        first, end = borders[0], borders[-1]
        if self.heads_first:
            values = paddle.stack([memory[row, :, first:end] for memory in self._memory])
        else:
            values = paddle.stack([memory[row, first:end] for memory in self._memory]).transpose([0, 2, 1, 3])
        sizes = [end - start for start, end in pairwise(borders)]
        # parts may be views, and all of the memory would stay as long as one of them
        return [part.contiguous() for part in values.split(sizes, axis=2)] if len(sizes) > 1 else [values.contiguous()]

    def copy_row(self, source: int, target: int) -> None:
        for memory in self._memory:
            memory[target] = memory[source]
