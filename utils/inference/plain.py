"""The library's model as one step over a cache that it writes into: what a plain export traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import paddle
from paddle import Tensor, nn

from utils.families import FamilySpec, Layers
from utils.families.text import Places
from utils.inference.decoder import input_names
from utils.kernels.inference import Targets
from utils.kernels.rings import gathered

_END = 2**31 - 1  # further than any length

if TYPE_CHECKING:
    from utils.partition.tensor import Held


class LibraryProgram(nn.Layer):
    """A family's model with the face of `utils.inference.decoder.Decoder`.

    The mathematics are `FamilySpec.decode`: the same code that the eager engine runs, here also as it is
    traced. That puts the keys of new tokens behind all that is given to it; here they have places in the cache.

    Attributes:
        kv_heads: how many heads of keys and values the cache has.
        heads_first: the cache of a layer is [batch, room, kv_heads, head_dim], as the library has it.
    """

    heads_first = False

    def __init__(self, family: FamilySpec, model: Any, config: Mapping[str, Any], held: Held | None = None) -> None:
        """
        Args:
            family, config: of `model`, which is in evaluation mode and has no adapter's layers.
            held: what this tensor-parallel rank has of it, if not all.
        """
        super().__init__()
        self.family, self.model = family, model
        self.inputs = input_names(family.architecture(config))
        self.vocabulary_group = None if held is None else held.vocabulary_group
        heads = range(family.shape(config).kv_heads)
        self.kv_heads = len(heads if held is None else heads[held.parts.key_value_heads])
        for parameter in model.parameters():
            parameter.stop_gradient = True  # else the tracer would take the operators that have gradients
        self.eval()

    def forward(self, inputs: Sequence[Tensor], cache: Sequence[Tensor]) -> list[Tensor]:
        """As `utils.inference.decoder.Decoder.forward`.

        Returns:
            Logits [n, vocabulary], and the cache: a program computes only what its outputs need.
        """
        given = dict(zip(self.inputs, inputs))  # noqa: B905 - the tracer's zip has no `strict`
        return self._compute(given, cache)

    @paddle.jit.not_to_static  # traced as it runs: there is no control flow over tensors here
    def _compute(self, given: Mapping[str, Tensor], cache: Sequence[Tensor]) -> list[Tensor]:
        states, written = self._states(given, cache)
        logits = self.family.logits(self.model, states)
        if self.vocabulary_group is not None:
            logits = gathered(logits, self.vocabulary_group)
        return [logits, *written]

    def states(self, given: Mapping[str, Tensor], cache: Sequence[Tensor]) -> Tensor:
        """As `utils.inference.decoder.Decoder.states`."""
        return self._states(given, cache)[0]

    def _states(self, given: Mapping[str, Tensor], cache: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(hidden states of the chosen tokens, the cache)."""
        targets = given["targets"]
        before = _size(given["visible"], 3) - _size(targets, 1)  # places of what came before
        keys, visible = _joined(given.get("keys"), given["visible"], targets, before)
        known = Places(given.get("positions"), keys, visible, given.get("stretch"))
        # one operator each; by numbers a program would take five
        start, middle, end = (paddle.reshape(paddle.to_tensor(x, "int64"), [1]) for x in (0, before, _END))
        past = [paddle.slice(tensor, [1], start, middle) for tensor in cache]
        layers: Layers = list(zip(past[::2], past[1::2], strict=True))
        hidden, layers = self.family.decode(self.model, given["ids"], known, layers)
        states = paddle.index_select(hidden.reshape([-1, hidden.shape[-1]]), given["chosen"])
        new = [paddle.slice(tensor, [1], middle, end) for layer in layers for tensor in layer]
        store = Targets.at(targets, cache[0], heads_first=False)
        return states, [store.write(*pair) for pair in zip(cache, new, strict=True)]


def _size(x: Tensor, axis: int) -> Any:
    """A number, or a tensor [] where a static program leaves it open."""
    return x.shape[axis] if x.shape[axis] >= 0 else paddle.shape(x)[axis]


def _joined(keys: Tensor | None, visible: Tensor, targets: Tensor, before: Any) -> tuple[Tensor | None, Tensor]:
    """`Places.keys` and `Places.visible` of the cache's first `before` places and the new tokens behind them, from
    those of all its places, among which the new tokens have theirs."""
    is_older = paddle.arange(before, dtype="int64") < targets[:, :1]
    new = paddle.ones_like(targets).unsqueeze([1, 3]) * targets.unsqueeze([1, 2])  # [batch, 1, length, length]
    seen = paddle.take_along_axis(visible.astype("int32"), new, 3, broadcast=False).astype("bool")
    visible = paddle.concat([visible[:, :, :, :before] & is_older.unsqueeze([1, 2]), seen], axis=3)
    if keys is not None:
        keys = paddle.concat([keys[:, :before], paddle.take_along_axis(keys, targets, 1, broadcast=False)], axis=1)
    return keys, visible
