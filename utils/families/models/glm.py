"""GLM with a forward pass of our own, over the library's layers.

PaddleNLP's keeps hidden states as cache and projects the whole text to keys and values again at every step,
ignores 2-D masks (it compares a method with a number), and has no place for a prefix of keys and values.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddlenlp.transformers.glm import modeling as library

from utils.families.base import LayerForward
from utils.families.models.decoder import by_head, extended
from utils.kernels.masks import Attend
from utils.kernels.precision import in_own_type


class GLMForConditionalGeneration(library.GLMForConditionalGeneration):
    """See `utils.families.decoder.DecoderFamily` for what is added to the library's class."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.attention_dropout = config.attention_dropout_prob

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """
        Args:
            positions: [2, batch, length] int64, in the context and in the span.
        """
        stack = self.glm.transformer
        hidden = self.glm.word_embeddings(ids) + stack.position_embeddings(positions[0])
        return stack.embedding_dropout(hidden + stack.block_position_embeddings(positions[1]))

    def layer(self, attend: Attend, positions: Tensor) -> LayerForward:
        config = self.config
        return partial(
            _layer,
            attend=attend,
            head_dim=config.hidden_size // config.num_attention_heads,
            dropout=config.output_dropout_prob if self.training else 0.0,
            # published models whose scores would overflow float16 have a scale above 1
            wide=config.attention_scale > 1.0,
        )

    def finish(self, hidden: Tensor) -> Tensor:
        return self.glm.transformer.final_layernorm(hidden)


def _layer(
    layer: Any,
    hidden: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    *,
    attend: Attend,
    head_dim: int,
    dropout: float,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    attention, mlp = layer.attention, layer.mlp
    fused = attention.query_key_value(layer.input_layernorm(hidden))
    query, key, value = (by_head(part, head_dim) for part in paddle.split(fused, 3, axis=-1))
    key, value = extended(past_key, key), extended(past_value, value)
    if wide:
        query, seen = query.astype("float32"), key.astype("float32")
    else:
        seen = key
    with in_own_type(wide):
        attended = attend(query, seen, value)
    attended = attention.dense(attended)
    hidden = hidden + (F.dropout(attended, dropout) if dropout else attended)
    changed = mlp.dense_h_to_4h(layer.post_attention_layernorm(hidden))
    changed = mlp.dense_4h_to_h(F.gelu(changed, approximate=True))
    return hidden + (F.dropout(changed, dropout) if dropout else changed), key, value
