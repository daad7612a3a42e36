"""Fleet's process groups of one run, along the axes of its layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Groups:
    """Of this rank; None along an axis that has one rank only.

    Attributes:
        tensor, pipeline, sharding, data: ranks that differ in this coordinate alone, see `Layout.coordinates`.
        readers: ranks of equal tensor and pipeline place: they hold the same weights and read different rows.
    """

    tensor: Any = None
    pipeline: Any = None
    sharding: Any = None
    data: Any = None
    readers: Any = None
