"""GPT-3 of PaddleNLP and GPT-2: learned positions; published with fused Conv1D weights [in, out]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from utils.families import config as kinds
from utils.families.base import Dropout, FamilySpec
from utils.families.tokenizers import VOCABULARY_FILES, Tokenizer
from utils.families.tokenizers_bpe import bpe_tokenizer
from utils.model.architecture import ATTENTION, MLP, Architecture, Initial, LayerNames, ModelShape, PositionTable
from utils.model.weights import Stored
from utils.settings import FLAG, Table

_SAME = (
    "vocab_size",
    "initializer_range",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "layer_norm_epsilon",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_RENAMED = {  # published -> of the Paddle model
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "resid_pdrop": "hidden_dropout_prob",
    "attn_pdrop": "attention_probs_dropout_prob",
}
_NEEDED = ("n_embd", "n_layer", "n_head", "n_positions")
_DEFAULTS = {
    "resid_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
PARTS = LayerNames(
    attention_norm="norm1",
    query_key_value=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.out_proj",
    mlp_norm="norm2",
    mlp_in=("linear1",),
    mlp_out="linear2",
    norms="last",
)
_PUBLISHED = {
    "gpt.embeddings.word_embeddings": "transformer.wte",
    "gpt.embeddings.position_embeddings": "transformer.wpe",
    "gpt.decoder.layers": "transformer.h",
    "norm1": "ln_1",
    **dict.fromkeys(PARTS.query_key_value, "attn.c_attn"),
    "self_attn.out_proj": "attn.c_proj",
    "norm2": "ln_2",
    "linear1": "mlp.c_fc",
    "linear2": "mlp.c_proj",
    "gpt.decoder.norm": "transformer.ln_f",
}


class Gpt(FamilySpec):
    name = "gpt-3"
    title = "GPT-3"
    model_types = ("gpt", "gpt2")
    architectures = ("GPTForCausalLM", "GPTLMHeadModel", "GPT2LMHeadModel")
    settings: ClassVar[Table] = {
        **dict.fromkeys(("n_embd", "hidden_size", "n_inner", "intermediate_size"), kinds.WIDTH),
        **dict.fromkeys(("n_layer", "num_hidden_layers"), kinds.LAYERS),
        **dict.fromkeys(("n_head", "num_attention_heads"), kinds.HEADS),
        **dict.fromkeys(("n_positions", "max_position_embeddings"), kinds.POSITIONS),
        **dict.fromkeys(("resid_pdrop", "hidden_dropout_prob", "attn_pdrop"), kinds.SHARE),
        "attention_probs_dropout_prob": kinds.SHARE,
        "layer_norm_epsilon": kinds.EPSILON,
        **dict.fromkeys(("scale_attn_weights", "scale_attn_by_inverse_layer_idx"), FLAG),
        **kinds.ACTIVATIONS,
    }
    needed = ("vocab_size", *(f"{published}/{_RENAMED[published]}" for published in _NEEDED))
    dropouts = (
        Dropout("attention", "attention_probs_dropout_prob"),
        Dropout("hidden", "hidden_dropout_prob"),
        Dropout("embedding", "hidden_dropout_prob"),
    )
    stored = Stored(_PUBLISHED, conv1d=True)
    tokenizer_files = VOCABULARY_FILES

    def paddle_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "model_type": "gpt",
            "architectures": ["GPTForCausalLM"],
            "hidden_activation": "gelu",  # the library's own forward pass, which is not used, knows few
            "activation": kinds.activation_name(config, "gelu"),
            **{name: self._get(config, name) for name in _SAME if name in config or name in _DEFAULTS},
            **{name: self._get(config, published) for published, name in _RENAMED.items()},
        }

    def published_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "activation_function": kinds.activation_name(config, "gelu"),
            "embd_pdrop": self._get(config, "resid_pdrop"),
            **{name: self._get(config, name) for name in _SAME if name in config or name in _DEFAULTS},
            **{published: self._get(config, published) for published in _RENAMED},
        }

    @staticmethod
    def _get(config: Mapping[str, Any], published: str) -> Any:
        """A setting of either layout, by its published name."""
        value = config.get(published, config.get(_RENAMED.get(published, published)))
        if value is not None:
            return value
        if published == "n_inner":
            return 4 * Gpt._get(config, "n_embd")
        return _DEFAULTS[published] if published in _DEFAULTS else config[published]

    def ignored_weights(self) -> tuple[str, ...]:
        return (r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",)  # the causal mask as a buffer

    def tokenizer(self, folder: Path, config: Mapping[str, Any]) -> Tokenizer | None:
        return bpe_tokenizer(folder, config)

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        hidden, heads = self._get(config, "n_embd"), self._get(config, "n_head")
        return ModelShape(
            hidden=hidden,
            layers=self._get(config, "n_layer"),
            heads=heads,
            kv_heads=heads,
            head_dim=hidden // heads,
            intermediate=self._get(config, "n_inner"),
            vocabulary=config["vocab_size"],
            positions=self._get(config, "n_positions"),
            tied=bool(config.get("tie_word_embeddings", True)),
        )

    def architecture(self, config: Mapping[str, Any]) -> Architecture:
        shape = self.shape(config)
        scaled = self._get(config, "scale_attn_weights")
        return Architecture(
            shape,
            layers="gpt.decoder.layers",
            parts=PARTS if scaled else replace(PARTS, score_scale=1.0),
            biased=(*ATTENTION, *MLP),
            scale_by_layer=bool(self._get(config, "scale_attn_by_inverse_layer_idx")),
            embedding="gpt.embeddings.word_embeddings",
            tables=(PositionTable("gpt.embeddings.position_embeddings", self._get(config, "n_positions")),),
            norm="layer",
            epsilon=self._get(config, "layer_norm_epsilon"),
            activation=kinds.activation_name(config, "gelu"),
            gated=False,
            final_norm="gpt.decoder.norm",
            head=None if shape.tied else "lm_head.weight",
            head_is_table=True,
            initial=Initial.spread(config.get("initializer_range", 0.02), layers=shape.layers, head=False),
        )


GPT = Gpt()
