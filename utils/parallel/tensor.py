"""Tensor parallelism: the layers of a model replaced by fleet's, each rank with its part of the weights.

One way for all families, by the rules of their weights (`Weight.split`): no family knows that it is shared.
Hidden states between layers are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.distributed.fleet.layers.mpu import mp_layers, mp_ops

from utils.checkpoints.load import fill
from utils.checkpoints.shards import axis_of
from utils.checkpoints.tensors import LazyTensor
from utils.families.base import FamilySpec
from utils.parallel.parts import Parts
from utils.parallel.peers import Alone
from utils.parallel.stages import names_elsewhere, own_parts, tied_name


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
        new = _shared(old, parts.rule(name), group, parts.degree)
        if new is None:
            continue
        owner, _, last = path.rpartition(".")
        parent = attrgetter(owner)(model) if owner else model
        if last.isdigit():
            parent[int(last)] = new
        else:
            setattr(parent, last, new)
        for kind in ("weight", "bias"):
            if (parameter := getattr(old, kind)) is not None:
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
    model.tensor_part = (parts.rank, parts.degree)


def _shared(old: nn.Layer, rule: Any, group: Any, degree: int) -> nn.Layer | None:
    """Fleet's layer in the place of one of ours; None if it is none that fleet has."""
    if isinstance(old, nn.Embedding):
        count, width = old.weight.shape
        return mp_layers.VocabParallelEmbedding(count, width, mp_group=group)
    if not isinstance(old, nn.Linear):
        return None
    ins, outs = old.weight.shape
    biased = old.bias is not None
    if rule == "row":
        return mp_layers.RowParallelLinear(ins, outs, has_bias=biased, input_is_parallel=True, mp_group=group)
    return mp_layers.ColumnParallelLinear(ins, outs, has_bias=biased, gather_output=False, mp_group=group)


def _part_of(parameter: Any, parts: Parts, name: str) -> Any:
    shape, axis = list(parameter.shape), axis_of(parts.rule(name), len(parameter.shape))
    shape[axis] //= parts.degree
    part = nn.Layer().create_parameter(shape, dtype=parameter.dtype)
    part.is_distributed, part.split_axis = True, axis
    part.stop_gradient = parameter.stop_gradient
    return part


class Held:
    """What a rank holds of the trained parameters, and the whole tensors that it stands for.

    Attributes:
        parts: how tensor parallelism cuts parameters.
        elsewhere: the names of those that only other pipeline stages have.
        tied: that of the one that the first and the last pipeline stage have; None without stages.
    """

    def __init__(self, parts: Parts, peers: Alone) -> None:
        self.parts, self.peers = parts, peers
        self.elsewhere: frozenset[str] = frozenset()
        self.tied: str | None = None

    def divide(self, model: nn.Layer) -> None:
        """Leaves of a new model what this rank holds."""
        if self.elsewhere:
            from utils.parallel.pipeline import keep_own

            keep_own(model, self.elsewhere)
        if self.parts.degree > 1:
            share_layers(model, self.parts, self.peers.groups.tensor)
        if self.tied is not None and self.tied not in self.elsewhere:
            from utils.parallel.pipeline import mark_tied

            mark_tied(dict(model.named_parameters())[self.tied], self.peers.layout)

    def here(self, name: str) -> bool:
        """Whether this rank has the parameter, or a part of it, or none has."""
        path, _, kind = name.rpartition(".")
        return name not in self.elsewhere and not (kind.startswith("lora_") and f"{path}.weight" in self.elsewhere)

    @classmethod
    def of(cls, family: FamilySpec, config: Mapping[str, Any], peers: Alone) -> Held:
        """What the layout of a run gives to this rank."""
        layout = peers.layout
        _, _, _, tensor = layout.coordinates(layout.rank)
        held = cls(Parts(family, config, layout.tensor, tensor), peers)
        if layout.pipeline > 1:
            held.elsewhere = names_elsewhere(family, config, own_parts(layout, family.shape(config).layers))
            held.tied = tied_name(family, config)
        return held

    @property
    def writes(self) -> bool:
        """Whether this rank writes what its pipeline stage holds, see `written`."""
        layout = self.peers.layout
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
        kind, parts = str(value.dtype).removeprefix("paddle."), self.parts
        if value.size <= 1 or parts.rule(name) is None:
            return LazyTensor(key or name, kind, tuple(value.shape), value.numpy)
        shape = parts.whole_shape(name, value.shape)

        def read() -> np.ndarray:
            found: list[Tensor] = []
            paddle.distributed.all_gather(found, value.contiguous(), group=self.peers.groups.tensor)
            return parts.join(name, (part.numpy() for part in found), shape)

        return LazyTensor(key or name, kind, shape, read)

    def part(self, name: str, tensor: LazyTensor) -> LazyTensor:
        """This rank's part of a whole tensor like a parameter."""
        parts = self.parts
        if len(tensor.shape) == 0 or tensor.shape == (1,) or parts.rule(name) is None:
            return tensor
        rule = parts.rule(name)
        shape, axis = list(tensor.shape), axis_of(rule, len(tensor.shape))
        shape[axis] //= parts.degree
        return LazyTensor(tensor.name, tensor.dtype, tuple(shape), lambda: parts.cut(name, tensor.read()))


def for_split_use(x: Tensor, group: Any) -> Tensor:
    """`x`, which every rank has and of which each uses another part: its gradient is the sum of theirs."""
    return x if group is None else mp_ops._c_identity(x, group=group)


def gathered(x: Tensor, group: Any) -> Tensor:
    """Logits [..., vocabulary] from the parts of all ranks."""
    return mp_ops._c_concat(x, group=group)


def cross_entropy(logits: Tensor, targets: Tensor, group: Any) -> Tensor:
    """[n] float32 losses, in nats, of logits whose vocabulary is shared.

    Args:
        logits: [n, vocabulary / degree].
        targets: [n] int64.
    """
    losses = mp_ops._c_softmax_with_cross_entropy(logits.astype("float32"), targets.unsqueeze(-1), group=group)
    return losses.reshape([-1])
