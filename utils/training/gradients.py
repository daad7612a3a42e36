"""The gradients of an optimizer step: added up over ranks, measured once, clipped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import paddle
from paddle import Tensor

from utils.parallel.process_group import ProcessGroup

if TYPE_CHECKING:
    from utils.parallel.sharding import Share


class Gradients:
    """The gradients of all trained parameters of this rank.

    Three marks on a parameter say what a layout makes of it:
    - `is_distributed` (fleet's): each tensor-parallel rank has another part of it;
    - `summed_over`: groups ("tensor", "pipeline", "ends") of which every rank has all of it and works out a
      part of its gradient;
    - `counted`: False where the same parameter is counted on another pipeline stage.

    Args:
        parameters: with those that are frozen.
        limit: of the global norm; 0 for none.
        share: with sharding, who owns what.
    """

    def __init__(
        self, parameters: Iterable[Any], processes: ProcessGroup, *, limit: float = 0.0, share: Share | None = None
    ) -> None:
        self.parameters = [parameter for parameter in parameters if not parameter.stop_gradient]
        self.processes, self.limit, self.share = processes, limit, share

    @paddle.no_grad()
    def finish(self, factor: float, loss_scale: float = 1.0) -> float:
        """Makes the gradients those of the step; returns their norm before it was clipped.

        Args:
            factor: from the summed gradients to those of the mean.
            loss_scale: of mixed precision; it is taken out last, so that gradients in float16 do not vanish before.
        """
        groups, share = self.processes.groups, self.share
        owned = [(parameter, parameter.grad) for parameter in self.parameters if parameter.grad is not None]
        if share is None or share.stage < 3:  # before the exchange: ranks own other parameters on other stages
            self._add_up_partial(owned, "pipeline", "ends")
        if share is None:
            self.processes.add_up([gradient for _, gradient in owned], groups.readers)
        else:
            share.exchange()
            owned = share.owned()
            self.processes.add_up([gradient for _, gradient in owned], groups.data)
        if share is not None and share.stage == 3:  # slices are cut alike on all stages
            self._add_up_partial(owned, "pipeline", "ends")
        self._add_up_partial(owned, "tensor")
        for _, gradient in owned if factor != 1.0 else ():
            gradient.scale_(factor)
        norm = self._norm(owned) / loss_scale
        clip = self.limit / norm if math.isfinite(norm) and 0.0 < self.limit < norm else 1.0
        for _, gradient in owned if clip != loss_scale else ():
            gradient.scale_(clip / loss_scale)
        return norm

    def _add_up_partial(self, gradients: Sequence[tuple[Any, Tensor]], *names: str) -> None:
        for name in names:
            partial = [gradient for parameter, gradient in gradients if name in getattr(parameter, "summed_over", ())]
            self.processes.add_up(partial, getattr(self.processes.groups, name))

    def _norm(self, owned: Sequence[tuple[Any, Tensor]]) -> float:
        """The norm of the gradients of the whole model, each parameter counted once."""
        layout = self.processes.layout
        data, _, sharding, tensor = layout.coordinates(layout.rank)
        alike = layout.tensor == layout.pipeline == 1 and self.share is None  # on all ranks
        counted = [
            gradient
            for parameter, gradient in owned
            if alike
            or (getattr(parameter, "counted", True) and (tensor == 0 or getattr(parameter, "is_distributed", False)))
        ]
        squares = _squares(counted)
        if alike:
            return math.sqrt(squares)
        copy = data > 0 or (self.share is None and sharding > 0)
        return math.sqrt(self.processes.sums([0.0 if copy else squares])[0])


def _squares(gradients: Sequence[Tensor]) -> float:
    """The sum of all squares; one gradient at a time is in memory in float32."""
    return float(paddle.add_n([_square(gradient) for gradient in gradients])) if gradients else 0.0


def _square(gradient: Tensor) -> Tensor:
    values = gradient if gradient.dtype == paddle.float32 else gradient.astype("float32")
    values = values.reshape([-1])
    return paddle.dot(values, values)
