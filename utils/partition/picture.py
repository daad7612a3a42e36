"""The layout of a run as a picture of its ranks, for `--dry_run`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from utils.parallel.topology import Layout
from utils.partition.stages import Part, all_parts

SHOWN_READERS = 4
_SHARDED = {1: "the optimizer's state", 2: "the optimizer's state and gradients", 3: "weights, gradients and the rest"}


def picture(layout: Layout, args: Any, layers: int) -> list[str]:
    """Which rank does what: a block for the rows that it reads, a line for its layers, a column for its part of them.

    Args:
        layers: of the model.
    """
    if layout.world == 1:
        return ["layout: 1 process"]
    machines = layout.world // layout.local_size
    axes = {"data": layout.data, "pipeline": layout.pipeline, "sharding": layout.sharding, "tensor": layout.tensor}
    split = " x ".join(f"{name} {degree}" for name, degree in axes.items() if degree > 1) or "1"
    lines = [
        f"layout: {layout.world} processes on {machines} machine{'s' if machines > 1 else ''} = {split}; "
        f"a step has {layout.global_batch(args)} rows: {args.per_device_train_batch_size} a device x "
        f"{args.gradient_accumulation_steps} micro-batches x {layout.readers}"
    ]
    if layout.stage:
        lines.append(f"  sharding stage {layout.stage}: {layout.sharding} ranks divide {_SHARDED[layout.stage]}")
    parts = all_parts(layout, layers)
    for reader in range(min(layout.readers, SHOWN_READERS)):
        lines.append(f"  part {reader + 1} of {layout.readers} of every batch")
        for stage in range(layout.pipeline):
            ranks = [rank for rank in range(layout.world) if _place(layout, rank) == (reader, stage)]
            where = ", ".join(map(str, sorted({rank // layout.local_size for rank in ranks})))
            cells = " ".join(f"[rank {rank}]" for rank in ranks)
            content = _content(layout, parts[stage :: layout.pipeline])
            lines.append(f"    {content:<32} {cells}  machine {where}")
    if layout.readers > SHOWN_READERS:
        lines.append(f"  and {layout.readers - SHOWN_READERS} more parts with ranks like these")
    lines.append("  rank 0 speaks; logs, curves and results are written once")
    return lines


def _place(layout: Layout, rank: int) -> tuple[int, int]:
    return layout.reader(rank), layout.coordinates(rank)[1]


def _content(layout: Layout, parts: Sequence[Part]) -> str:
    """What the ranks of a line hold."""
    if layout.pipeline == 1:
        what = "whole model" if layout.tensor == 1 else "all layers"
    else:
        what = "layers " + ", ".join(f"{part.layers[0]}-{part.layers[-1]}" for part in parts)
        what += ", embedding" * any(part.first for part in parts) + ", head" * any(part.last for part in parts)
    return what if layout.tensor == 1 else f"{what}, 1/{layout.tensor} each"
