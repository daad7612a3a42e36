"""GLM: fills masked spans of a text that it reads in both directions (GLM-large-chinese to GLM-10B)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from utils.errors import UserError
from utils.families import config as kinds
from utils.families.base import Dropout, FamilySpec
from utils.families.glm_layout import SpansText, texts_read
from utils.families.text import Text
from utils.model.architecture import ATTENTION, MLP, Architecture, Initial, LayerNames, ModelShape, PositionTable
from utils.model.weights import Stored
from utils.settings import FLAG, Table

if TYPE_CHECKING:
    from utils.families.tokenizers import Tokenizer

SENTENCEPIECE_FILE = "cog-pretrain.model"
# The question with its mask (at its end, unless the text has one), then the span that fills it. Earlier
# rounds are context like any other text.
TEMPLATE = (
    "{%- set asked = messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | last -%}"
    "{%- set has_mask = '[MASK]' in asked or '[sMASK]' in asked or '[gMASK]' in asked -%}"
    "{%- set closing = ('' if has_mask else '[gMASK]') ~ '<|endoftext|><|startofpiece|>' -%}"
    "{{- '[CLS]' -}}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' and loop.last -%}"
    "{{- closing ~ message.content ~ '<|endofpiece|>' -}}"
    "{%- else -%}"
    "{{- ('' if loop.first else '\\n') ~ message.content -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- closing -}}{%- endif -%}"
)
MASK_NAMES = ("mask_token_id", "smask_token_id", "gmask_token_id")
ID_NAMES = ("sop_token_id", "eop_token_id", *MASK_NAMES)
# Published config.json files do not name them; the size of the vocabulary tells which tokenizer it is.
KNOWN_IDS = {
    50048: (50006, 50007, 50003, 50008, 50009),  # Chinese, sentencepiece
    50304: (50257, 50258, 50260, 50264, 50263),  # English, the BPE of GPT-2
    30592: (30522, 30523, 103, 30525, 30524),  # English, the word pieces of BERT
}
FIELDS = (
    "architectures",
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "max_sequence_length",
    "embedding_dropout_prob",
    "attention_dropout_prob",
    "output_dropout_prob",
    "attention_scale",
    "layernorm_epsilon",
    "initializer_range",
    "block_position_encoding",
    "relative_encoding",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    *ID_NAMES,
)
PARTS = LayerNames(
    attention_norm="input_layernorm",
    query_key_value=("attention.query_key_value",),
    attention_out="attention.dense",
    mlp_norm="post_attention_layernorm",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
)


class Glm(FamilySpec):
    name = "glm"
    title = "GLM"
    model_types = ("glm",)
    architectures = ("GLMForConditionalGeneration", "GLMModel", "GLMForMultipleChoice")
    settings: ClassVar[Table] = {
        "hidden_size": kinds.WIDTH,
        "num_layers": kinds.LAYERS,
        "num_attention_heads": kinds.HEADS,
        "max_sequence_length": kinds.POSITIONS,
        **dict.fromkeys(("embedding_dropout_prob", "attention_dropout_prob", "output_dropout_prob"), kinds.SHARE),
        "attention_scale": kinds.SCALE,
        "layernorm_epsilon": kinds.EPSILON,
        **dict.fromkeys(("block_position_encoding", "relative_encoding"), FLAG),
        **dict.fromkeys(ID_NAMES, kinds.ID),
    }
    needed = ("vocab_size", "hidden_size", "num_layers", "num_attention_heads")
    dropouts = (
        Dropout("attention", "attention_dropout_prob", 0.1),
        Dropout("hidden", "output_dropout_prob", 0.1),
        Dropout("embedding", "embedding_dropout_prob", 0.1),
    )
    stored = Stored(heads_together=True)
    chat_template = TEMPLATE
    tokenizer_files = (SENTENCEPIECE_FILE, "vocab.json", "merges.txt")

    def matches(self, config: Mapping[str, Any]) -> bool:
        """GLM-4 has the same `model_type`; it says `num_hidden_layers` where GLM says `num_layers`."""
        return super().matches(config) and "num_layers" in config

    def paddle_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See the base class.

        Raises:
            UserError: positions of another kind, or a vocabulary whose special tokens nothing names.
        """
        known = {name: config[name] for name in FIELDS if config.get(name) is not None}
        known.setdefault("max_sequence_length", 512)
        faults = []
        if not known.get("block_position_encoding", True) or known.get("relative_encoding"):
            faults.append(
                "config.json: block_position_encoding must be true and relative_encoding false; models with "
                "other positions are not supported"
            )
        if not all(name in known for name in ID_NAMES):
            if known["vocab_size"] not in KNOWN_IDS:
                faults.append(
                    f"config.json: vocab_size {known['vocab_size']} is none of the published ones "
                    f"({', '.join(map(str, KNOWN_IDS))}); name its special tokens: {', '.join(ID_NAMES)}"
                )
            known |= dict(zip(ID_NAMES, KNOWN_IDS.get(known["vocab_size"], ()), strict=False))
        if faults:
            raise UserError(faults)
        return {
            **known,
            "output_predict": True,
            "parallel_output": False,
            "max_position_embeddings": known["max_sequence_length"],
        }

    def published_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **self.paddle_config(config),
            "architectures": ["GLMForConditionalGeneration"],
            "model_type": "glm",
            "pool_token": "cls",
            "spell_func": "lstm",
            "spell_length": None,
        }

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return ModelShape(
            hidden=hidden,
            layers=config["num_layers"],
            heads=heads,
            kv_heads=heads,
            head_dim=hidden // heads,
            intermediate=4 * hidden,
            vocabulary=config["vocab_size"],
            positions=config.get("max_sequence_length", 512),
            tied=True,
        )

    def architecture(self, config: Mapping[str, Any]) -> Architecture:
        known, shape = self.paddle_config(config), self.shape(config)
        positions = known["max_sequence_length"]
        tokens = known["sop_token_id"], [known[name] for name in MASK_NAMES]
        return Architecture(
            shape,
            layers="glm.transformer.layers",
            parts=PARTS,
            biased=(*ATTENTION, *MLP),
            embedding="glm.word_embeddings",
            tables=(
                PositionTable("glm.transformer.position_embeddings", positions + 1, part=0),
                PositionTable("glm.transformer.block_position_embeddings", positions + 1, part=1),
            ),
            norm="layer",
            epsilon=config.get("layernorm_epsilon", 1e-5),
            activation="gelu_new",
            gated=False,
            final_norm="glm.transformer.final_layernorm",
            causal=False,
            prefix_reading=partial(texts_read, *tokens, positions),
            wide_scores=known.get("attention_scale", 1.0) > 1.0,
            initial=Initial.spread(known.get("initializer_range", 0.02)),
        )

    def tokenizer(self, folder: Path, config: Mapping[str, Any]) -> Tokenizer | None:
        from utils.families.tokenizers import VOCABULARY_FILES
        from utils.families.tokenizers_glm import ChineseTokenizer, EnglishTokenizer

        if (folder / SENTENCEPIECE_FILE).is_file():
            return ChineseTokenizer(folder, config)
        if all((folder / name).is_file() for name in VOCABULARY_FILES):
            return EnglishTokenizer(folder, config)
        return None

    def text(self, config: Mapping[str, Any], prompt: Sequence[int]) -> Text:
        known = self.paddle_config(config)
        return SpansText(prompt, known["sop_token_id"], [known[name] for name in MASK_NAMES])

    def shares_prefixes(self, config: Mapping[str, Any]) -> bool:
        return False


GLM = Glm()
