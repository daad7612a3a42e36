"""ChatGLM-6B: a prefix language model with two-dimensional positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from utils.families import config as kinds
from utils.families.base import FamilySpec
from utils.families.chatglm_input import PromptAndAnswer, prefix_lm
from utils.families.text import Text
from utils.model.architecture import ATTENTION, MLP, Architecture, Initial, LayerNames, ModelShape, Rotary
from utils.model.weights import Stored
from utils.settings import FLAG, Table

if TYPE_CHECKING:
    from utils.families.tokenizers import Tokenizer

# As the published chat code writes it: the first question as it is, a later one behind its numbered
# history, then [gMASK] and <sop>; the answer ends with <eop>.
CHAT_TEMPLATE = (
    "{%- set several = messages | selectattr('role', 'equalto', 'user') | list | length > 1 -%}"
    "{%- set count = namespace(rounds=0) -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}"
    "{%- if several -%}"
    "{{ '[Round ' ~ count.rounds ~ ']\\n问：' ~ message.content ~ '\\n答：' }}"
    "{%- set count.rounds = count.rounds + 1 -%}"
    "{%- else -%}{{ message.content }}{%- endif -%}"
    "{%- elif message.role == 'assistant' -%}"
    "{%- if loop.last -%}{{ '[gMASK]<sop>' ~ message.content ~ '<eop>' }}"
    "{%- else -%}{{ message.content ~ '\\n' }}{%- endif -%}"
    "{%- else -%}{{ message.content ~ '\\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '[gMASK]<sop>' }}{%- endif -%}"
)
# The published code gives every model the residual factor of 28 layers, whatever its own number.
PUBLISHED_LAYERS = 28
# What decides the model, with the values of the library and of the published code.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 130528,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "inner_hidden_size": 16384,
    "layernorm_epsilon": 1e-5,
    "max_sequence_length": 2048,
    "position_encoding_2d": True,
    "bos_token_id": 130004,
    "eos_token_id": 130005,
    "pad_token_id": 3,
    "mask_token_id": 130000,
    "gmask_token_id": 130001,
}
# Keys that only ChatGLM2, ChatGLM3 and GLM-4 have, which share this model_type.
LATER_KEYS = ("multi_query_attention", "multi_query_group_num", "padded_vocab_size", "kv_channels", "ffn_hidden_size")
PARTS = LayerNames(
    attention_norm="input_layernorm",
    query_key_value=("attention.query_key_value",),
    by_head=True,
    attention_out="attention.dense",
    mlp_norm="post_attention_layernorm",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
)


class ChatGLM(FamilySpec):
    name = "chatglm"
    title = "ChatGLM-6B"
    model_types = ("chatglm",)
    architectures = ("ChatGLMForCausalLM", "ChatGLMForConditionalGeneration")
    settings: ClassVar[Table] = {
        **dict.fromkeys(("hidden_size", "inner_hidden_size"), kinds.WIDTH),
        **dict.fromkeys(("num_layers", "num_hidden_layers", "residual_layers"), kinds.LAYERS),
        "num_attention_heads": kinds.HEADS,
        "layernorm_epsilon": kinds.EPSILON,
        "max_sequence_length": kinds.POSITIONS,
        "position_encoding_2d": FLAG,
        **dict.fromkeys(("bos_token_id", "mask_token_id", "gmask_token_id"), kinds.ID),
    }
    needed = ()
    head_multiple = 4
    stored = Stored({"chatglm.transformer": "transformer"})
    chat_template = CHAT_TEMPLATE
    tokenizer_files = ("ice_text.model",)

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Later generations share `model_type` and `architectures`."""
        return super().matches(config) and not any(key in config for key in LATER_KEYS)

    def paddle_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **_known(config),
            "num_hidden_layers": layers(config),
            "residual_layers": residual_layers(config),
        }

    def published_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "architectures": ["ChatGLMModel"],
            "model_type": "chatglm",
            "tokenizer_class": "ChatGLMTokenizer",
            **_known(config),
            "num_layers": layers(config),
            "residual_layers": residual_layers(config),
            "use_cache": True,
        }

    def ignored_weights(self) -> tuple[str, ...]:
        """Rotary frequencies, and the head, which is the embedding a second time (also in Paddle's name)."""
        return (r".*rotary_emb\.inv_freq", r"lm_head\.decoder_weight")

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        known = _known(config)
        hidden, heads = known["hidden_size"], known["num_attention_heads"]
        return ModelShape(
            hidden=hidden,
            layers=layers(config),
            heads=heads,
            kv_heads=heads,
            head_dim=hidden // heads,
            intermediate=known["inner_hidden_size"],
            vocabulary=known["vocab_size"],
            positions=known["max_sequence_length"],
            tied=True,
        )

    def architecture(self, config: Mapping[str, Any]) -> Architecture:
        known, shape = _known(config), self.shape(config)
        parts = 2 if known["position_encoding_2d"] else 1
        width = shape.head_dim // parts
        half = rotary_frequencies(width)
        inverse = np.zeros((parts, parts, width // 2), dtype=np.float32)
        for part in range(parts):
            inverse[part, part] = half  # each part of a head turns by one of the positions
        places = np.arange(shape.head_dim, dtype=np.int64).reshape(parts, 2, width // 2)
        return Architecture(
            shape,
            layers="chatglm.transformer.layers",
            parts=PARTS,
            biased=(*ATTENTION, *MLP),
            embedding="chatglm.transformer.word_embeddings",
            norm="layer",
            epsilon=known["layernorm_epsilon"],
            activation="gelu_new",
            gated=False,
            final_norm="chatglm.transformer.final_layernorm",
            rotary=Rotary(inverse.reshape(parts, -1), places.transpose(1, 0, 2).reshape(-1)),
            residual="normed",
            causal=False,
            prefix_reading=partial(prefix_lm, known),
            residual_factor=(2 * residual_layers(config)) ** 0.5,
            initial=Initial(tables=(2.0 / (shape.vocabulary + shape.hidden)) ** 0.5),
        )

    def tokenizer(self, folder: Path, config: Mapping[str, Any]) -> Tokenizer | None:
        from utils.families.tokenizers_chatglm import ICE_TEXT, IceTokenizer

        return IceTokenizer(folder, config) if (folder / ICE_TEXT).is_file() else None

    def text(self, config: Mapping[str, Any], prompt: Sequence[int]) -> Text:
        return PromptAndAnswer(prompt, _known(config))

    def shares_prefixes(self, config: Mapping[str, Any]) -> bool:
        return False


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: default if config.get(name) is None else config[name] for name, default in DEFAULTS.items()}


def layers(config: Mapping[str, Any]) -> int:
    """Number of layers, in the words of either layout."""
    return config["num_layers"] if "num_layers" in config else config.get("num_hidden_layers", PUBLISHED_LAYERS)


def residual_layers(config: Mapping[str, Any]) -> int:
    """The number of layers in the residual factor sqrt(2 n).

    28 in published models; PaddleNLP, whose config.json says `num_hidden_layers`, takes the model's own
    number. Ours say it themselves.
    """
    return config.get("residual_layers", PUBLISHED_LAYERS if "num_layers" in config else layers(config))


def rotary_frequencies(width: int) -> NDArray[np.float32]:
    """Radians per position, [width / 2], rounded to float16 as the published code keeps them."""
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return (1.0 / np.float32(10000.0) ** exponents).astype(np.float16).astype(np.float32)


CHATGLM = ChatGLM()
