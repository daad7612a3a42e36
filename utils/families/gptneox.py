"""GPT-NeoX and Pythia (Black et al. 2022, arXiv:2204.06745; Biderman et al. 2023, arXiv:2304.01373): attention and MLP
side by side, each behind a norm of its own; a part of each head turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from utils.errors import raise_if
from utils.families import config as kinds
from utils.families.base import Dropout, FamilySpec
from utils.families.rope import rope_scaling
from utils.model.architecture import ATTENTION, MLP, Architecture, Initial, LayerNames, ModelShape, rotated_halves
from utils.settings import FLAG, TEXT, Table, number

PARTS = LayerNames(
    attention_norm="input_layernorm",
    query_key_value=("attention.query_key_value",),
    by_head=True,
    attention_out="attention.dense",
    mlp_norm="post_attention_layernorm",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
    norms="first",
)
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_KEPT = (*_NEEDED, "bos_token_id", "eos_token_id", "pad_token_id")
_DEFAULTS = {
    "max_position_embeddings": 2048,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "attention_bias": True,
    "initializer_range": 0.02,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}


class GptNeoX(FamilySpec):
    name = "gptneox"
    title = "GPT-NeoX"
    model_types = ("gpt_neox",)
    architectures = ("GPTNeoXForCausalLM",)
    settings: ClassVar[Table] = {
        **dict.fromkeys(("hidden_size", "intermediate_size"), kinds.WIDTH),
        "num_hidden_layers": kinds.LAYERS,
        "num_attention_heads": kinds.HEADS,
        "max_position_embeddings": kinds.POSITIONS,
        "rotary_pct": number(0.0, 1.0, above=True),
        **dict.fromkeys(("rotary_emb_base", "rope_theta"), kinds.SCALE),
        **dict.fromkeys(("rope_scaling", "rope_parameters"), kinds.ROPE),
        "hidden_act": TEXT,
        "layer_norm_eps": kinds.EPSILON,
        **dict.fromkeys(("use_parallel_residual", "attention_bias"), FLAG),
        **dict.fromkeys(("hidden_dropout", "attention_dropout"), kinds.SHARE),
    }
    needed = _NEEDED
    head_multiple = 2
    dropouts = (Dropout("attention", "attention_dropout"), Dropout("hidden", "hidden_dropout"))

    def paddle_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """
        Raises:
            UserError: what this module does not compute.
        """
        known = {
            "model_type": "gpt_neox",
            "architectures": ["GPTNeoXForCausalLM"],
            **{name: config[name] for name in _KEPT if name in config},
            **{name: config.get(name, default) for name, default in _DEFAULTS.items()},
        }
        rotary = config.get("rope_parameters") or {}  # as transformers 5 writes them
        known["rotary_pct"] = rotary.get("partial_rotary_factor", known["rotary_pct"])
        known["rotary_emb_base"] = rotary.get("rope_theta", known["rotary_emb_base"])
        rotated, head_dim, faults = self.rotated(known), self.shape(config).head_dim, []
        if rotated % 2 or not rotated:
            faults.append(
                f"config.json: rotary_pct is {known['rotary_pct']:g}: {rotated} of the {head_dim} dimensions of a head "
                "would turn; expected an even number, and not 0"
            )
        if rope_scaling({**config, "rope_scaling": config.get("rope_scaling") or rotary}) is not None:
            faults.append("config.json: rope_scaling is not supported in a GPT-NeoX model; set it to null")
        raise_if(faults)
        return known

    def published_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return self.paddle_config(config)

    def ignored_weights(self) -> tuple[str, ...]:
        """Rotary frequencies, and the causal mask as a buffer."""
        return (r".*rotary_emb\.inv_freq", r".*\.attention\.(masked_)?bias")

    @staticmethod
    def rotated(config: Mapping[str, Any]) -> int:
        """How many dimensions of each head turn."""
        return int(config["hidden_size"] // config["num_attention_heads"] * config["rotary_pct"])

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return ModelShape(
            hidden=hidden,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=heads,
            head_dim=hidden // heads,
            intermediate=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            positions=config.get("max_position_embeddings", _DEFAULTS["max_position_embeddings"]),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    def architecture(self, config: Mapping[str, Any]) -> Architecture:
        known, shape = self.paddle_config(config), self.shape(config)
        return Architecture(
            shape,
            layers="gpt_neox.layers",
            parts=PARTS,
            biased=(*(ATTENTION if known["attention_bias"] else ()), *MLP),
            embedding="gpt_neox.embed_in",
            norm="layer",
            epsilon=known["layer_norm_eps"],
            activation=known["hidden_act"],
            gated=False,
            final_norm="gpt_neox.final_layer_norm",
            head=None if shape.tied else "embed_out.weight",
            rotary=rotated_halves(shape.head_dim, self.rotated(known), known["rotary_emb_base"]),
            parallel=known["use_parallel_residual"],
            initial=Initial.spread(known["initializer_range"]),
        )


GPTNEOX = GptNeoX()
