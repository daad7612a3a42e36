"""The scale that keeps float16 gradients from vanishing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIRST_SCALE = 2.0**15
GROWTH_STEPS = 2000  # finite ones in a row, after which the scale doubles


class LossScaler:
    """A factor of losses, and so of gradients, that grows until gradients overflow (Micikevicius et al. 2018,
    arXiv:1710.03740, section 3.2). A step with gradients that are not finite is left out.

    Attributes:
        enabled: for float16 alone, bfloat16 has the range of float32. Otherwise the scale is 1 and stays so.
        scale: a power of two, so that it leaves no trace in gradients that do not overflow.
    """

    def __init__(self, dtype: str) -> None:
        self.enabled = dtype == "float16"
        self.scale, self._finite_steps = FIRST_SCALE if self.enabled else 1.0, 0

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
