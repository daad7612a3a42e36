"""LLaMA 1, 2 and 3, and what shares their architecture (SmolLM2, Vicuna, TinyLlama, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.families.base import FamilySpec, ModelShape, Weight


class Llama(FamilySpec):
    name = "llama"
    title = "LLaMA v1/v2"
    model_types = ("llama",)
    architectures = ("LlamaForCausalLM", "LLaMAForCausalLM")
    config_class = "paddlenlp.transformers:LlamaConfig"
    model_class = "paddlenlp.transformers:LlamaForCausalLM"
    backbone = "llama"
    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def paddle_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        known = dict(config)
        known["num_key_value_heads"] = known.get("num_key_value_heads") or known["num_attention_heads"]
        for name in ("auto_map", "_name_or_path", "torch_dtype", "transformers_version", "use_cache"):
            known.pop(name, None)
        return known

    def published_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        names = [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_theta",
            "rope_scaling",
            "tie_word_embeddings",
            "initializer_range",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        ]
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            **{name: config[name] for name in names if name in config},
        }

    def weights(self, config: Mapping[str, Any]) -> list[Weight]:
        found = [Weight("model.embed_tokens.weight", "llama.embed_tokens.weight")]
        linears = [f"self_attn.{name}" for name in self.lora_targets[:4]]
        linears += [f"mlp.{name}" for name in self.lora_targets[4:]]
        for layer in range(config["num_hidden_layers"]):
            source, target = f"model.layers.{layer}", f"llama.layers.{layer}"
            for name in linears:
                found.append(Weight(f"{source}.{name}.weight", f"{target}.{name}.weight", transpose=True))
            for name in ("input_layernorm", "post_attention_layernorm"):
                found.append(Weight(f"{source}.{name}.weight", f"{target}.{name}.weight"))
        found.append(Weight("model.norm.weight", "llama.norm.weight"))
        if not config.get("tie_word_embeddings", False):
            found.append(Weight("lm_head.weight", "lm_head.weight", transpose=True))
        return found

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

    def create(self, config: Mapping[str, Any], **overrides: Any) -> Any:
        import paddle
        from paddlenlp.transformers.llama import modeling

        from utils.kernels import attention, norm, rotary

        model = super().create(config, **overrides)
        for layer in model.llama.layers:
            layer.self_attn.attn_func = attention.library_attention
        if not paddle.is_compiled_with_cuda():  # GPUs have fused operators for these
            modeling.apply_rotary_pos_emb = rotary.apply_rotary_pos_emb
            for layer in model.sublayers():
                if isinstance(layer, modeling.LlamaRMSNorm):
                    layer.forward = norm.forward_of(layer)
        return model

    def forward_hidden(self, model: Any, batch: Mapping[str, Any], cache: Any = None) -> Any:
        return model.llama(
            batch["input_ids"],
            position_ids=batch.get("position_ids"),
            attention_mask=batch.get("attention_mask"),
            attn_mask_startend_row_indices=batch.get("segment_ends") if cache is None else None,
            past_key_values=cache,
            use_cache=False,
            return_dict=True,
        )[0]

    def step(
        self, model: Any, input_ids: Any, attention_mask: Any, position_ids: Any, cache: Any = None
    ) -> tuple[Any, Any]:
        output = model.llama(
            input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        return self.logits(model, output[0][:, -1:])[:, 0], output.past_key_values

    def prefix_cache(self, flat: Any) -> Any:
        layers = flat.shape[2] // 2
        parts = flat.transpose([2, 0, 1, 3, 4])  # [2 * layers, batch, prefix, heads, dim]
        return [(parts[i], parts[layers + i]) for i in range(layers)]

    def flatten_cache(self, cache: Any) -> Any:
        import paddle

        return paddle.stack([key for key, _ in cache] + [value for _, value in cache], axis=2)

    def cache_select(self, cache: Any, rows: Any) -> Any:
        return [(key.index_select(rows), value.index_select(rows)) for key, value in cache]


LLAMA = Llama()
