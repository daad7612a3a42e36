"""LLaMA 1, 2 and 3, and what shares their architecture (SmolLM2, Vicuna, TinyLlama, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from utils.errors import raise_if
from utils.families import config as kinds
from utils.families.base import Dropout, FamilySpec
from utils.families.rope import frequencies, rope_scaling
from utils.model.architecture import ATTENTION, MLP, Architecture, Initial, LayerNames, ModelShape, Role, Rotary
from utils.model.weights import Stored
from utils.settings import FLAG, TEXT, Table


class Llama(FamilySpec):
    """Also the base of families that are built like LLaMA and differ in biases or the reach of attention."""

    name = "llama"
    title = "LLaMA v1/v2"
    model_types: tuple[str, ...] = ("llama",)
    architectures: tuple[str, ...] = ("LlamaForCausalLM", "LLaMAForCausalLM")
    settings: ClassVar[Table] = {
        "hidden_size": kinds.WIDTH,
        "intermediate_size": kinds.WIDTH,
        "num_hidden_layers": kinds.LAYERS,
        "num_attention_heads": kinds.HEADS,
        "num_key_value_heads": kinds.HEADS,
        "head_dim": kinds.WIDTH,
        "max_position_embeddings": kinds.POSITIONS,
        "rms_norm_eps": kinds.EPSILON,
        "attention_bias": FLAG,
        "mlp_bias": FLAG,
        "alibi": FLAG,
        "hidden_act": TEXT,
        "rope_theta": kinds.SCALE,
        "rope_scaling": kinds.ROPE,
        "rope_parameters": kinds.ROPE,
        "rope_scaling_type": TEXT,
        "rope_scaling_factor": kinds.SCALE,
        "partial_rotary_factor": kinds.SCALE,
        "use_flash_attention": FLAG,
    }
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    head_width = ("head_dim",)
    head_multiple = 2
    backbone = "llama"
    parts = LayerNames(
        attention_norm="input_layernorm",
        query_key_value=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_out="self_attn.o_proj",
        mlp_norm="post_attention_layernorm",
        mlp_in=("mlp.gate_proj", "mlp.up_proj"),
        mlp_out="mlp.down_proj",
        norms="last",
    )
    dropouts = (Dropout("attention", "attention_dropout"),)
    stored = Stored({"llama": "model"})
    # of config.json, kept in the Hugging Face layout
    published_names: tuple[str, ...] = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )

    # --- what families of this build differ in ---------------------------------------------------

    def biased(self, config: Mapping[str, Any]) -> tuple[Role, ...]:
        """Which matrices have a bias."""
        return (ATTENTION if config.get("attention_bias") else ()) + (MLP if config.get("mlp_bias") else ())

    # --- configuration ---------------------------------------------------------------------------

    def paddle_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """
        Raises:
            UserError: what neither the library nor this module computes; nothing is ignored in silence.
        """
        known = dict(config)
        known["num_key_value_heads"] = known.get("num_key_value_heads") or known["num_attention_heads"]
        for name in (
            "auto_map",
            "_name_or_path",
            "torch_dtype",
            "transformers_version",
            "use_cache",
            "quantization_config",
        ):
            known.pop(name, None)
        rotary = known.pop("rope_parameters", None) or {}  # as transformers 5 writes them: in one object
        if "rope_theta" in rotary:
            known["rope_theta"] = rotary["rope_theta"]
        known["rope_scaling"] = known.get("rope_scaling") or rotary
        faults = []
        inside = known["rope_scaling"].get("rope_theta")
        if inside is not None and known.get("rope_theta") is None:
            known["rope_theta"] = inside
        elif inside is not None and inside != known["rope_theta"]:
            outside = known["rope_theta"]
            faults.append(f"config.json: rope_theta is {outside:g}, but {inside:g} in rope_scaling; remove one of them")
        if known.get("hidden_act", "silu") not in ("silu", "swish"):
            faults.append(f"config.json: hidden_act {known['hidden_act']!r} is not supported; {self.title} has silu")
        if known.get("alibi"):
            faults.append("config.json: alibi is not supported in a LLaMA model")
        if any(place.get("partial_rotary_factor", 1.0) != 1.0 for place in (known, rotary, known["rope_scaling"])):
            faults.append("config.json: partial_rotary_factor other than 1 is not supported")
        raise_if(faults)
        known["rope_scaling"] = scaling = rope_scaling(known)
        if scaling is not None and scaling["rope_type"] == "linear":  # the library's names for it
            known.update(rope_scaling_type="linear", rope_scaling_factor=scaling["factor"])
        return known

    def published_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        known = self.paddle_config(config)
        return {
            "architectures": [self.architectures[0]],
            "model_type": self.model_types[0],
            "hidden_act": "silu",
            **{name: known[name] for name in self.published_names if name in known},
            "rope_scaling": known["rope_scaling"],
        }

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        heads = config["num_attention_heads"]
        return ModelShape(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            positions=config.get("max_position_embeddings"),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    def architecture(self, config: Mapping[str, Any]) -> Architecture:
        known = self.paddle_config(config)
        shape, found = self.shape(known), frequencies(known, self.shape(known).head_dim)
        return Architecture(
            shape,
            layers=f"{self.backbone}.layers",
            parts=self.parts,
            biased=self.biased(known),
            embedding=f"{self.backbone}.embed_tokens",
            norm="rms",
            epsilon=known.get("rms_norm_eps", 1e-6),
            activation="silu",
            gated=True,
            final_norm=f"{self.backbone}.norm",
            head=None if shape.tied else "lm_head.weight",
            rotary=Rotary(found.inverse[None], magnitude=found.magnitude),
            window=self.window(known),
            initial=Initial.spread(known.get("initializer_range", 0.02), layers=shape.layers),
        )


LLAMA = Llama()
