"""Bloom and BloomZ: no position embeddings but linear biases on attention scores (ALiBi)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from utils.families import config as kinds
from utils.families.base import Dropout, FamilySpec
from utils.model.architecture import ATTENTION, MLP, Architecture, Initial, LayerNames, ModelShape, alibi_slopes
from utils.model.weights import Stored
from utils.settings import FLAG, Table

_KEPT = (
    "vocab_size",
    "layer_norm_epsilon",
    "initializer_range",
    "apply_residual_connection_post_layernorm",
    "hidden_dropout",
    "attention_dropout",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
PARTS = LayerNames(
    attention_norm="input_layernorm",
    query_key_value=("self_attention.query_key_value",),
    by_head=True,
    attention_out="self_attention.dense",
    mlp_norm="post_attention_layernorm",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
)


class Bloom(FamilySpec):
    name = "bloom"
    title = "Bloom"
    model_types = ("bloom",)
    architectures = ("BloomForCausalLM",)
    settings: ClassVar[Table] = {
        **dict.fromkeys(("hidden_size", "n_embed"), kinds.WIDTH),
        **dict.fromkeys(("n_layer", "num_hidden_layers"), kinds.LAYERS),
        **dict.fromkeys(("n_head", "num_attention_heads"), kinds.HEADS),
        "layer_norm_epsilon": kinds.EPSILON,
        "apply_residual_connection_post_layernorm": FLAG,
        **dict.fromkeys(("hidden_dropout", "attention_dropout"), kinds.SHARE),
    }
    needed = ("vocab_size", "hidden_size/n_embed", "n_layer/num_hidden_layers", "n_head/num_attention_heads")
    dropouts = (Dropout("attention", "attention_dropout"), Dropout("hidden", "hidden_dropout"))
    stored = Stored({"bloom": "transformer", "lm_head.decoder_weight": "lm_head.weight"})

    def paddle_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        shape = self.shape(config)
        return {
            "model_type": "bloom",
            "architectures": ["BloomForCausalLM"],
            "hidden_size": shape.hidden,
            "n_layer": shape.layers,
            "n_head": shape.heads,
            **{name: config[name] for name in _KEPT if name in config},
        }

    def published_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return self.paddle_config(config)

    def ignored_weights(self) -> tuple[str, ...]:
        return (r"lm_head\.decoder_weight",)  # of tied heads, which PaddleNLP may store a second time

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        """Published configurations name the sizes in several ways (n_embed, num_attention_heads, ...)."""
        hidden = config.get("hidden_size") or config["n_embed"]
        heads = config.get("n_head") or config["num_attention_heads"]
        return ModelShape(
            hidden=hidden,
            layers=config.get("n_layer") or config["num_hidden_layers"],
            heads=heads,
            kv_heads=heads,
            head_dim=hidden // heads,
            intermediate=4 * hidden,
            vocabulary=config["vocab_size"],
            positions=None,
            tied=bool(config.get("tie_word_embeddings", True)),
        )

    def architecture(self, config: Mapping[str, Any]) -> Architecture:
        shape = self.shape(config)
        return Architecture(
            shape,
            layers="bloom.h",
            parts=PARTS,
            biased=(*ATTENTION, *MLP),
            embedding="bloom.word_embeddings",
            embedding_norm="bloom.word_embeddings_layernorm",
            norm="layer",
            epsilon=config.get("layer_norm_epsilon", 1e-5),
            activation="gelu_new",
            gated=False,
            final_norm="bloom.ln_f",
            head=None if shape.tied else "lm_head.decoder_weight",
            head_is_table=True,
            slopes=alibi_slopes(shape.heads),
            residual="normed" if config.get("apply_residual_connection_post_layernorm") else "hidden",
            initial=Initial.spread(config.get("initializer_range", 0.02), head=False),
        )


BLOOM = Bloom()
