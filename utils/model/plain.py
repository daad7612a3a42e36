"""The trainable decoder as one step over a cache that it writes into: the decoder as it is trained, unfused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import paddle
from paddle import Tensor, nn

from utils.families.text import AttentionInputs
from utils.kernels.arrays import fixed
from utils.kernels.inference import Step
from utils.kernels.traced_collectives import gathered
from utils.model.decoder import Decoder
from utils.model.inputs import Context
from utils.model.steps import Branch, branches, input_names, own_architecture, through

if TYPE_CHECKING:
    from utils.partition.parts import Parts


class PlainDecoder(nn.Layer):
    """The same face as `utils.model.fused.FusedDecoder` over a trainable model; its Linears may be LoRA layers.

    The forward pass is the model's own, layer by layer; what each layer attends with is the cache.

    Attributes:
        cache_shape: layers, heads of keys and values, and width of a head, of the cache.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        parts: Parts | None = None,
        group: Any = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            parts, group: what this tensor-parallel rank has of the model, and all ranks that share it; None for all
                of it.
            layers: the numbers of those that this process has, if not all.
        """
        super().__init__()
        self.model = model
        self.architecture = own_architecture(model.architecture, parts)
        shape = self.architecture.shape
        numbers = range(shape.layers) if layers is None else layers
        self.places = {number: place for place, number in enumerate(numbers)}  # of layers in the cache
        self.cache_shape = (len(numbers), shape.kv_heads, shape.head_dim)
        self.inputs = input_names(self.architecture)
        self.vocabulary_group = group if parts is not None and parts.shares_vocabulary else None
        # of the keys and values that a rank computes; None where it reads all of them
        self.read_heads = None
        if parts is not None and parts.shares_key_value:
            self.read_heads = fixed(paddle.to_tensor(parts.read_heads, dtype="int64"))
        slopes = self.architecture.slopes
        self.slopes = None if slopes is None else fixed(paddle.to_tensor(slopes))

    def forward(self, inputs: Sequence[Tensor], cache: Sequence[Tensor]) -> list[Tensor]:
        """As `utils.model.fused.FusedDecoder.forward`.

        Raises:
            RuntimeError: the model is in training mode, where it would drop things.
        """
        given = dict(zip(self.inputs, inputs))  # noqa: B905 - the tracer's zip has no `strict`
        return [self._compute(given, cache)]

    @paddle.jit.not_to_static  # traced as it runs: the only control flow are choices between two branches
    def _compute(self, given: Mapping[str, Tensor], cache: Sequence[Tensor]) -> Tensor:
        return self.logits(self.states(given, cache))

    def logits(self, states: Tensor) -> Tensor:
        """[n, vocabulary] of what `states` returned."""
        logits = self.model.logits(states)
        return logits if self.vocabulary_group is None else gathered(logits, self.vocabulary_group)

    def states(self, given: Mapping[str, Tensor], cache: Sequence[Tensor]) -> Tensor:
        """As `utils.model.fused.FusedDecoder.states`."""
        step = self.begin(given, cache)
        return step.finish(step.layers(list(self.places), step.embed()))

    def begin(self, given: Mapping[str, Tensor], cache: Sequence[Tensor]) -> PlainStep:
        """A step over new tokens, to be gone through part by part."""
        if self.model.training:
            raise RuntimeError("the model is in training mode; call model.eval() before generating")
        return PlainStep(self, given, cache)


class PlainStep:
    """One step of a `PlainDecoder`."""

    def __init__(self, decoder: PlainDecoder, given: Mapping[str, Tensor], cache: Sequence[Tensor]) -> None:
        self._model, self._decoder = decoder.model, decoder
        self._given, self._cache = given, cache
        self._branches = branches(decoder.architecture, decoder.slopes, given, cache, flat=False)

    def embed(self) -> Tensor:
        """Hidden states [batch, length, hidden] before the first layer."""
        return self._model.embed(self._context())

    def layers(self, numbers: Sequence[int], hidden: Tensor) -> Tensor:
        """Hidden states after layers in turn, all of which this process has."""
        return through(numbers, hidden, self._given["ids"], self._branches, self._run)

    def finish(self, hidden: Tensor) -> Tensor:
        """What the head takes of the chosen tokens, [n, hidden]."""
        chosen = paddle.index_select(hidden.reshape([-1, hidden.shape[-1]]), self._given["chosen"])
        return self._model.finish(chosen)

    def _context(self) -> Context:
        given = self._given
        known = AttentionInputs(given.get("positions"), given.get("keys"), given["visible"], given.get("stretch"))
        return self._model.inference_context(given["ids"], known)

    def _run(self, numbers: Sequence[int], hidden: Tensor, branch: Branch) -> Tensor:
        attention, context, layers = _CacheAttention(self._decoder), self._context(), self._model.layers
        for number in numbers:
            place, layer = 2 * self._decoder.places[number], layers[number]
            attention.step = branch[layer.is_local]
            attention.cache = self._cache[place], self._cache[place + 1]
            hidden = layer(hidden, context, attention)
        return hidden


class _CacheAttention:
    """The attention of one layer after the other: over its cache, into which the new keys and values go.

    Attributes:
        step: what attention of the layer needs to know of the new tokens.
        cache: keys and values of the layer.
    """

    step: Step
    cache: tuple[Tensor, Tensor]

    def __init__(self, decoder: PlainDecoder) -> None:
        self._read_heads, self._wide = decoder.read_heads, decoder.architecture.wide_scores
        self._scale = decoder.architecture.shape.head_dim**-0.5

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[batch, length, heads or kv_heads, head_dim] -> [batch, length, heads * head_dim]."""
        if self._read_heads is not None:
            key, value = (paddle.index_select(x, self._read_heads, axis=2) for x in (key, value))
        query = query.astype("float32") if self._wide else query
        return self.step.attend_apart(query * self._scale, key, value, self.cache)
