"""ChatGLM-6B with a forward pass of our own.

PaddleNLP's differs from the published code in two numbers (see `residual_layers` and `frequencies`), loses
the gradient of a prefix when activations are recomputed, and copies the whole head at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import paddle
from paddle import Tensor
from paddlenlp.transformers.chatglm import modeling as library

from utils.families.base import LayerForward
from utils.families.chatglm import rotary_frequencies
from utils.families.models.decoder import by_head, extended
from utils.kernels.masks import Attend
from utils.kernels.rotary import apply_rotary_pos_emb


def angles(positions: Tensor, heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every head: each part of a head turns by one of the positions.

    Args:
        positions: [batch, parts, length] int64.

    Returns:
        Each [batch, length * heads * parts, 1, head_dim / parts] float32.
    """
    width = head_dim // positions.shape[1]
    turned = positions.transpose([0, 2, 1]).astype("float32").unsqueeze(-1) * paddle.to_tensor(
        rotary_frequencies(width)
    )
    turned = paddle.concat([turned, turned], axis=-1).unsqueeze(2).tile([1, 1, heads, 1, 1])
    turned = turned.reshape([0, -1, 1, width])
    return paddle.cos(turned), paddle.sin(turned)


class ChatGLMForCausalLM(library.ChatGLMForCausalLM):
    """See `utils.families.decoder.DecoderFamily` for what is added to the library's class."""

    attention_dropout = 0.0

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.chatglm.transformer.word_embeddings(ids)

    def layer(self, attend: Attend, positions: Tensor) -> LayerForward:
        """
        Args:
            positions: [batch, 2, length] int64; [batch, 1, length] without the second.
        """
        config = self.config
        head_dim = config.hidden_size // config.num_attention_heads

        @cache  # for all layers, once their number of heads and their type are known
        def turns(heads: int, dtype: Any) -> tuple[Tensor, Tensor]:
            cos, sin = angles(positions, heads, head_dim)
            return cos.astype(dtype), sin.astype(dtype)

        factor = (2 * config.residual_layers) ** 0.5
        return partial(_layer, attend=attend, turns=turns, head_dim=head_dim, factor=factor)

    def finish(self, hidden: Tensor) -> Tensor:
        return self.chatglm.transformer.final_layernorm(hidden)


def _layer(
    layer: Any,
    hidden: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    *,
    attend: Attend,
    turns: Callable[[int, Any], tuple[Tensor, Tensor]],
    head_dim: int,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    normed = layer.input_layernorm(hidden)
    # each head's query, key and value stand together
    fused = by_head(layer.attention.query_key_value(normed), 3 * head_dim)
    query, key, value = paddle.split(fused, 3, axis=-1)
    shape = [0, -1, *query.shape[2:]]
    cos, sin = turns(query.shape[2], hidden.dtype)
    query, key = (x.reshape([0, -1, *cos.shape[2:]]) for x in (query, key))  # every part of a head is a row of its own
    query, key = (x.reshape(shape) for x in apply_rotary_pos_emb(query, key, cos, sin))
    key, value = extended(past_key, key), extended(past_value, value)
    hidden = normed * factor + layer.attention.dense(attend(query, key, value))
    normed = layer.post_attention_layernorm(hidden)
    return normed * factor + layer.mlp(normed), key, value
