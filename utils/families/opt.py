"""OPT: learned positions behind an offset; the 350M model is narrower at both ends and norms after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from utils.families import config as kinds
from utils.families.base import Dropout, FamilySpec
from utils.families.tokenizers import VOCABULARY_FILES, Tokenizer
from utils.families.tokenizers_bpe import bpe_tokenizer
from utils.model.architecture import ATTENTION, MLP, Architecture, Initial, LayerNames, ModelShape, PositionTable
from utils.model.weights import Stored
from utils.settings import FLAG, Table

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
    "opt": "model",
    "opt.embeddings.word_embeddings": "model.decoder.embed_tokens",
    "opt.embeddings.position_embeddings": "model.decoder.embed_positions",
    "opt.embeddings.project_in": "model.decoder.project_in",
    "norm1": "self_attn_layer_norm",
    "linear1": "fc1",
    "linear2": "fc2",
    "norm2": "final_layer_norm",
    "lm_head.decoder_weight": "lm_head.weight",
}
_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "_remove_final_layer_norm",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_RENAMED = {  # published -> of the Paddle model
    "ffn_dim": "intermediate_size",
    "do_layer_norm_before": "normalize_before",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "init_std": "initializer_range",
}
_FALLBACK = {"do_layer_norm_before": True, "dropout": 0.1, "attention_dropout": 0.0, "init_std": 0.02}


class Opt(FamilySpec):
    name = "opt"
    title = "OPT"
    model_types = ("opt",)
    architectures = ("OPTForCausalLM",)
    settings: ClassVar[Table] = {
        **dict.fromkeys(("hidden_size", "word_embed_proj_dim", "ffn_dim", "intermediate_size"), kinds.WIDTH),
        "num_hidden_layers": kinds.LAYERS,
        "num_attention_heads": kinds.HEADS,
        "max_position_embeddings": kinds.POSITIONS,
        **dict.fromkeys(("_remove_final_layer_norm", "do_layer_norm_before", "normalize_before"), FLAG),
        **dict.fromkeys(("dropout", "hidden_dropout_prob", "attention_dropout"), kinds.SHARE),
        "attention_probs_dropout_prob": kinds.SHARE,
        "init_std": kinds.SPREAD,
        **kinds.ACTIVATIONS,
    }
    needed = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
        "ffn_dim/intermediate_size",
    )
    dropouts = (
        Dropout("attention", "attention_probs_dropout_prob"),
        Dropout("hidden", "hidden_dropout_prob"),
        Dropout("embedding", "hidden_dropout_prob"),
    )
    stored = Stored(_PUBLISHED)
    tokenizer_files = VOCABULARY_FILES

    def paddle_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "model_type": "opt",
            "architectures": ["OPTForCausalLM"],
            "word_embed_proj_dim": self._width(config),
            "hidden_act": "relu",  # the library's own forward pass, which is not used, knows few
            "activation": kinds.activation_name(config, "relu"),
            **{name: config[name] for name in _SAME if name in config},
            **{name: self._get(config, published) for published, name in _RENAMED.items()},
        }

    def published_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "model_type": "opt",
            "architectures": ["OPTForCausalLM"],
            "word_embed_proj_dim": self._width(config),
            "activation_function": kinds.activation_name(config, "relu"),
            **{name: config[name] for name in _SAME if name in config},
            **{published: self._get(config, published) for published in _RENAMED},
        }

    @staticmethod
    def _get(config: Mapping[str, Any], published: str) -> Any:
        """A setting that has another name in each layout."""
        return config.get(published, config.get(_RENAMED[published], _FALLBACK.get(published)))

    @staticmethod
    def _width(config: Mapping[str, Any]) -> int:
        return config.get("word_embed_proj_dim") or config["hidden_size"]

    def tokenizer(self, folder: Path, config: Mapping[str, Any]) -> Tokenizer | None:
        return bpe_tokenizer(folder, config)

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        heads = config["num_attention_heads"]
        return ModelShape(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=heads,
            head_dim=config["hidden_size"] // heads,
            intermediate=self._get(config, "ffn_dim"),
            vocabulary=config["vocab_size"],
            positions=config.get("max_position_embeddings"),
            tied=bool(config.get("tie_word_embeddings", True)),
        )

    def architecture(self, config: Mapping[str, Any]) -> Architecture:
        shape, norm_first = self.shape(config), bool(self._get(config, "do_layer_norm_before"))
        projected, rows = self._width(config) != shape.hidden, config["max_position_embeddings"] + 2
        return Architecture(
            shape,
            layers="opt.decoder.layers",
            parts=PARTS,
            biased=(*ATTENTION, *MLP),
            embedding="opt.embeddings.word_embeddings",
            embedding_projection="opt.embeddings.project_in" if projected else None,
            embedding_width=self._width(config),
            tables=(PositionTable("opt.embeddings.position_embeddings", rows, offset=2),),
            norm="layer",
            epsilon=1e-5,
            activation=kinds.activation_name(config, "relu"),
            gated=False,
            norm_first=norm_first,
            final_norm="opt.decoder.final_layer_norm"
            if norm_first and not config.get("_remove_final_layer_norm")
            else None,
            output_projection="opt.decoder.project_out" if projected else None,
            head=None if shape.tied else "lm_head.decoder_weight",
            head_is_table=True,
            initial=Initial.spread(self._get(config, "init_std"), head=False),
        )


OPT = Opt()
