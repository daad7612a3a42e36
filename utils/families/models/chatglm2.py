"""ChatGLM2-6B with a forward pass of our own.

PaddleNLP's refuses attention that is not as wide as the hidden states, drops a prefix unless it is asked for a
cache, works out the rotary table of all 32,768 positions at every step (and cannot in bfloat16 on a CPU), and
ignores `rope_ratio`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddlenlp.transformers.chatglm_v2 import modeling as library

from utils.families.base import LayerForward
from utils.families.models.decoder import by_head, extended
from utils.kernels.attention import every_head
from utils.kernels.masks import Attend
from utils.kernels.norm import rms_norm
from utils.kernels.rotary import neighbours_turned
from utils.kernels.split import for_parts


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

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.chatglm_v2.embedding.word_embeddings(ids)

    def layer(self, attend: Attend, positions: Tensor) -> LayerForward:
        """
        Args:
            positions: [batch or 1, length] int64.
        """
        config = self.config
        channels = config.kv_channels
        places = positions.astype("float32") / config.rope_ratio  # a longer context (ChatGLM2-6B-32K)
        return partial(
            _layer,
            attend=attend,
            turn=neighbours_turned(places, channels // 2, channels),
            channels=channels,
            group=config.num_attention_heads // config.multi_query_group_num,
            after=config.apply_residual_connection_post_layernorm,
            dropout=config.hidden_dropout if self.training else 0.0,
            tensor_part=self.tensor_part,
            key_value_group=self.key_value_group,
        )

    def shared(self, attend: Attend) -> Attend:
        """An attention of as many keys as queries as one of keys that several queries share."""
        group, rank = self.config.num_attention_heads // self.config.multi_query_group_num, self.tensor_part[0]

        def spread(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attend(query, *(every_head(x, query.shape[2], group, rank) for x in (key, value)))

        return spread

    def finish(self, hidden: Tensor) -> Tensor:
        return _norm(self.chatglm_v2.encoder.final_layernorm, hidden)


def _norm(layer: Any, hidden: Tensor) -> Tensor:
    return rms_norm(hidden, layer.weight, layer.epsilon)


def _layer(
    layer: Any,
    hidden: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    *,
    attend: Attend,
    turn: Callable[[Tensor], Tensor],
    channels: int,
    group: int,
    after: bool,
    dropout: float,
    tensor_part: tuple[int, int],
    key_value_group: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    attention, mlp = layer.self_attention, layer.mlp
    normed = _norm(layer.input_layernorm, hidden)
    fused = for_parts(attention.query_key_value(normed), key_value_group)
    narrow = fused.shape[-1] // (group + 2)  # of this process's keys; as many values, `group` times as many queries
    parts = paddle.split(fused, [group * narrow, narrow, narrow], axis=-1)
    query, key, value = (by_head(part, channels) for part in parts)
    rank, ranks = tensor_part
    if key_value_group is not None:  # every process has all of the fused heads
        few = query.shape[2] // ranks
        query = query[:, :, rank * few : (rank + 1) * few]
    query, key = turn(query), turn(key)
    key, value = extended(past_key, key), extended(past_value, value)
    attended = attention.dense(attend(query, key, value))
    hidden = (normed if after else hidden) + (F.dropout(attended, dropout) if dropout else attended)
    normed = _norm(layer.post_attention_layernorm, hidden)
    gate, up = paddle.chunk(mlp.dense_h_to_4h(normed), 2, axis=-1)
    changed = mlp.dense_4h_to_h(F.silu(gate) * up)
    return (normed if after else hidden) + (F.dropout(changed, dropout) if dropout else changed), key, value
