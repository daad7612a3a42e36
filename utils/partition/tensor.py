"""Tensor parallelism: the layers of a model replaced by shared ones, each rank with its part of the weights.

One way for all families, by the rules of their weights (`Weight.split`): no family knows that it is shared.
Hidden states between layers are whole on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn

from utils.checkpoints.load import fill
from utils.checkpoints.shards import axis_of, part_length, split
from utils.checkpoints.tensors import LazyTensor
from utils.families.base import FamilySpec
from utils.kernels.linear import Embedding, Linear, Shard, linear, mark_part, replace_layer
from utils.parallel.process_group import ProcessGroup
from utils.partition.parts import Parts
from utils.partition.stages import names_elsewhere, own_parts, tied_name


def share_layers(model: nn.Layer, parts: Parts, group: Any) -> None:
    """Replaces every layer whose weights are shared; the new ones hold this rank's part.

    Values that are there already are cut; without them (a model that is about to be loaded) nothing is allocated.

    Args:
        parts: of the model's parameters.
        group: fleet's tensor-parallel group.
    """
    before = dict(model.named_parameters())
    replaced: dict[int, Any] = {}
    for name in before:
        path, _, kind = name.rpartition(".")
        if kind != "weight" or parts.rule(name) is None:
            continue
        old = attrgetter(path)(model)
        new = _shared(old, parts.rule(name), group)
        if new is None:
            continue
        replace_layer(model, path, new)
        for kind in ("weight", "bias"):
            if (parameter := getattr(old, kind, None)) is not None:
                replaced[id(parameter)] = getattr(new, kind)
    for name, parameter in before.items():  # heads, which are no Linear
        if id(parameter) not in replaced and parts.rule(name) is not None:
            replaced[id(parameter)] = _part_of(parameter, parts, name)
    for layer in model.sublayers(include_self=True):  # also where a head is tied to the embedding
        for kind, parameter in layer._parameters.items():
            if id(parameter) in replaced:
                layer._parameters[kind] = replaced[id(parameter)]
    for name, parameter in before.items():
        new = replaced.get(id(parameter))
        if new is not None and parameter._is_initialized():
            fill(new, parts.cut(name, parameter.numpy()))
    of_heads = tuple(f".{name}.weight" for name in model.architecture.parts.head_norms)
    for name, parameter in model.named_parameters():
        if name.endswith(of_heads):  # each rank works out the part of their gradient from the heads that it has
            parameter.summed_over = ("tensor",)
    model.tensor_part = (parts.rank, parts.degree)
    model.key_value_group = group if parts.shares_key_value else None


def _shared(old: nn.Layer, rule: Any, group: Any) -> nn.Layer | None:
    """The shared layer in the place of another one; None if there is none, as for heads. Nothing is allocated."""
    with paddle.LazyGuard():
        if isinstance(old, Embedding):
            vocabulary, width = old.weight.shape
            return Embedding(vocabulary, width, group)
        if not isinstance(old, Linear):
            return None
        shard = Shard("row" if rule == "row" else "column", group)
        ins, outs = old.weight.shape
        return linear(ins, outs, bias=old.bias is not None, shard=shard)


def _part_of(parameter: Any, parts: Parts, name: str) -> Any:
    shape, axis = list(parameter.shape), axis_of(parts.rule(name), len(parameter.shape))
    shape[axis] //= parts.degree
    part = nn.Layer().create_parameter(shape, dtype=parameter.dtype)
    mark_part(part, axis)
    part.stop_gradient = parameter.stop_gradient
    return part


class ShardPlan:
    """What a rank holds of the trained parameters, and the whole tensors that it stands for.

    Attributes:
        parts: how tensor parallelism cuts parameters.
        elsewhere: the names of those that only other pipeline stages have.
        tied: that of the one that the first and the last pipeline stage have; None without stages.
    """

    def __init__(self, parts: Parts, processes: ProcessGroup) -> None:
        self.parts, self.processes = parts, processes
        self.elsewhere: frozenset[str] = frozenset()
        self.tied: str | None = None

    def mark_whole(self, parameters: Iterable[Any]) -> None:
        """Marks parameters that every rank of a model has and works out a part of the gradient of."""
        layout = self.processes.layout
        axes = {"tensor": layout.tensor, "pipeline": layout.pipeline}
        _, pipeline, _, _ = layout.coordinates(layout.rank)
        for parameter in parameters:
            parameter.summed_over = tuple(axis for axis, degree in axes.items() if degree > 1)
            parameter.counted = pipeline == 0

    def all_heads(self, values: Tensor, axis: int) -> Tensor:
        """Keys or values of all heads along an axis from those that each rank reads."""
        parts = self.parts
        if parts.degree == 1:
            return values
        found: list[Tensor] = []
        paddle.distributed.all_gather(found, values.contiguous(), group=self.processes.groups.tensor)
        read = [head for rank in range(parts.degree) for head in parts.heads_read_by(rank)]
        chosen = [read.index(head) for head in range(parts.sizes.kv_heads)]
        return paddle.concat(found, axis=axis).index_select(paddle.to_tensor(chosen), axis)

    @property
    def vocabulary_group(self) -> Any:
        """The ranks that share the vocabulary, or None where every rank has all of it."""
        return self.processes.groups.tensor if self.parts.shares_vocabulary else None

    def sequence(self, family: FamilySpec, config: Mapping[str, Any], model: nn.Layer) -> Any:
        """Makes the ranks of `model`, with its adapter in place, divide sequences too; None where there is one rank."""
        from utils.partition.sequence import Sequence

        if self.parts.degree == 1:
            return None
        return Sequence(family, config, model, self.processes.groups.tensor)

    def divide(self, model: nn.Layer) -> None:
        """Leaves of a new model what this rank holds."""
        if self.elsewhere:
            from utils.partition.pipeline import keep_own

            keep_own(model, self.elsewhere)
        if self.parts.degree > 1:
            share_layers(model, self.parts, self.processes.groups.tensor)
        if self.tied is not None and self.tied not in self.elsewhere:
            from utils.partition.pipeline import mark_tied

            mark_tied(dict(model.named_parameters())[self.tied], self.processes.layout)

    def here(self, name: str) -> bool:
        """Whether this rank has the parameter, or a part of it, or none has."""
        path, _, kind = name.rpartition(".")
        return name not in self.elsewhere and not (kind.startswith("lora_") and f"{path}.weight" in self.elsewhere)

    @classmethod
    def of(cls, family: FamilySpec, config: Mapping[str, Any], processes: ProcessGroup) -> ShardPlan:
        """What the layout of a run gives to this rank."""
        layout = processes.layout
        _, _, _, tensor = layout.coordinates(layout.rank)
        shard_plan = cls(Parts(family, config, layout.tensor, tensor), processes)
        if layout.pipeline > 1:
            shard_plan.elsewhere = names_elsewhere(family, config, own_parts(layout, family.shape(config).layers))
            shard_plan.tied = tied_name(family, config)
        return shard_plan

    @property
    def writes(self) -> bool:
        """Whether this rank writes what its pipeline stage holds, see `written`."""
        layout = self.processes.layout
        data, _, sharding, tensor = layout.coordinates(layout.rank)
        return data == sharding == tensor == 0

    @staticmethod
    def written(parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Without those that another pipeline stage counts and writes as well."""
        return {name: one for name, one in parameters.items() if getattr(one, "counted", True)}

    def whole(self, name: str, value: Tensor, *, key: str = "") -> LazyTensor:
        """A parameter, or a tensor of the optimizer like it; reading is an exchange among tensor-parallel ranks.

        Args:
            name: of the parameter.
            key: the name of the tensor, if another.
        """
        kind = str(value.dtype).removeprefix("paddle.")
        return self.joined(name, LazyTensor(key or name, kind, tuple(value.shape), value.numpy))

    def joined(self, name: str, own: LazyTensor) -> LazyTensor:
        """As `whole`, of what is read on this rank."""
        parts = self.parts
        if math.prod(own.shape) <= 1 or parts.rule(name) is None:
            return own
        shape = parts.whole_shape(name, own.shape)

        def read() -> np.ndarray:
            found: list[Tensor] = []
            value = paddle.to_tensor(np.ascontiguousarray(own.read()))  # uint16 becomes bfloat16
            paddle.distributed.all_gather(found, value, group=self.processes.groups.tensor)
            return parts.join(name, (part.numpy() for part in found), shape)

        return LazyTensor(own.name, own.dtype, shape, read)

    def shard(self, name: str, value: Tensor) -> LazyTensor:
        """What a shard file of this rank holds of a parameter; reading may be an exchange, see `whole`."""
        parts, whole = self.parts, self.whole(name, value)
        rule = parts.stored_rule(name)
        if rule == parts.rule(name):
            return LazyTensor(name, whole.dtype, tuple(value.shape), value.numpy)
        axis, shape = axis_of(rule, len(whole.shape)), list(whole.shape)
        shape[axis] = part_length(rule, shape[axis], parts.sizes, parts.degree)

        def read() -> np.ndarray:
            return split(whole.read(), rule, parts.sizes, parts.degree, parts.rank)

        return LazyTensor(name, whole.dtype, tuple(shape), read)

    def part(self, name: str, tensor: LazyTensor) -> LazyTensor:
        """This rank's part of a whole tensor like a parameter."""
        parts = self.parts
        if len(tensor.shape) == 0 or tensor.shape == (1,) or parts.rule(name) is None:
            return tensor
        rule = parts.rule(name)
        shape, axis = list(tensor.shape), axis_of(rule, len(tensor.shape))
        shape[axis] //= parts.degree
        return LazyTensor(tensor.name, tensor.dtype, tuple(shape), lambda: parts.cut(name, tensor.read()))
