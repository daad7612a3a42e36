"""The library's model as one step over a cache that is its input: what a plain export traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import paddle
from paddle import Tensor, nn

from utils.families import FamilySpec, Layers
from utils.families.text import Places
from utils.inference.decoder import input_names
from utils.kernels.rings import gathered

if TYPE_CHECKING:
    from utils.partition.tensor import Held


class LibraryProgram(nn.Layer):
    """A family's model with the face of `utils.inference.decoder.Decoder`.

    The mathematics are `FamilySpec.decode`: the same code that the eager engine runs, here also as it is
    traced. Keys and values change their layout on the way in and out.

    Attributes:
        kv_heads: how many heads of keys and values the cache has.
    """

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

    def forward(self, inputs: Sequence[Tensor], past: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """As `utils.inference.decoder.Decoder.forward`."""
        return self._compute(dict(zip(self.inputs, inputs)), past)  # noqa: B905 - the tracer's zip has no `strict`

    @paddle.jit.not_to_static  # traced as it runs: there is no control flow over tensors here
    def _compute(self, given: Mapping[str, Tensor], past: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        turned = [tensor.transpose([0, 2, 1, 3]) for tensor in past]
        cache: Layers | None = list(zip(turned[::2], turned[1::2], strict=True)) if past else None
        known = Places(given.get("positions"), given.get("keys"), given["visible"], given.get("stretch"))
        hidden, cache = self.family.decode(self.model, given["ids"], known, cache)
        states = paddle.index_select(hidden.reshape([-1, hidden.shape[-1]]), given["chosen"])
        cached: Any = 0
        if past:
            cached = past[0].shape[2]
            if cached < 0:  # left open in a static program
                cached = paddle.shape(past[0])[2]
        new = [tensor[:, cached:].transpose([0, 2, 1, 3]) for layer in cache for tensor in layer]
        logits = self.family.logits(self.model, states)
        if self.vocabulary_group is not None:
            logits = gathered(logits, self.vocabulary_group)
        return logits, [paddle.stack(new)]
