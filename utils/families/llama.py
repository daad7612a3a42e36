"""LLaMA 1, 2 and 3, and what shares their architecture (SmolLM2, Vicuna, TinyLlama, ...)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache, partial
from typing import Any, ClassVar

from utils.errors import UserError, raise_if
from utils.families import config as kinds
from utils.families.base import Context, Dropout, FamilySpec, LayerForward
from utils.families.rope import frequencies, rope_scaling
from utils.families.text import Places
from utils.model.architecture import ATTENTION, MLP, Architecture, LayerNames, ModelShape, Role, Rotary
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
    config_class = "paddlenlp.transformers:LlamaConfig"
    model_class = "paddlenlp.transformers:LlamaForCausalLM"
    backbone = "llama"
    layers = "llama.layers"
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
    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
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
            layers=self.layers,
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
        )

    # --- the model -------------------------------------------------------------------------------

    def create(self, config: Mapping[str, Any], **overrides: Any) -> Any:
        import paddle

        from utils.kernels import norm, rotary

        given = {**self.paddle_config(config), **overrides}
        shape = self.shape(given)
        odd = shape.head_dim * shape.heads != shape.hidden or given.get("attention_bias") or given.get("mlp_bias")
        if odd and given.get("tensor_parallel_degree", 1) > 1:
            raise UserError("config.json: tensor_parallel_degree above 1 needs head_dim = hidden / heads and no biases")
        # One position: each layer of the library fills a table of angles, which ours then replaces.
        no_table = {"max_position_embeddings": 1, "rope_scaling": None, "rope_scaling_type": None}
        model = super().create(config, **{**overrides, **no_table})
        decoder = getattr(model, self.backbone)
        for name in no_table:
            setattr(model.config, name, given.get(name))
            setattr(decoder.config, name, given.get(name))
        found = frequencies(given, shape.head_dim)
        model.rotary_table = rotary.RotaryTable(found.inverse, found.magnitude)
        for layer in decoder.layers:
            del layer.self_attn.rotary_emb
        self._fit_linears(model, shape, {name.split(".")[-2] for name in self._biases(given)})
        model.attention_window = self.window(given)
        if not paddle.is_compiled_with_cuda():  # GPUs have a fused operator for these
            for part in model.sublayers():
                if type(part).__name__.endswith("RMSNorm"):
                    part.forward = norm.forward_of(part)
        return model

    def _biases(self, config: Mapping[str, Any]) -> list[str]:
        return [weight.parameter for weight in self.weights(config) if weight.parameter.endswith(".bias")]

    def _fit_linears(self, model: Any, shape: ModelShape, biased: Collection[str]) -> None:
        """Replaces the Linear layers that the library makes of another size or bias than config.json says:
        its head_dim is always hidden / heads, and it has no biases.
        """
        from paddle import nn

        width, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        hidden, wide = shape.hidden, shape.intermediate
        attention = [(hidden, width), (hidden, narrow), (hidden, narrow), (width, hidden)]
        mlp = [(hidden, wide), (hidden, wide), (wide, hidden)]
        sizes = dict(zip(self.lora_targets, attention + mlp, strict=True))
        replaced = False
        for layer in getattr(model, self.backbone).layers:
            layer.self_attn.head_dim = shape.head_dim
            for number, (name, size) in enumerate(sizes.items()):
                part = layer.self_attn if number < 4 else layer.mlp
                linear = getattr(part, name, None)
                if not isinstance(linear, nn.Linear):  # split over devices, or fused
                    continue
                if tuple(linear.weight.shape) != size or (linear.bias is not None) != (name in biased):
                    setattr(part, name, nn.Linear(*size, bias_attr=None if name in biased else False))
                    replaced = True
        if replaced:
            model.init_weights()  # of the new ones; none when weights are about to be loaded

    def context(self, model: Any, batch: Mapping[str, Any], cached: int) -> Context:
        import paddle

        from utils.kernels import masks
        from utils.kernels.window import window_mask

        ids, ends, positions = batch["input_ids"], batch.get("segment_ends"), batch.get("position_ids")
        rows, length = ids.shape
        if positions is None:
            positions = paddle.arange(length, dtype="int64").expand([rows, length])
        visible, window = None, model.attention_window
        if window is not None and length > window:
            visible = window_mask(length, cached, window, prefix=cached)
            if ends is not None:
                visible = visible & masks.packed(ends, cached)
        elif cached or not (ends is not None or model.config.use_flash_attention):  # these two need no mask
            visible = masks.causal_or_packed(ids, ends, cached)
        if visible is not None:
            visible, ends = visible.expand([rows, -1, -1, -1]), None
        return self._context(model, ids, positions, cached + length, visible, ends)

    def inference_context(self, model: Any, input_ids: Any, places: Places) -> Context:
        return self._context(model, input_ids, places.positions[0], places.visible.shape[-1], places.visible, ends=None)

    def _context(self, model: Any, ids: Any, positions: Any, keys: int, visible: Any, ends: Any) -> Context:
        """
        Args:
            keys: number of all keys, which positions are below.
            visible: [batch, 1, length, keys] bool; None is causal, within segments where there are `ends`.
        """
        from utils.kernels import attention, masks

        config = model.config
        dropout = (getattr(config, "attention_dropout", None) or 0.0) if model.training else 0.0
        flash = config.use_flash_attention and not dropout
        attend = partial(
            attention.llama_attention,
            config=config,
            mask=None if visible is None else masks.additive(visible),
            segment_ends=ends if flash else None,
            segments=None if flash or ends is None else attention.segments_of(ends),
            group=config.num_attention_heads // config.num_key_value_heads,
            rank=model.tensor_part[0],
            dropout=dropout,
        )
        # one pair of angles for all layers, in the type that they turn out to have
        return Context(ids, cache(partial(model.rotary_table.at, positions, keys)), attend)

    def embed(self, model: Any, context: Context) -> Any:
        return getattr(model, self.backbone).embed_tokens(context.ids)

    def layer(self, model: Any, context: Context) -> LayerForward:
        from utils.families.models.llama import layer_forward

        group = model.key_value_group
        return partial(layer_forward, attend=context.attend, angles=context.positions, key_value_group=group)

    def finish(self, model: Any, hidden: Any) -> Any:
        return getattr(model, self.backbone).norm(hidden)

    def head_by_rows(self, model: Any) -> bool:
        return bool(model.config.tie_word_embeddings)


LLAMA = Llama()
