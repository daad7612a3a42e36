"""Mixed precision: in which type operators compute, and the scale that keeps float16 gradients from vanishing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import paddle

FIRST_SCALE = 2.0**15
GROWTH_STEPS = 2000  # finite ones in a row, after which the scale doubles
# Sums of many terms leave float16's range; in O2, embeddings are to give half precision like all else.
FLOAT32_OPERATORS = {"reduce_sum", "c_softmax_with_cross_entropy"}
HALF_OPERATORS = {"O1": set[str](), "O2": {"lookup_table", "lookup_table_v2"}}


@dataclass(frozen=True)
class Precision:
    """
    Attributes:
        dtype: the type to compute in: "float32", "float16" or "bfloat16".
        level: O1: chosen operators compute in it; O2: all but a few.
    """

    dtype: str
    level: str

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of forward passes."""
        if self.dtype == "float32":
            return nullcontext()
        return paddle.amp.auto_cast(
            custom_white_list=HALF_OPERATORS[self.level],
            custom_black_list=FLOAT32_OPERATORS,
            level=self.level,
            dtype=self.dtype,
        )

    def scaler(self) -> LossScaler:
        """bfloat16 has the range of float32 and needs no scale."""
        return LossScaler(FIRST_SCALE if self.dtype == "float16" else None)


class LossScaler:
    """A factor of losses, and so of gradients, that grows until gradients overflow (Micikevicius et al. 2018,
    arXiv:1710.03740, section 3.2). A step with gradients that are not finite is left out.

    Attributes:
        enabled: without it the scale is 1 and stays so.
        scale: a power of two, so that it leaves no trace in gradients that do not overflow.
    """

    def __init__(self, scale: float | None) -> None:
        self.enabled = scale is not None
        self.scale, self._finite_steps = scale or 1.0, 0

    def update(self, finite: bool) -> None:
        """Takes over whether the gradients of a step were finite."""
        if not self.enabled:
            return
        self._finite_steps = self._finite_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self._finite_steps == GROWTH_STEPS:
            self.scale, self._finite_steps = self.scale * 2, 0

    def to_json(self) -> dict[str, Any]:
        return {"scale": [self.scale], "incr_count": self._finite_steps}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes what `to_json` gave, perhaps in an earlier version, whose names these are."""
        self.scale, self._finite_steps = float(saved["scale"][0]), int(saved["incr_count"])
