"""ChatGLM2-6B: grouped keys and values, rotary positions on half of each head, numbered chat rounds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from utils.errors import UserError, notice
from utils.families import config as kinds
from utils.families.base import Dropout, FamilySpec
from utils.families.chatglm import LATER_KEYS, layers
from utils.model.architecture import ATTENTION, MLP, Architecture, LayerNames, ModelShape, Role, rotated_neighbours
from utils.model.weights import Stored
from utils.settings import FLAG, Table

if TYPE_CHECKING:
    from utils.families.tokenizers import Tokenizer

# As the published chat code writes it; only the last answer is followed by the end token.
CHAT_TEMPLATE = (
    "{%- set count = namespace(rounds=0) -%}"
    "{{ '[gMASK]sop' }}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}"
    "{%- set count.rounds = count.rounds + 1 -%}"
    "{{ '[Round ' ~ count.rounds ~ ']\\n\\n问：' ~ message.content ~ '\\n\\n答：' }}"
    "{%- elif message.role == 'assistant' and loop.last -%}{{ message.content ~ eos_token }}"
    "{%- else -%}{{ message.content ~ '\\n\\n' }}{%- endif -%}"
    "{%- endfor -%}"
)
# What decides the model, with the library's values (those of the published model where they differ).
DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "multi_query_group_num": 2,
    "layernorm_epsilon": 1e-5,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "rope_ratio": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Switches of the published code that no published model of this family turns.
FIXED = {"rmsnorm": True, "post_layer_norm": True, "multi_query_attention": True, "fp32_residual_connection": False}
PARTS = LayerNames(
    attention_norm="input_layernorm",
    query_key_value=("self_attention.query_key_value",),
    attention_out="self_attention.dense",
    mlp_norm="post_attention_layernorm",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
)


class ChatGLM2(FamilySpec):
    name = "chatglm2"
    title = "ChatGLM2-6B"
    model_types = ("chatglm_v2",)
    architectures = ("ChatGLMv2ForCausalLM", "ChatGLM2ForConditionalGeneration")
    settings: ClassVar[Table] = {
        **dict.fromkeys(("hidden_size", "ffn_hidden_size", "kv_channels"), kinds.WIDTH),
        **dict.fromkeys(("num_layers", "num_hidden_layers"), kinds.LAYERS),
        **dict.fromkeys(("num_attention_heads", "multi_query_group_num"), kinds.HEADS),
        "padded_vocab_size": kinds.TOKENS,
        **dict.fromkeys(("seq_length", "max_sequence_length"), kinds.POSITIONS),
        "layernorm_epsilon": kinds.EPSILON,
        **dict.fromkeys(("hidden_dropout", "attention_dropout"), kinds.SHARE),
        **dict.fromkeys(("add_bias_linear", "add_qkv_bias", "apply_residual_connection_post_layernorm"), FLAG),
        **dict.fromkeys(FIXED, FLAG),
        "rope_ratio": kinds.SCALE,
    }
    needed = ()
    head_width = ("kv_channels",)
    head_multiple = 4
    dropouts = (Dropout("attention", "attention_dropout"), Dropout("hidden", "hidden_dropout"))
    stored = Stored({"chatglm_v2": "transformer"})
    chat_template = CHAT_TEMPLATE
    tokenizer_files = ("tokenizer.model",)

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Published folders share `model_type` with ChatGLM-6B; their keys tell them apart."""
        shared = config.get("model_type") == "chatglm" and any(key in config for key in LATER_KEYS)
        return shared or super().matches(config)

    def read_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        known = super().read_config(config)
        if known.get("rope_ratio", 1) != 1:
            notice(
                f"rope_ratio {known['rope_ratio']}: positions are divided by it, as ChatGLM2-6B-32K means it; "
                "ChatGLM3 and GLM-4 use the key in another way and are not supported"
            )
        return known

    def paddle_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See the base class.

        Raises:
            UserError: switches that no model of this family has, or heads that groups do not divide.
        """
        known = _known(config)
        faults = [
            f"config.json: {name} is {config[name]!r}; a ChatGLM2 model has {value!r}"
            for name, value in FIXED.items()
            if config.get(name, value) != value
        ]
        if known["num_attention_heads"] % known["multi_query_group_num"]:
            faults.append("config.json: multi_query_group_num does not divide num_attention_heads")
        if faults:
            raise UserError(faults)
        return {
            **known,
            "num_hidden_layers": layers(config),
            "vocab_size": _vocabulary(config),
            "max_sequence_length": _positions(config),
            "tie_word_embeddings": False,
        }

    def published_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "architectures": ["ChatGLMModel"],
            "model_type": "chatglm",
            "tokenizer_class": "ChatGLMTokenizer",
            **_known(config),
            **FIXED,
            "num_layers": layers(config),
            "padded_vocab_size": _vocabulary(config),
            "seq_length": _positions(config),
            "apply_query_key_layer_scaling": True,
            "attention_softmax_in_fp32": True,
            "bias_dropout_fusion": True,
            "original_rope": True,
            "tie_word_embeddings": False,
            "use_cache": True,
        }

    def ignored_weights(self) -> tuple[str, ...]:
        return (r".*rotary_pos_emb\.inv_freq",)

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        known = _known(config)
        return ModelShape(
            hidden=known["hidden_size"],
            layers=layers(config),
            heads=known["num_attention_heads"],
            kv_heads=known["multi_query_group_num"],
            head_dim=known["kv_channels"],
            intermediate=known["ffn_hidden_size"],
            vocabulary=_vocabulary(config),
            positions=_positions(config),
            tied=False,
        )

    def architecture(self, config: Mapping[str, Any]) -> Architecture:
        known, shape = _known(config), self.shape(config)
        joined: tuple[Role, ...] = ("query_key_value",) if known["add_qkv_bias"] else ()
        return Architecture(
            shape,
            layers="chatglm_v2.encoder.layers",
            parts=PARTS,
            biased=(*ATTENTION, *MLP) if known["add_bias_linear"] else joined,
            embedding="chatglm_v2.embedding.word_embeddings",
            norm="rms",
            epsilon=known["layernorm_epsilon"],
            activation="silu",
            gated=True,
            final_norm="chatglm_v2.encoder.final_layernorm",
            head="chatglm_v2.output_layer.weight",
            rotary=rotated_neighbours(shape.head_dim, shape.head_dim // 2, known["rope_ratio"]),
            residual="normed" if known["apply_residual_connection_post_layernorm"] else "hidden",
        )

    def tokenizer(self, folder: Path, config: Mapping[str, Any]) -> Tokenizer | None:
        from utils.families.tokenizers_chatglm import PIECES, Glm2Tokenizer

        return Glm2Tokenizer(folder, config) if (folder / PIECES).is_file() else None


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: default if config.get(name) is None else config[name] for name, default in DEFAULTS.items()}


def _vocabulary(config: Mapping[str, Any]) -> int:
    return config.get("padded_vocab_size") or config.get("vocab_size") or 65024


def _positions(config: Mapping[str, Any]) -> int:
    return config.get("seq_length") or config.get("max_sequence_length") or 32768


CHATGLM2 = ChatGLM2()
