"""Operators of the generic decoder of which every tensor-parallel rank has a part; what they return is whole."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor

from utils.kernels import in_place
from utils.kernels.inference import Linear, Operator, Table, fixed
from utils.kernels.rings import gathered, summed


class SharedRows(Operator):
    """x @ weight + bias, where a rank has some columns of x and these rows of the weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None, group: Any) -> None:
        """
        Args:
            weight: [in / ranks, out].
            bias: [out], which is added once.
            group: of the ranks.
        """
        super().__init__()
        self.part, self.group = Linear(weight), group
        self.has_bias = bias is not None
        if bias is not None:
            self.bias = fixed(bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in / ranks] -> [..., out]."""
        y = summed(self.part(x), self.group)
        return in_place.add(y, self.bias) if self.has_bias else y

    def added(self, x: Tensor, base: Tensor) -> Tensor:
        """base + what `forward` gives, which must be summed over the ranks first."""
        return in_place.add(base, self(x))


class SharedTable(Operator):
    """As `Table`, of which every rank has equally many rows."""

    def __init__(self, values: Tensor, bias: Tensor | None, group: Any) -> None:
        """
        Args:
            values, bias: [vocabulary / ranks, width] and [vocabulary / ranks] of this rank.
        """
        super().__init__()
        self.part, self.group = Table(values, bias), group
        self.first = group.rank * self.part.vocabulary

    def embeddings(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., width]."""
        place = ids - self.first
        mine = (place >= 0) & (place < self.part.vocabulary)
        rows = self.part.embeddings(paddle.where(mine, place, paddle.zeros_like(place)))
        return summed(rows * mine.unsqueeze(-1).astype(rows.dtype), self.group)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, width] -> logits [rows, vocabulary]."""
        return gathered(self.part(x), self.group)
