"""GPT-3 of PaddleNLP and GPT-2: learned positions; published with fused Conv1D weights [in, out]."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from utils.families import config as kinds
from utils.families.base import Dropout
from utils.families.decoder import DecoderFamily, activation_name
from utils.families.tokenizers import VOCABULARY_FILES, Tokenizer
from utils.families.tokenizers_bpe import bpe_tokenizer
from utils.model.architecture import Architecture, LayerNames, ModelShape, PositionTable
from utils.model.weights import Split, Weight
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


class Gpt(DecoderFamily):
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
    config_class = "paddlenlp.transformers:GPTConfig"
    model_class = "utils.families.models.gpt:GPTForCausalLM"
    backbone = "gpt"
    embedding = "embeddings"
    layers = "gpt.decoder.layers"
    dropouts = (Dropout("attention", "attention_probs_dropout_prob"), Dropout("hidden", "hidden_dropout_prob"))
    lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj", "linear1", "linear2")
    tokenizer_files = VOCABULARY_FILES

    def paddle_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "model_type": "gpt",
            "architectures": ["GPTForCausalLM"],
            "hidden_activation": "gelu",  # the library's own forward pass, which is not used, knows few
            "activation": activation_name(config, "gelu"),
            **{name: self._get(config, name) for name in _SAME if name in config or name in _DEFAULTS},
            **{name: self._get(config, published) for published, name in _RENAMED.items()},
        }

    def published_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "activation_function": activation_name(config, "gelu"),
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

    def weights(self, config: Mapping[str, Any]) -> list[Weight]:
        def both(
            published: str, parameter: str, split: Split | None = None, part: tuple[int, int] | None = None
        ) -> list[Weight]:
            shared = None if split == "row" else split
            return [
                Weight(f"{published}.weight", f"{parameter}.weight", conv1d=bool(split), part=part, split=split),
                Weight(f"{published}.bias", f"{parameter}.bias", part=part, split=shared),
            ]

        found = [
            Weight("transformer.wte.weight", "gpt.embeddings.word_embeddings.weight", split="vocabulary"),
            Weight("transformer.wpe.weight", "gpt.embeddings.position_embeddings.weight"),
        ]
        for layer in range(self.shape(config).layers):
            source, target = f"transformer.h.{layer}", f"gpt.decoder.layers.{layer}"
            found += both(f"{source}.ln_1", f"{target}.norm1")
            for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
                found += both(f"{source}.attn.c_attn", f"{target}.self_attn.{name}", "column", part=(index, 3))
            found += both(f"{source}.attn.c_proj", f"{target}.self_attn.out_proj", "row")
            found += both(f"{source}.ln_2", f"{target}.norm2")
            found += both(f"{source}.mlp.c_fc", f"{target}.linear1", "column")
            found += both(f"{source}.mlp.c_proj", f"{target}.linear2", "row")
        found += both("transformer.ln_f", "gpt.decoder.norm")
        if not self.shape(config).tied:
            found.append(Weight("lm_head.weight", "lm_head.weight", split="vocabulary"))
        return found

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
        scale = shape.head_dim**-0.5 if self._get(config, "scale_attn_weights") else 1.0
        by_layer = self._get(config, "scale_attn_by_inverse_layer_idx")

        def layer(number: int) -> LayerNames:
            place = f"gpt.decoder.layers.{number}"
            return LayerNames(
                attention_norm=f"{place}.norm1",
                query_key_value=tuple(f"{place}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")),
                attention_out=f"{place}.self_attn.out_proj",
                mlp_norm=f"{place}.norm2",
                mlp_in=(f"{place}.linear1",),
                mlp_out=f"{place}.linear2",
                score_scale=scale / (number + 1) if by_layer else scale,
            )

        return Architecture(
            shape,
            layer,
            embedding="gpt.embeddings.word_embeddings",
            tables=(PositionTable("gpt.embeddings.position_embeddings"),),
            norm="layer",
            epsilon=self._get(config, "layer_norm_epsilon"),
            activation=activation_name(config, "gelu"),
            gated=False,
            final_norm="gpt.decoder.norm",
            head=None if shape.tied else "lm_head.weight",
            head_is_table=True,
        )


GPT = Gpt()
