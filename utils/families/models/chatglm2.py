"""ChatGLM2-6B with a forward pass of our own.

PaddleNLP's refuses attention that is not as wide as the hidden states, drops a prefix unless it is asked for a
cache, works out the rotary table of all 32,768 positions at every step (and cannot in bfloat16 on a CPU), and
ignores `rope_ratio`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddlenlp.transformers.chatglm_v2 import modeling as library

from utils.families.models.decoder import Cache, by_head, extended, run_layers
from utils.kernels.attention import every_head
from utils.kernels.masks import Attend
from utils.kernels.norm import rms_norm
from utils.kernels.rotary import neighbour_angles, quarter_turn


class ChatGLMv2Model(library.ChatGLMv2Model):
    """The library's layers without its rotary table, which a CPU cannot build in bfloat16."""

    def __init__(self, config: Any) -> None:
        library.ChatGLMv2PretrainedModel.__init__(self, config)
        heads, channels = config.num_attention_heads, config.kv_channels
        self.embedding = library.Embedding(config)
        if heads * channels == config.hidden_size:
            self.encoder = library.GLMTransformer(config)
        else:  # one head as wide as the hidden states is what the library agrees to build
            config.num_attention_heads, config.kv_channels = 1, config.hidden_size
            self.encoder = library.GLMTransformer(config)
            config.num_attention_heads, config.kv_channels = heads, channels
            width, fused = heads * channels, (heads + 2 * config.multi_query_group_num) * channels
            for layer in self.encoder.layers:
                attention, biased = layer.self_attention, config.add_bias_linear
                attention.query_key_value = nn.Linear(
                    config.hidden_size, fused, bias_attr=None if biased or config.add_qkv_bias else False
                )
                attention.dense = nn.Linear(width, config.hidden_size, bias_attr=None if biased else False)
        self.output_layer = library.Chatglmv2LMHead(config)


class ChatGLMv2ForCausalLM(library.ChatGLMv2ForCausalLM):
    """See `utils.families.decoder.DecoderFamily` for what is added to the library's class."""

    def __init__(self, config: Any) -> None:
        library.ChatGLMv2PretrainedModel.__init__(self, config)
        self.chatglm_v2 = ChatGLMv2Model(config)
        self.criterion = library.ChatGLMv2PretrainingCriterion(config)
        self.attention_dropout = config.attention_dropout

    def decode(self, ids: Tensor, positions: Tensor, attend: Attend, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Hidden states [batch, length, hidden] after the final norm, and the cache.

        Args:
            ids, positions: [batch, length] int64 (positions of one row stand for all).
        """
        encoder, config = self.chatglm_v2.encoder, self.config
        hidden = self.chatglm_v2.embedding.word_embeddings(ids)
        heads, groups, channels = config.num_attention_heads, config.multi_query_group_num, config.kv_channels
        places = positions.expand(ids.shape).astype("float32") / config.rope_ratio  # a longer context (ChatGLM2-6B-32K)
        cos, sin = (x.astype(hidden.dtype) for x in neighbour_angles(places, channels // 2, channels))
        # tiled once: a product broadcast over the heads is slow on CPUs
        turns = [(cos.tile([1, 1, count, 1]), sin.tile([1, 1, count, 1])) for count in (heads, groups)]
        forward = partial(
            _layer,
            attend=attend,
            turns=turns,
            turn=quarter_turn(channels, hidden.dtype),
            after=config.apply_residual_connection_post_layernorm,
            dropout=config.hidden_dropout if self.training else 0.0,
        )
        hidden, kept = run_layers(encoder.layers, hidden, cache, forward, encoder.enable_recompute)
        return _norm(encoder.final_layernorm, hidden), kept


def _norm(layer: Any, hidden: Tensor) -> Tensor:
    return rms_norm(hidden, layer.weight, layer.epsilon)


def _layer(
    layer: Any,
    hidden: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    *,
    attend: Attend,
    turns: list[tuple[Tensor, Tensor]],
    turn: Tensor,
    after: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    attention, mlp = layer.self_attention, layer.mlp
    (heads, channels), groups = turns[0][0].shape[2:], turns[1][0].shape[2]
    group = heads // groups
    normed = _norm(layer.input_layernorm, hidden)
    sizes = [heads * channels, groups * channels, groups * channels]
    parts = paddle.split(attention.query_key_value(normed), sizes, axis=-1)
    query, key, value = (by_head(part, part.shape[-1] // channels) for part in parts)
    query, key = (x * cos + paddle.matmul(x, turn) * sin for x, (cos, sin) in zip((query, key), turns, strict=True))
    key, value = extended(past_key, key), extended(past_value, value)
    attended = attention.dense(attend(query, every_head(key, group), every_head(value, group)))
    hidden = (normed if after else hidden) + (F.dropout(attended, dropout) if dropout else attended)
    normed = _norm(layer.post_attention_layernorm, hidden)
    gate, up = paddle.chunk(mlp.dense_h_to_4h(normed), 2, axis=-1)
    changed = mlp.dense_4h_to_h(F.silu(gate) * up)
    return (normed if after else hidden) + (F.dropout(changed, dropout) if dropout else changed), key, value
