"""OPT with a forward pass of our own.

PaddleNLP's derives positions from the attention mask, which counts a prefix and cannot describe packed rows; its
head is never tied to the embedding, and has the wrong width where `word_embed_proj_dim` is not the hidden size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import paddle
from paddle import Tensor
from paddlenlp.transformers.opt import modeling as library

from utils.families.base import LayerForward
from utils.families.models.decoder import transformer_layer
from utils.kernels.inference import activation
from utils.kernels.masks import Attend


class Embeddings(library.OPTEmbeddings):
    """Token embeddings, widened to the hidden size if they are narrower, and learned positions."""

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Both [batch or 1, length] int64 -> [batch, length, hidden]."""
        hidden = self.word_embeddings(ids)
        if self.project_in is not None:
            hidden = self.project_in(hidden)
        places = self.position_embeddings
        # the first `offset` rows of the table belong to no position
        return self.dropout(hidden + paddle.nn.functional.embedding(positions + places.offset, places.weight))


class OPTForCausalLM(library.OPTForCausalLM):
    """See `utils.families.decoder.DecoderFamily` for what is added to the library's class."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.opt.embeddings = Embeddings(config)
        words = self.opt.embeddings.word_embeddings.weight
        if not config.tie_word_embeddings:
            words = self.create_parameter(shape=words.shape, dtype=words.dtype)
        self.lm_head = library.OPTLMHead(config, words)
        if getattr(config, "_remove_final_layer_norm", False):
            self.opt.decoder.final_layer_norm = None
        self.activate = activation(config.activation)
        self.attention_dropout = config.attention_probs_dropout_prob

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.opt.embeddings(ids, positions)

    def layer(self, attend: Attend, positions: Tensor) -> LayerForward:
        config = self.config
        return partial(
            transformer_layer,
            attend=attend,
            head_dim=config.hidden_size // config.num_attention_heads,
            norm_first=config.normalize_before,
            activate=self.activate,
            dropout=config.hidden_dropout_prob if self.training else 0.0,
        )

    def finish(self, hidden: Tensor) -> Tensor:
        """[batch, length, word_embed_proj_dim]."""
        decoder = self.opt.decoder
        for last in (decoder.final_layer_norm, decoder.project_out):
            hidden = hidden if last is None else last(hidden)
        return hidden
