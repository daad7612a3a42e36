"""GPT-J with a forward pass of our own.

PaddleNLP's takes a token's place in the cache for its position, so that a prefix moves the text, and cuts its causal
mask from a table of all positions, which every layer holds and a CPU cannot build in bfloat16. It recomputes nothing,
and initialising its weights sets the epsilon of all norms to 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddlenlp.transformers.gptj import modeling as library

from utils.families.base import LayerForward
from utils.families.models.decoder import by_head, extended
from utils.kernels.inference import activation
from utils.kernels.masks import Attend
from utils.kernels.rotary import neighbours_turned


class Attention(nn.Layer):
    """The library's projections without its mask."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width, bias_attr=False) for _ in range(4)
        )


class Block(nn.Layer):
    """One layer, with the library's names."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, epsilon=config.layer_norm_epsilon)
        self.attn = Attention(config.n_embd)
        self.mlp = library.GPTJMLP(config.n_inner or 4 * config.n_embd, config)


class GPTJForCausalLM(library.GPTJForCausalLM):
    """See `utils.families.decoder.DecoderFamily` for what is added to the library's class."""

    def __init__(self, config: Any) -> None:
        layers, config.n_layer = config.n_layer, 0  # the library's are not built
        super().__init__(config)
        config.n_layer = layers
        self.transformer.h = nn.LayerList([Block(config) for _ in range(layers)])
        self.transformer.ln_f._epsilon = config.layer_norm_epsilon
        self.activate = activation(config.activation_function)
        self.attention_dropout = config.attn_pdrop

    def _initialize_weights(self, layer: Any) -> None:
        """Replaces the library's hook, which leaves weights of other types than float32 to Paddle."""
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            spread = self.config.initializer_range
            layer.weight.set_value(paddle.normal(0.0, spread, layer.weight.shape).astype(layer.weight.dtype))

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.transformer.drop(self.transformer.wte(ids))

    def layer(self, attend: Attend, positions: Tensor) -> LayerForward:
        """
        Args:
            positions: [batch or 1, length] int64, from 0.
        """
        config = self.config
        head_dim = config.n_embd // config.n_head
        return partial(
            _layer,
            attend=attend,
            turn=neighbours_turned(positions, config.rotary_dim, head_dim),
            head_dim=head_dim,
            activate=self.activate,
            dropout=config.resid_pdrop if self.training else 0.0,
        )

    def finish(self, hidden: Tensor) -> Tensor:
        return self.transformer.ln_f(hidden)


def _layer(
    layer: Any,
    hidden: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    *,
    attend: Attend,
    turn: Callable[[Tensor], Tensor],
    head_dim: int,
    activate: Callable[[Tensor], Tensor],
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    attention, mlp = layer.attn, layer.mlp
    normed = layer.ln_1(hidden)  # read by attention and MLP
    query, key, value = (
        by_head(project(normed), head_dim) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    key, value = extended(past_key, turn(key)), extended(past_value, value)
    attended = attention.out_proj(attend(turn(query), key, value))
    changed = mlp.fc_out(activate(mlp.fc_in(normed)))
    if dropout:
        attended, changed = F.dropout(attended, dropout), F.dropout(changed, dropout)
    return hidden + attended + changed, key, value
