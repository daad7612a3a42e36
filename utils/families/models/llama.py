"""One layer of LLaMA's kind by its parts: the library's masks, rotary angles and heads are those of whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paddle import Tensor

from utils.families.models.decoder import by_head, extended
from utils.kernels.masks import Attend
from utils.kernels.rotary import apply_rotary_pos_emb
from utils.kernels.split import for_parts


def layer_forward(
    layer: Any,
    hidden: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    *,
    attend: Attend,
    angles: Callable[[Any], tuple[Tensor, Tensor]],
    key_value_group: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `LayerForward`.

    Args:
        layer: a decoder layer of PaddleNLP's LLaMA or Qwen2.
        attend: of keys and values as they are cached, perhaps fewer than queries.
        angles: cos and sin [batch, length, 1, head_dim] in a type.
        key_value_group: of the processes that read some each of the keys and values that all of them have.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    query, key, value = (
        by_head(project(normed), attention.head_dim)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    key, value = (for_parts(x, key_value_group) for x in (key, value))
    query, key = apply_rotary_pos_emb(query, key, *angles(value.dtype))
    key, value = extended(past_key, key), extended(past_value, value)
    hidden = hidden + attention.o_proj(attend(query, key, value))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), key, value
