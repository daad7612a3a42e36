"""Qwen (the first generation: Qwen-1.8B to Qwen-72B and their chat models)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from utils.errors import UserError
from utils.families import config as kinds
from utils.families.base import Dropout, FamilySpec
from utils.families.text import Text
from utils.model.architecture import ATTENTION, MLP, Architecture, Initial, LayerNames, ModelShape, rotated_halves
from utils.model.weights import Stored
from utils.settings import FLAG, Table, number

if TYPE_CHECKING:
    from utils.families.tokenizers import Tokenizer

VOCABULARY_FILE = "qwen.tiktoken"
CHATML = (
    "{% if not messages or messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The names of the first release (modelscope's code) and what they became.
OLDER_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "ffn_hidden_size": "intermediate_size",
    "embd_pdrop": "emb_dropout_prob",
    "attn_pdrop": "attn_dropout_prob",
}
FIELDS = (
    "architectures",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_channels",
    "max_position_embeddings",
    "seq_length",
    "layer_norm_epsilon",
    "initializer_range",
    "emb_dropout_prob",
    "attn_dropout_prob",
    "scale_attn_weights",
    "rotary_pct",
    "rotary_emb_base",
    "use_dynamic_ntk",
    "use_logn_attn",
    "no_bias",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
DEFAULTS = {"kv_channels": 128, "max_position_embeddings": 8192, "no_bias": True, "tie_word_embeddings": False}
DEFAULTS |= {"use_dynamic_ntk": False, "use_logn_attn": False}  # the library's own are True

_KINDS: Table = {
    "hidden_size": kinds.WIDTH,
    "intermediate_size": kinds.WIDTH,
    "num_hidden_layers": kinds.LAYERS,
    "num_attention_heads": kinds.HEADS,
    "kv_channels": kinds.WIDTH,
    "max_position_embeddings": kinds.POSITIONS,
    "seq_length": kinds.POSITIONS,
    "layer_norm_epsilon": kinds.EPSILON,
    **dict.fromkeys(("emb_dropout_prob", "attn_dropout_prob"), kinds.SHARE),
    **dict.fromkeys(("scale_attn_weights", "use_dynamic_ntk", "use_logn_attn", "no_bias"), FLAG),
    "rotary_pct": number(0.0, 1.0, above=True),
    "rotary_emb_base": kinds.SCALE,
}

PARTS = LayerNames(
    attention_norm="ln_1",
    query_key_value=("attn.c_attn",),
    attention_out="attn.c_proj",
    mlp_norm="ln_2",
    mlp_in=("mlp.w2", "mlp.w1"),
    mlp_out="mlp.c_proj",
)


class Qwen(FamilySpec):
    name = "qwen"
    title = "Qwen"
    model_types = ("qwen",)
    architectures = ("QWenLMHeadModel", "QWenForCausalLM", "QWenForTextGeneration")
    settings: ClassVar[Table] = {**_KINDS, **{older: _KINDS[name] for older, name in OLDER_NAMES.items()}}
    needed = ("vocab_size", *(f"{name}/{older}" for older, name in OLDER_NAMES.items() if name in _NEEDED))
    head_width = ("kv_channels",)
    head_multiple = 2
    dropouts = (Dropout("attention", "attn_dropout_prob"), Dropout("embedding", "emb_dropout_prob"))
    stored = Stored({"qwen": "transformer"})
    chat_template = CHATML
    tokenizer_files = (VOCABULARY_FILE,)

    def paddle_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See the base class.

        Raises:
            UserError: sizes or ties that no model of this architecture has.
        """
        named = {OLDER_NAMES.get(name, name): value for name, value in config.items()}
        known = {**DEFAULTS, **{name: named[name] for name in FIELDS if named.get(name) is not None}}
        known.setdefault("seq_length", known["max_position_embeddings"])
        faults = []
        if known["kv_channels"] * known["num_attention_heads"] != known["hidden_size"]:
            faults.append(
                f"config.json: kv_channels {known['kv_channels']} x num_attention_heads "
                f"{known['num_attention_heads']} must be hidden_size {known['hidden_size']} in a Qwen model"
            )
        if known["tie_word_embeddings"]:
            faults.append("config.json: tie_word_embeddings is true; Qwen models have a head of their own")
        if faults:
            raise UserError(faults)
        return known

    def published_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **self.paddle_config(config),
            "architectures": ["QWenLMHeadModel"],
            "model_type": "qwen",
            "tokenizer_class": "QWenTokenizer",
            # all false: the published code then takes the type that the device is best at
            "bf16": False,
            "fp16": False,
            "fp32": False,
            "use_flash_attn": "auto",
        }

    def ignored_weights(self) -> tuple[str, ...]:
        return (*super().ignored_weights(), r".*\.attn\.(masked_)?bias$")

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        known = self.paddle_config(config)
        heads = known["num_attention_heads"]
        return ModelShape(
            hidden=known["hidden_size"],
            layers=known["num_hidden_layers"],
            heads=heads,
            kv_heads=heads,
            head_dim=known["hidden_size"] // heads,
            intermediate=known["intermediate_size"] // 2,  # the published figure counts both halves
            vocabulary=known["vocab_size"],
            positions=known["max_position_embeddings"],
            tied=False,
        )

    def architecture(self, config: Mapping[str, Any]) -> Architecture:
        known, shape = self.paddle_config(config), self.shape(config)
        rotated = int(shape.head_dim * known.get("rotary_pct", 1.0))
        rotary = rotated_halves(shape.head_dim, rotated, float(known.get("rotary_emb_base", 10000)))
        if known["use_logn_attn"]:
            rotary = replace(rotary, logn_length=known["seq_length"])
        if known["use_dynamic_ntk"]:
            power = np.zeros(shape.head_dim // 2)
            power[: rotated // 2] = -np.arange(0, rotated, 2) / (rotated - 2)
            rotary = replace(rotary, stretch_power=power.astype(np.float32))
        return Architecture(
            shape,
            layers="qwen.h",
            parts=PARTS,
            biased=("query_key_value",) if known["no_bias"] else (*ATTENTION, *MLP),
            embedding="qwen.wte",
            norm="rms",
            epsilon=known.get("layer_norm_epsilon", 1e-6),
            activation="silu",
            gated=True,
            final_norm="qwen.ln_f",
            head="lm_head.weight",
            rotary=rotary,
            initial=Initial(outputs=known.get("initializer_range", 0.02) / (2 * shape.layers) ** 0.5),
        )

    def tokenizer(self, folder: Path, config: Mapping[str, Any]) -> Tokenizer | None:
        if not (folder / VOCABULARY_FILE).is_file():
            return None
        from utils.families.tokenizers_qwen import QwenTokenizer

        return QwenTokenizer(folder, config)

    def text(self, config: Mapping[str, Any], prompt: Sequence[int]) -> Text:
        """A row keeps the NTK factor of its prompt, as in the published code."""
        known = self.paddle_config(config)
        text = Text(prompt)
        if known["use_dynamic_ntk"]:
            text.stretch = ntk_factor(len(prompt), known["seq_length"])
        return text

    def shares_prefixes(self, config: Mapping[str, Any]) -> bool:
        return not self.paddle_config(config)["use_dynamic_ntk"]


def ntk_factor(length: int, trained: int) -> float:
    """The factor of the rotary base for a prompt longer than the training length ("dynamic NTK").

    2^ceil(log2(length / trained) + 1) - 1, at least 1, as in the published code: 1 up to `trained`, 3 up
    to twice, 7 up to four times that length.
    """
    return max(1.0, 2.0 ** math.ceil(math.log2(max(length, 1) / trained) + 1.0) - 1.0)


QWEN = Qwen()
