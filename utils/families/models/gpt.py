"""GPT-2 and GPT-3 with a forward pass of our own.

PaddleNLP's cuts its causal mask from a table of `max_position_embeddings` rows, too few behind a prefix, drops
every mask with flash attention, recomputes without the prefix, and takes every GELU for its tanh form.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from paddle import Tensor
from paddlenlp.transformers.gpt import modeling as library

from utils.families.base import LayerForward
from utils.families.models.decoder import transformer_layer
from utils.kernels.inference import activation
from utils.kernels.masks import Attend


class GPTForCausalLM(library.GPTForCausalLM):
    """See `utils.families.decoder.DecoderFamily` for what is added to the library's class."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if not config.tie_word_embeddings:
            self.lm_head = library.GPTLMHead(config)
        self.gpt.bias = None  # the table of the causal mask, max_position_embeddings squared; not used
        self.activate = activation(config.activation)
        self.attention_dropout = config.attention_probs_dropout_prob
        self.head_dim = config.hidden_size // config.num_attention_heads
        scale = 1.0 if config.scale_attn_weights else math.sqrt(self.head_dim)
        for number, layer in enumerate(self.gpt.decoder.layers, 1):
            layer.score_scale = scale / number if config.scale_attn_by_inverse_layer_idx else scale
        for layer in self.sublayers():
            if isinstance(layer, library.GPTLayerNorm):
                layer._epsilon = config.layer_norm_epsilon

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.gpt.embeddings(ids, positions)

    def layer(self, attend: Attend, positions: Tensor) -> LayerForward:
        def forward(layer: Any, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
            return block(layer, *tensors, scale=layer.score_scale)

        block = partial(
            transformer_layer,
            attend=attend,
            head_dim=self.head_dim,
            norm_first=True,
            activate=self.activate,
            dropout=self.config.hidden_dropout_prob if self.training else 0.0,
        )
        return forward

    def finish(self, hidden: Tensor) -> Tensor:
        return self.gpt.decoder.norm(hidden)
