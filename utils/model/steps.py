"""What both lowerings of a decoder share: the inputs of a step, and the branches through it that a program chooses
from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import paddle
from paddle import Tensor

from utils.kernels.inference import Step, Targets, blocks_of
from utils.model.architecture import Architecture, Local

if TYPE_CHECKING:
    from utils.partition.parts import Parts

# Layers of one choice. A static program chooses between its branches anew for each such group: Paddle's executor lists,
# for every operator of a block, all that must run before and after it, so one block of all layers takes hundreds of MB.
TOGETHER = 5


def input_names(architecture: Architecture) -> tuple[str, ...]:
    """What a step needs beside the cache; a static program must not have inputs that change nothing."""
    rotary = architecture.rotary
    used = {
        "ids": True,
        "positions": rotary is not None or bool(architecture.tables),
        "keys": architecture.slopes is not None or architecture.local is not None,
        "visible": True,
        "targets": True,
        "stretch": rotary is not None and rotary.stretch_power is not None,
        "chosen": True,
    }
    return tuple(name for name, needed in used.items() if needed)


def own_architecture(architecture: Architecture, parts: Parts | None) -> Architecture:
    """What a tensor-parallel rank computes of a model: some of the heads."""
    if parts is None:
        return architecture
    queries, read = parts.query_heads, parts.read_heads
    shape = replace(architecture.shape, heads=len(queries), kv_heads=len(read))
    return replace(
        architecture, shape=shape, slopes=None if architecture.slopes is None else architecture.slopes[queries]
    )


Branch = Sequence[Step]  # of layers that see all, then of local ones, if there are any


def branches(
    architecture: Architecture,
    slopes: Tensor | None,
    given: Mapping[str, Tensor],
    cache: Sequence[Tensor],
    *,
    flat: bool,
) -> list[Branch]:
    """The branches through a step: that of one token of each row or that of more, or both where a program leaves this
    open.

    Args:
        architecture: of what this process computes.
        slopes: the architecture's, as a tensor.
        given, cache: see `utils.model.fused.FusedDecoder.forward`.
        flat: see `Step.of`.
    """
    shape, length = architecture.shape, given["ids"].shape[1]
    is_open = length < 0  # in a static program
    single_token = not is_open and length == 1
    sizes = {"heads": shape.heads, "kv_heads": shape.kv_heads, "width": shape.head_dim}
    pieces = 1 if single_token or not architecture.causal else 0
    seen = [given["visible"]] if architecture.local is None else [given["visible"], _near(given, architecture.local)]
    blocks = [blocks_of(x, given.get("keys"), slopes, pieces=pieces, **sizes) for x in seen]
    targets = Targets.at(given["targets"], cache[0])
    return [
        [Step.of(given["ids"], x, targets, single_token=branch, flat=flat, **sizes) for x in blocks]
        for branch in ((True, False) if is_open else (single_token,))
    ]


def _near(given: Mapping[str, Tensor], local: Local) -> Tensor:
    """What the tokens see in local layers, [batch, 1, length, seen] bool."""
    keys = given["keys"].unsqueeze(1)
    near = given["positions"][0].unsqueeze(-1) - keys < local.window
    return paddle.logical_and(given["visible"], paddle.logical_or(near, keys < 0).unsqueeze(1))


def through(
    numbers: Sequence[int],
    hidden: Tensor,
    ids: Tensor,
    steps: Sequence[Branch],
    run: Callable[[Sequence[int], Tensor, Branch], Tensor],
) -> Tensor:
    """Hidden states after some layers in turn.

    Args:
        ids: [batch, length], of the new tokens.
        steps: of `branches`.
        run: (numbers of consecutive layers, hidden states before them, branch) -> hidden states after them. In a
            program nothing that it makes on one branch, or for one group of layers, may be used on another.
    """
    if len(steps) == 1:
        return run(numbers, hidden, steps[0])
    for first in range(0, len(numbers), TOGETHER):
        runs = [partial(run, numbers[first : first + TOGETHER], hidden, step) for step in steps]
        hidden = paddle.static.nn.cond(paddle.shape(ids)[1] == 1, *runs)
    return hidden
