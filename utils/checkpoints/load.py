"""Weights into a model: every tensor used, every parameter filled, one tensor in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from utils.checkpoints.locate import Checkpoint
from utils.checkpoints.tensors import LazyTensor, cast
from utils.errors import UserError, raise_if
from utils.families import Weight

_SHOWN = 10  # names listed of each kind of fault


def match(checkpoint: Checkpoint) -> dict[str, tuple[LazyTensor, bool]]:
    """Which stored tensor fills which parameter: parameter -> (tensor, whether it must be transposed).

    Names may lack the prefix of the backbone ("model." or "llama."). Shapes are checked later, by
    whoever knows them.

    Raises:
        UserError: parameters without a tensor, or tensors that belong nowhere; all are named.
    """
    stored = checkpoint.tensors()
    weights = checkpoint.family.weights(checkpoint.config)
    published = checkpoint.layout == "hf"
    names = {(weight.published if published else weight.parameter): weight for weight in weights}
    prefix = next(iter(names)).split(".")[0] + "."
    ignored = [re.compile(pattern) for pattern in checkpoint.family.ignored_weights()]
    if checkpoint.family.shape(checkpoint.config).tied:  # some writers store the tied head a second time
        ignored.append(re.compile(rf"{re.escape(checkpoint.family.head)}\.weight"))
    found: dict[str, tuple[LazyTensor, bool]] = {}
    unused = []
    for name, tensor in stored.items():
        weight: Weight | None = names.get(name) or names.get(prefix + name)
        if weight is not None:
            found[weight.parameter] = (tensor, published and weight.transpose)
        elif not any(pattern.fullmatch(name) for pattern in ignored):
            unused.append(name)
    missing = [name for name, weight in names.items() if weight.parameter not in found]
    faults = []
    if missing:
        faults.append(f"{checkpoint.folder}: the checkpoint is incomplete: no tensor for {_some(missing)}")
    if unused:
        faults.append(
            f"{checkpoint.folder}: holds tensors that a {checkpoint.family.title} model of its config.json "
            f"does not have: {_some(unused)}; config.json and weights do not belong together"
        )
    raise_if(faults)
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def stored_shape(tensor: LazyTensor, transpose: bool) -> tuple[int, ...]:
    """The shape of a stored tensor in the layout of the Paddle model."""
    return tensor.shape[::-1] if transpose else tensor.shape


def build(checkpoint: Checkpoint, dtype: str, overrides: Mapping[str, Any] | None = None) -> Any:
    """The model of a checkpoint with its parameters not yet allocated."""
    import paddle

    from utils.runtime import quiet_libraries

    quiet_libraries()
    from paddlenlp.transformers.model_utils import no_init_weights

    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        with no_init_weights(_enable=True), paddle.LazyGuard():
            return checkpoint.family.create(checkpoint.config, **{"dtype": dtype, **(overrides or {})})
    finally:
        paddle.set_default_dtype(before)


def load_model(
    checkpoint: Checkpoint, dtype: str, *, family_overrides: Mapping[str, Any] | None = None
) -> Any:
    """The Paddle model of a checkpoint, in eval mode.

    Args:
        checkpoint: from `locate`.
        dtype: "float32", "float16" or "bfloat16"; each tensor is cast by itself as it is read.
        family_overrides: fields of the model's configuration that replace those of config.json.

    Raises:
        UserError: tensors missing, left over or of a wrong shape (all named), or a damaged file.
    """
    model = build(checkpoint, dtype, family_overrides)
    fill_model(model, checkpoint)
    model.eval()
    return model


def fill_model(model: Any, checkpoint: Checkpoint) -> None:
    """Gives every parameter of `model` the checkpoint's value, cast to the model's type.

    Raises:
        UserError: as `load_model`.
    """
    from tqdm import tqdm

    sources, dtype = match(checkpoint), model.config.dtype
    parameters = dict(model.named_parameters())
    _check_shapes(checkpoint, sources, {name: tuple(value.shape) for name, value in parameters.items()})
    for name in tqdm(list(sources), desc="loading", unit="tensor", delay=5, leave=False):
        tensor, transpose = sources.pop(name)  # popped, so that what is read whole can be freed
        _fill(parameters[name], cast(tensor.read(), dtype), transpose)


def _check_shapes(
    checkpoint: Checkpoint,
    sources: Mapping[str, tuple[LazyTensor, bool]],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    if set(sources) != set(shapes):  # the family's list of weights is wrong: a bug, not the user's fault
        different = set(sources) ^ set(shapes)
        raise RuntimeError(f"{checkpoint.family.name}: weights() differs from the model: {different}")
    wrong = [
        f"{tensor.name} is {list(stored_shape(tensor, transpose))}, expected {list(shapes[name])}"
        for name, (tensor, transpose) in sources.items()
        if stored_shape(tensor, transpose) != shapes[name]
    ]
    if wrong:
        raise UserError(f"{checkpoint.folder}: shapes differ from config.json: {_some(wrong)}")


def _fill(parameter: Any, values: np.ndarray, transpose: bool) -> None:
    """Allocates the parameter with these values (uint16 is taken as bfloat16)."""
    import paddle

    place = paddle.framework._current_expected_place()
    parameter.get_tensor().set(np.ascontiguousarray(values.T if transpose else values), place)
