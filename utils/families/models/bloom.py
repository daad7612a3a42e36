"""Bloom with a forward pass of our own.

PaddleNLP's cannot place a prefix before packed segments, and its initialisation sets every Linear weight that
has a bias to zero, from where nothing can be trained.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddlenlp.transformers.bloom import modeling as library

from utils.families.base import LayerForward
from utils.families.models.decoder import by_head, extended
from utils.kernels.masks import Attend


class BloomForCausalLM(library.BloomForCausalLM):
    """See `utils.families.decoder.DecoderFamily` for what is added to the library's class."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if not config.tie_word_embeddings:
            self.lm_head = library.BloomLMHead(config)
        self.attention_dropout = config.attention_dropout

    def _initialize_weights(self, layer: Any) -> None:
        """Replaces the library's hook, which also skips the layers that its base model has set to zero."""
        if isinstance(layer, (paddle.nn.Linear, paddle.nn.Embedding)):
            spread = self.config.initializer_range
            layer.weight.set_value(paddle.normal(0.0, spread, layer.weight.shape).astype(layer.weight.dtype))

    # Positions are not used: Bloom's stand in the biases of `attend`.

    def embed(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        return self.bloom.word_embeddings_layernorm(self.bloom.word_embeddings(ids))

    def layer(self, attend: Attend, positions: Tensor | None) -> LayerForward:
        config = self.config
        dropout = config.hidden_dropout if self.training else 0.0
        return partial(_layer, attend=attend, head_dim=config.hidden_size // config.n_head, dropout=dropout)

    def finish(self, hidden: Tensor) -> Tensor:
        return self.bloom.ln_f(hidden)


def _layer(
    layer: Any,
    hidden: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    *,
    attend: Attend,
    head_dim: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    attention, mlp, after = layer.self_attention, layer.mlp, layer.apply_residual_connection_post_layernorm
    normed = layer.input_layernorm(hidden)
    # each head's query, key and value stand together
    query, key, value = paddle.split(by_head(attention.query_key_value(normed), 3 * head_dim), 3, axis=-1)
    key, value = extended(past_key, key), extended(past_value, value)
    attended = attention.dense(attend(query, key, value))
    hidden = (normed if after else hidden) + (F.dropout(attended, dropout) if dropout else attended)
    normed = layer.post_attention_layernorm(hidden)
    changed = mlp.dense_4h_to_h(F.gelu(mlp.dense_h_to_4h(normed), approximate=True))
    hidden = (normed if after else hidden) + (F.dropout(changed, dropout) if dropout else changed)
    return hidden, key, value
