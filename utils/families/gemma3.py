"""Gemma 3, text only (Gemma Team 2025, arXiv:2503.19786): most layers see a window, each has four norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from utils.errors import raise_if
from utils.families import config as kinds
from utils.families.llama import Llama
from utils.model.architecture import Architecture, Initial, Local, ModelShape, rotated_halves
from utils.model.weights import Stored
from utils.settings import FLAG, TEXT, TEXTS, Table, whole

_DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_OTHERS = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")  # of Gemma 2, and later


class Gemma3(Llama):
    name = "gemma3"
    title = "Gemma 3"
    model_types = ("gemma3_text",)
    architectures = ("Gemma3ForCausalLM",)
    settings: ClassVar[Table] = {
        **Llama.settings,
        "hidden_activation": TEXT,
        **dict.fromkeys(("query_pre_attn_scalar", "rope_local_base_freq"), kinds.SCALE),
        "sliding_window": kinds.WINDOW,
        "sliding_window_pattern": whole(1, 10_000),
        "layer_types": TEXTS,
        **dict.fromkeys(_OTHERS[:2], kinds.SCALE),
        "use_bidirectional_attention": FLAG,
    }
    backbone = "gemma3"
    stored = Stored({"gemma3": "model"})
    parts = replace(
        Llama.parts,
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
        attention_out_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_out_norm="post_feedforward_layernorm",
    )
    published_names = (*Llama.published_names, *(name for name in _DEFAULTS if name not in Llama.published_names))

    def paddle_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        known = {**_DEFAULTS, **config}
        by_kind = config.get("rope_parameters") or {}  # as transformers 5 writes them: one object per kind of layer
        if _GLOBAL in by_kind:
            known["rope_parameters"] = by_kind[_GLOBAL]
            near = by_kind.get(_LOCAL, {})
            known["rope_local_base_freq"] = near.get("rope_theta", known["rope_local_base_freq"])
        known = super().paddle_config(known)
        kinds_of_layers = known.get("layer_types") or []
        faults = [f"config.json: {name} is not supported in a Gemma 3 model" for name in _OTHERS if known.get(name)]
        if kinds_of_layers and (
            len(kinds_of_layers) != known["num_hidden_layers"] or set(kinds_of_layers) - {_LOCAL, _GLOBAL}
        ):
            faults.append(f"config.json: layer_types must name {_LOCAL} or {_GLOBAL} for each of num_hidden_layers")
        raise_if(faults)
        return known

    def published_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        known = {**super().published_config(config), "layer_types": self._kinds(self.paddle_config(config))}
        del known["hidden_act"], known["sliding_window_pattern"]
        return known

    @staticmethod
    def _kinds(known: Mapping[str, Any]) -> list[str]:
        """Which layers are local: five of six, unless config.json lists them."""
        numbers, pattern = range(1, known["num_hidden_layers"] + 1), known["sliding_window_pattern"]
        return known.get("layer_types") or [_LOCAL if number % pattern else _GLOBAL for number in numbers]

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        return super().shape({**_DEFAULTS, **config})

    def architecture(self, config: Mapping[str, Any]) -> Architecture:
        known, plain = self.paddle_config(config), super().architecture(config)
        near = rotated_halves(plain.shape.head_dim, plain.shape.head_dim, known["rope_local_base_freq"])
        local = frozenset(number for number, kind in enumerate(self._kinds(known)) if kind == _LOCAL)
        return replace(
            plain,
            parts=replace(self.parts, score_scale=known["query_pre_attn_scalar"] ** -0.5),
            activation=known["hidden_activation"],
            embedding_scale=plain.shape.hidden**0.5,
            norm_offset=1.0,
            initial=Initial.spread(known.get("initializer_range", 0.02)),
            local=Local(local, known["sliding_window"], near) if known["sliding_window"] else None,
        )


GEMMA3 = Gemma3()
