"""ChatGLM-6B with a forward pass of our own.

PaddleNLP's differs from the published code in two numbers (see `residual_layers` and `frequencies`), loses
the gradient of a prefix when activations are recomputed, and copies the whole head at every step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import paddle
from paddle import Tensor
from paddlenlp.transformers.chatglm import modeling as library

from utils.families.chatglm import rotary_frequencies
from utils.families.models.decoder import Cache, extended, run_layers
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

    def decode(self, ids: Tensor, positions: Tensor, attend: Attend, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Hidden states [batch, length, hidden] after the final norm, and the cache.

        Args:
            ids: [batch, length] int64.
            positions: [batch, 2, length] int64; [batch, 1, length] without the second.
        """
        stack, config = self.chatglm.transformer, self.config
        hidden = stack.word_embeddings(ids)
        heads = config.num_attention_heads
        cos, sin = (x.astype(hidden.dtype) for x in angles(positions, heads, config.hidden_size // heads))
        factor = (2 * config.residual_layers) ** 0.5
        forward = partial(_layer, attend=attend, cos=cos, sin=sin, heads=heads, factor=factor)
        hidden, kept = run_layers(stack.layers, hidden, cache, forward, stack.enable_recompute)
        return stack.final_layernorm(hidden), kept


def _layer(
    layer: Any,
    hidden: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    *,
    attend: Attend,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    normed = layer.input_layernorm(hidden)
    # each head's query, key and value stand together
    fused = layer.attention.query_key_value(normed).reshape([0, 0, heads, 3 * hidden.shape[-1] // heads])
    query, key, value = paddle.split(fused, 3, axis=-1)
    shape = [0, -1, *query.shape[2:]]
    query, key = (x.reshape([0, -1, *cos.shape[2:]]) for x in (query, key))  # every part of a head is a row of its own
    query, key = (x.reshape(shape) for x in apply_rotary_pos_emb(query, key, cos, sin, None))
    key, value = extended(past_key, key), extended(past_value, value)
    hidden = normed * factor + layer.attention.dense(attend(query, key, value))
    normed = layer.post_attention_layernorm(hidden)
    return normed * factor + layer.mlp(normed), key, value
