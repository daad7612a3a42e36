"""The trainable decoder of every family, put together from its `Architecture`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.distributed.fleet.utils import recompute

from utils.kernels import precision, ways
from utils.kernels.linear import Embedding, linear
from utils.model import inputs
from utils.model.architecture import Architecture
from utils.model.inputs import Context, RotaryPositions
from utils.model.layer import DecoderLayer, norm, put
from utils.model.settings import Settings

if TYPE_CHECKING:
    from utils.families.text import AttentionInputs

Layers = Sequence[tuple[Tensor, Tensor]]  # (key, value) of some layers, each [batch, cached, kv_heads, head_dim]


class Decoder(nn.Layer):
    """Parameters have the names that `architecture` gives them.

    The forward pass comes in parts, and none knows how many layers or heads this process has: hidden states are
    whole everywhere, and heads are counted by the width of what a projection returns.

    Attributes:
        architecture: of the whole model.
        settings: what the run chooses.
        flash: whether attention is computed by the fused operators of GPUs where they can.
        rotaries: what turns positions into angles, of layers that see all and perhaps of local ones, or nothing.
        enable_recompute: whether training computes the activations inside of layers twice.
        tensor_part: (rank, degree) of this process among those that share the heads.
        key_value_group: these processes where their number does not divide the key and value heads, so that each
            has all of them; else None.
    """

    def __init__(self, architecture: Architecture, settings: Settings) -> None:
        """What the parameters hold is decided elsewhere: see `unallocated`, `utils.model.initial`."""
        super().__init__()
        self.architecture, self.settings = architecture, settings
        wanted, plain_scores = settings.use_flash_attention, architecture.plain_scores
        self.flash = ways.flash_attention(paddle.get_device(), wanted=wanted, plain_scores=plain_scores)
        rotaries = architecture.rotary, None if architecture.local is None else architecture.local.rotary
        self.rotaries = tuple(RotaryPositions(rotary) for rotary in rotaries if rotary is not None)
        self.enable_recompute = False
        self.tensor_part, self.key_value_group = (0, 1), None
        sizes = architecture.matrices()
        put(self, architecture.embedding, Embedding(*sizes[f"{architecture.embedding}.weight"]))
        if (projection := architecture.embedding_projection) is not None:
            put(self, projection, linear(*sizes[f"{projection}.weight"], bias=False))
        for table in architecture.tables:
            put(self, table.name, Embedding(table.rows, architecture.shape.hidden))
        if architecture.embedding_norm is not None:
            put(self, architecture.embedding_norm, norm(architecture))
        if (projection := architecture.output_projection) is not None:
            put(self, projection, linear(*sizes[f"{projection}.weight"], bias=False))
        layers = [DecoderLayer(architecture, number, sizes) for number in range(architecture.shape.layers)]
        put(self, architecture.layers, nn.LayerList(layers))
        if architecture.final_norm is not None:
            put(self, architecture.final_norm, norm(architecture))
        if architecture.head is not None:
            place, _, kind = architecture.head.rpartition(".")
            put(self, place, Head(kind, sizes[architecture.head], biased="head" in architecture.biased))

    def part(self, name: str) -> Any:
        """The part of the model with this name."""
        return attrgetter(name)(self)

    @property
    def layers(self) -> list[Any]:
        """All layers in turn; what a pipeline stage does not have is an empty `nn.Layer`."""
        return list(self.part(self.architecture.layers))

    @property
    def embedding(self) -> Any:
        """The layer that embeds tokens."""
        return self.part(self.architecture.embedding)

    @property
    def head_weight(self) -> Any:
        """The parameter of the logits, which may be the embedding's."""
        return self.part(self.architecture.head or f"{self.architecture.embedding}.weight")

    # --- the forward pass in parts ------------------------------------------------------------------

    def context(self, batch: Mapping[str, Tensor], cached: int = 0) -> Context:
        """What all layers need to know of a training batch; see `inputs.of_batch`."""
        return inputs.of_batch(self, batch, cached)

    def inference_context(self, ids: Tensor, attention_inputs: AttentionInputs) -> Context:
        """As `context`, for new tokens [batch, length] at the positions of `attention_inputs`."""
        return inputs.of_attention_inputs(self, ids, attention_inputs)

    def embed(self, context: Context) -> Tensor:
        """Hidden states [batch, length, hidden] as the first layer takes them."""
        facts, places = self.architecture, context.positions
        hidden = self.embedding(context.ids)
        hidden = hidden if facts.embedding_scale == 1.0 else hidden * facts.embedding_scale
        if facts.embedding_projection is not None:
            hidden = self.part(facts.embedding_projection)(hidden)
        for table in facts.tables:
            rows = places[table.part]  # type: ignore[index]
            hidden = hidden + self.part(table.name)(rows + table.offset if table.offset else rows)
        if facts.embedding_norm is not None:
            hidden = self.part(facts.embedding_norm)(hidden)
        dropout = self.settings.dropouts.get("embedding", 0.0) if self.training else 0.0
        return F.dropout(hidden, dropout) if dropout else hidden

    def run(self, numbers: Iterable[int], hidden: Tensor, context: Context, prefix: Layers | None = None) -> Tensor:
        """Hidden states [batch, length, hidden] after some layers in turn.

        Args:
            numbers: of the layers.
            prefix: (key, value) of each of these layers that all tokens see, or None.
        """
        layers, own = self.layers, list(numbers)
        for layer, past in zip([layers[number] for number in own], prefix or [(None, None)] * len(own), strict=True):
            if self.enable_recompute and not hidden.stop_gradient:
                # tensors are arguments, not parts of the closure: gradients reach only those
                again = precision.under_autocast(partial(_behind, layer, context))
                hidden = recompute(again, hidden, *past)
            else:
                hidden = _behind(layer, context, hidden, *past)
        return hidden

    def finish(self, hidden: Tensor) -> Tensor:
        """What the head takes, [batch, length, width], from what the last layer gives."""
        for name in (self.architecture.final_norm, self.architecture.output_projection):
            hidden = hidden if name is None else self.part(name)(hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of hidden states [..., width]; this process's part of a shared vocabulary."""
        facts = self.architecture
        logits = precision.matmul(hidden, self.head_weight, transpose_y=facts.head is None or facts.head_is_table)
        if facts.head is None or "head" not in facts.biased:
            return logits
        bias = self.part(facts.head.rpartition(".")[0]).bias
        return logits + precision.cast(bias, bias.dtype)

    # --- a whole pass --------------------------------------------------------------------------------

    def hidden(self, batch: Mapping[str, Tensor], prefix: Layers | None = None) -> Tensor:
        """Last hidden states [batch, length, width], after the final norm, of a training batch.

        Args:
            batch: see `inputs.of_batch`.
            prefix: of prefix tuning, (key, value) of every layer; every token sees all of it.
        """
        context = self.context(batch, 0 if prefix is None else prefix[0][0].shape[1])
        return self.finish(self.run(range(len(self.layers)), self.embed(context), context, prefix))


class Head(nn.Layer):
    """Holds the parameter of the logits under its published name; `Decoder.logits` computes with it."""

    def __init__(self, kind: str, shape: tuple[int, int], *, biased: bool) -> None:
        """
        Args:
            kind: the last part of its name.
            shape: as `Architecture.matrices` has it.
            biased: only of a matrix [width, vocabulary].
        """
        super().__init__()
        dtype = paddle.get_default_dtype()
        self.add_parameter(kind, self.create_parameter(list(shape), dtype=dtype))
        if biased:
            self.bias = self.create_parameter([shape[1]], dtype=dtype, is_bias=True)


@contextmanager
def unallocated(dtype: str) -> Iterator[None]:
    """A block in which layers are made whose parameters, of this type, have no memory yet."""
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        with paddle.LazyGuard():
            yield
    finally:
        paddle.set_default_dtype(before)


def _behind(layer: DecoderLayer, context: Context, hidden: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
    """A layer whose new tokens see the keys and values of a prefix, if there is one."""

    def attend(query: Tensor, new_key: Tensor, new_value: Tensor) -> Tensor:
        return context.attends[layer.is_local](query, _joined(key, new_key), _joined(value, new_value))

    return layer(hidden, context, attend)


def _joined(past: Tensor | None, new: Tensor) -> Tensor:
    """Older keys or values and new ones, in their type: [batch, cached + length, heads, head_dim]."""
    return new if past is None else paddle.concat([precision.cast(past, new.dtype), new], axis=1)
