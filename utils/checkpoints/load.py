"""Weights into a model: every tensor used, every parameter filled, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.checkpoints.locate import Checkpoint
from utils.checkpoints.match import check_shapes, match
from utils.checkpoints.tensors import LazyTensor, cast
from utils.families import FamilySpec
from utils.model.settings import Settings

if TYPE_CHECKING:
    from utils.model.decoder import Decoder
    from utils.partition.tensor import ShardPlan


def build(
    checkpoint: Checkpoint, dtype: str, settings: Settings | None = None, shard_plan: ShardPlan | None = None
) -> Decoder:
    """The model of a checkpoint, or what a rank holds of it, with its parameters not yet allocated."""
    return _built(checkpoint.family, checkpoint.config, dtype, settings, shard_plan)[0]


def _built(
    family: FamilySpec, config: Mapping[str, Any], dtype: str, settings: Settings | None, shard_plan: ShardPlan | None
) -> tuple[Decoder, dict[str, list[int]]]:
    """(a model, or what a rank holds of it, unallocated; the shapes of all parameters of the whole one)."""
    from utils.runtime import load_paddle

    load_paddle()
    from utils.model.decoder import Decoder, unallocated

    settings = settings or Settings(dropouts=family.dropout_rates(config))
    with unallocated(dtype):
        model = Decoder(family.architecture(config), replace(settings, dtype=dtype))
        shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        if shard_plan is not None:
            shard_plan.divide(model)
    return model, shapes


def new_model(
    family: FamilySpec,
    config: Mapping[str, Any],
    dtype: str,
    *,
    settings: Settings | None = None,
    shard_plan: ShardPlan | None = None,
) -> Decoder:
    """The Paddle model of a configuration with new random weights, as its family initialises them, in eval mode.

    Paddle's generator decides the values: seed it before. Weights of the checkpoint are not read.

    Args:
        dtype, settings, shard_plan: as in `load_model`. Every rank draws the whole model.
    """
    model, shapes = _built(family, config, dtype, settings, shard_plan)
    from utils.model.initial import initial_value

    parameters = dict(model.named_parameters())
    for name, shape in shapes.items():
        values = initial_value(model.architecture, name, shape).numpy()
        if name in parameters:
            fill(parameters[name], values if shard_plan is None else shard_plan.parts.cut(name, values))
    model.eval()
    return model


def load_model(
    checkpoint: Checkpoint,
    dtype: str,
    *,
    settings: Settings | None = None,
    shard_plan: ShardPlan | None = None,
    sources: Mapping[str, LazyTensor] | None = None,
) -> Decoder:
    """The Paddle model of a checkpoint, in eval mode.

    Args:
        checkpoint: from `locate`.
        dtype: "float32", "float16" or "bfloat16"; each tensor is cast by itself as it is read.
        settings: what the run chooses beside the type; None takes the dropouts of config.json.
        shard_plan: what this rank is to hold of the model, if not all.
        sources: see `fill_model`.

    Raises:
        UserError: tensors missing, left over or of a wrong shape (all named), or a damaged file.
    """
    match(checkpoint)  # before the model is built, which takes a while
    model = build(checkpoint, dtype, settings, shard_plan)
    fill_model(model, checkpoint, sources, shard_plan=shard_plan)
    model.eval()
    return model


def load_beside(
    other: Any,
    checkpoint: Checkpoint,
    dtype: str,
    changed: Mapping[str, LazyTensor],
    *,
    shard_plan: ShardPlan | None = None,
) -> Any:
    """A second model of a checkpoint, in eval mode, which shares the memory of all parameters but some with the first.

    Args:
        other: the first one, without an adapter's layers.
        checkpoint, dtype, shard_plan: as it was loaded.
        changed: the parameters of the second one's own, in the Paddle layout.
    """
    model = build(checkpoint, dtype, shard_plan=shard_plan)
    for (place, layer), (_, known) in zip(
        model.named_sublayers(include_self=True), other.named_sublayers(include_self=True), strict=True
    ):
        for name in known._parameters:
            if f"{place}.{name}" not in changed:
                layer._parameters[name] = known._parameters[name]
    parameters = dict(model.named_parameters())
    for name, tensor in changed.items():
        if shard_plan is None or shard_plan.here(name):
            values = tensor.read()
            fill(parameters[name], values if shard_plan is None else shard_plan.parts.cut(name, values))
    model.eval()
    return model


def fill_model(
    model: Any,
    checkpoint: Checkpoint,
    sources: Mapping[str, LazyTensor] | None = None,
    *,
    shard_plan: ShardPlan | None = None,
) -> None:
    """Sets every parameter of a model from a checkpoint, in the parameter's own type.

    Args:
        sources: every parameter in the Paddle layout, instead of the checkpoint's tensors.
        shard_plan: what this rank holds of the model, if not all.

    Raises:
        UserError: as `load_model`; the model is then unchanged.
    """
    from tqdm import tqdm

    tensors = match(checkpoint) if sources is None else {name: (tensor, False) for name, tensor in sources.items()}
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(value.shape) for name, value in parameters.items()}
    if shard_plan is not None:
        tensors = {name: found for name, found in tensors.items() if shard_plan.here(name)}
        shapes = {name: shard_plan.parts.whole_shape(name, shape) for name, shape in shapes.items()}
    check_shapes(checkpoint, tensors, shapes)
    for name in tqdm(list(tensors), desc="loading", unit="tensor", delay=5, leave=False):
        tensor, transpose = tensors.pop(name)  # popped, so that what was read as a whole can be freed
        values = tensor.read().T if transpose else tensor.read()
        fill(parameters[name], values if shard_plan is None else shard_plan.parts.cut(name, values))


def fill(parameter: Any, values: np.ndarray) -> None:
    """Sets a parameter in its own type, and allocates it if it is not; Paddle takes uint16 as bfloat16."""
    import paddle

    values = cast(values, str(parameter.dtype).removeprefix("paddle."))
    place = paddle.framework._current_expected_place()
    parameter.get_tensor().set(np.require(values, requirements=["C", "ALIGNED"]), place)
