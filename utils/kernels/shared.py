"""The table of the generic decoder of which every tensor-parallel rank has a part; what it returns is whole."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor

from utils.kernels.inference import Operator, Table
from utils.kernels.traced_collectives import gathered, summed


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
