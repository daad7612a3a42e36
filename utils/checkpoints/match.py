"""Which stored tensor is which parameter of the model: names only, no Paddle, no values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from utils.checkpoints.heads import HEAD_NAMES, can_be_tied
from utils.checkpoints.locate import Checkpoint
from utils.checkpoints.quantized import ADVICE, of_quantized
from utils.checkpoints.tensors import FLOATS, LazyTensor
from utils.errors import UserError, raise_if
from utils.model.weights import Weight

_SHOWN = 10  # names listed of each kind of fault


def match(checkpoint: Checkpoint, stored: Mapping[str, LazyTensor] | None = None) -> dict[str, tuple[LazyTensor, bool]]:
    """Which stored tensor fills which parameter: parameter -> (tensor, whether it must be transposed).

    Names may lack the prefix of the backbone ("model." or "llama."). Shapes are checked later, by
    whoever knows them.

    Args:
        stored: the tensors, if not those of the checkpoint's files.

    Raises:
        UserError: parameters without a tensor, or tensors that belong nowhere; all are named.
    """
    stored = checkpoint.tensors() if stored is None else stored
    weights = checkpoint.family.weights(checkpoint.config)
    published = checkpoint.layout == "hf"
    names: dict[str, list[Weight]] = {}
    for weight in weights:
        names.setdefault(weight.published if published else weight.parameter, []).append(weight)
    prefix = next(iter(names)).split(".")[0] + "."
    ignored = [re.compile(pattern) for pattern in checkpoint.family.ignored_weights()]
    if checkpoint.family.shape(checkpoint.config).tied:  # some writers store the tied head a second time
        ignored += [re.compile(re.escape(name)) for name in HEAD_NAMES]
    architecture = checkpoint.family.architecture(checkpoint.config)
    head = None if architecture.head is None else architecture.matrices()[architecture.head]
    found: dict[str, tuple[LazyTensor, bool]] = {}
    unused, whole_numbers = [], []
    for name, tensor in stored.items():
        filled = names.get(name) or names.get(prefix + name) or []
        for weight in filled:
            source = part_of(tensor, weight.part, weight.output_axis) if published else tensor
            as_table = weight.parameter == architecture.head and source.shape[::-1] == head != source.shape
            if tensor.dtype not in FLOATS:
                whole_numbers.append(f"{name} ({tensor.dtype})")
            found[weight.parameter] = (source, weight.transpose if published else as_table)
        if not filled and not any(pattern.fullmatch(name) for pattern in ignored):
            unused.append(name)
    missing = [name for name, filled in names.items() if filled[0].parameter not in found]
    faults = []
    packed = of_quantized(unused)
    if packed or whole_numbers:
        kinds = "tensors of quantized weights" if packed else "whole numbers where a model has fractions"
        raise UserError(f"{checkpoint.folder}: holds {kinds}: {some(packed or whole_numbers)}; {ADVICE}")
    if missing:
        only_head = all(names[name][0].parameter == architecture.head for name in missing)
        tie = only_head and can_be_tied(checkpoint.family, checkpoint.config)
        advice = '; if its head is its embedding, set "tie_word_embeddings": true in config.json' if tie else ""
        faults.append(f"{checkpoint.folder}: the checkpoint is incomplete: no tensor for {some(missing)}{advice}")
    if unused:
        faults.append(
            f"{checkpoint.folder}: holds tensors that a {checkpoint.family.title} model of its config.json "
            f"does not have: {some(unused)}; config.json and weights do not belong together"
        )
    raise_if(faults)
    return found


def part_of(tensor: LazyTensor, part: tuple[int, int] | None, axis: int) -> LazyTensor:
    """One of equal parts of a tensor along an axis (see `Weight.part`); all of it for None.

    What cannot be divided stays whole: its shape then differs from the model's, which is reported.
    """
    if part is None:
        return tensor
    index, count = part
    axis %= len(tensor.shape)
    if tensor.shape[axis] % count:
        return tensor
    size = tensor.shape[axis] // count
    shape = (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])
    place = (slice(None),) * axis + (slice(index * size, (index + 1) * size),)
    return LazyTensor(tensor.name, tensor.dtype, shape, lambda: tensor.read()[place])


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def stored_shape(tensor: LazyTensor, transpose: bool) -> tuple[int, ...]:
    """The shape of a stored tensor in the layout of the Paddle model."""
    return tensor.shape[::-1] if transpose else tensor.shape


def check_shapes(
    checkpoint: Checkpoint,
    sources: Mapping[str, tuple[LazyTensor, bool]],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Compares stored tensors with the shapes of a model's parameters.

    Raises:
        UserError: shapes differ; all are named.
    """
    if set(sources) != set(shapes):  # the family's list of weights is wrong: a bug, not the user's fault
        different = set(sources) ^ set(shapes)
        raise RuntimeError(f"{checkpoint.family.name}: weights() differs from the model: {different}")
    wrong = [
        f"{tensor.name} is {list(stored_shape(tensor, transpose))}, expected {list(shapes[name])}"
        for name, (tensor, transpose) in sources.items()
        if stored_shape(tensor, transpose) != shapes[name]
    ]
    if wrong:
        raise UserError(f"{checkpoint.folder}: shapes differ from config.json: {some(wrong)}")
