"""How much memory a training step needs on one device, before anything is loaded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from utils.model.architecture import ModelShape
from utils.parallel.topology import Layout

if TYPE_CHECKING:
    from utils.arguments import RunArguments

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def memory_bytes(
    args: RunArguments, layout: Layout, shape: ModelShape, length: int, whole: int, trained: int, dtype: str
) -> dict[str, float]:
    """Estimated memory of the fullest device: weights, gradients, optimizer, activations of a step.

    Activations after Korthikanti et al. 2022 (arXiv:2205.05198), table 2, without their attention
    term's recomputation: 34 s b h per layer, of which 10 s b h stay whole under tensor parallelism, and
    5 a s^2 b for attention; with recomputation one layer's worth and 2 s b h per layer. The first stage of a
    pipeline keeps as many micro-batches as there are stages. Logits of all positions are counted: the longest
    answer may supervise nearly all of them.

    Args:
        whole, trained: weights of the whole model, and those that are trained.
    """
    size = BYTES[dtype]
    tokens = length * args.per_device_train_batch_size
    split = 10 * shape.hidden + (24 * shape.hidden + 5 * shape.heads * length) / layout.tensor
    layer = tokens * split * size / 2
    own = math.ceil(shape.layers / layout.pipeline)
    kept = layer + own * 2 * tokens * shape.hidden * size if args.recompute else layer * own
    kept *= min(layout.pipeline, args.gradient_accumulation_steps)
    logits = 3 * tokens * shape.vocabulary * 4 / layout.tensor
    shares = layout.tensor * layout.pipeline  # more or less: embedding and head are on one stage each
    sharded = [layout.sharding if layout.stage >= stage else 1 for stage in (1, 2, 3)]
    return {
        "weights": whole * size / shares / sharded[2],
        "gradients": trained * size / shares / sharded[1],
        "optimizer": trained * (8 + (4 if size == 2 else 0)) / shares / sharded[0],
        "activations": kept + logits,
    }


def memory_line(memory: dict[str, float], case: str) -> str:
    """The estimate of `memory_bytes` in words; `case` says for which batches."""
    parts = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in memory.items())
    return f"memory per device, estimated: {math.fsum(memory.values()) / 2**30:.2f} GiB at {case} ({parts})"
