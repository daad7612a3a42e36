"""GPT-J (Wang & Komatsuzaki 2021): attention and MLP side by side behind one norm; parts of each head rotate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from utils.errors import raise_if
from utils.families import config as kinds
from utils.families.base import Dropout, FamilySpec
from utils.families.tokenizers import VOCABULARY_FILES, Tokenizer
from utils.families.tokenizers_bpe import bpe_tokenizer
from utils.model.architecture import MLP, Architecture, Initial, LayerNames, ModelShape, rotated_neighbours
from utils.settings import TEXT, Table, whole

PARTS = LayerNames(
    attention_norm="ln_1",
    query_key_value=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    attention_out="attn.out_proj",
    mlp_norm="ln_1",
    mlp_in=("mlp.fc_in",),
    mlp_out="mlp.fc_out",
)
_DEFAULTS = {  # the same names in both layouts
    "n_positions": 2048,
    "rotary_dim": 64,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_KEPT = ("vocab_size", "n_embd", "n_layer", "n_head", "bos_token_id", "eos_token_id", "pad_token_id")


class GptJ(FamilySpec):
    name = "gptj"
    title = "GPT-J"
    model_types = ("gptj",)
    architectures = ("GPTJForCausalLM",)
    settings: ClassVar[Table] = {
        **dict.fromkeys(("n_embd", "n_inner"), kinds.WIDTH),
        "n_layer": kinds.LAYERS,
        "n_head": kinds.HEADS,
        "n_positions": kinds.POSITIONS,
        "rotary_dim": whole(1, 10_000_000, null=True),  # null is no default: it is refused
        "activation_function": TEXT,
        "layer_norm_epsilon": kinds.EPSILON,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), kinds.SHARE),
    }
    needed = ("vocab_size", "n_embd", "n_layer", "n_head")
    head_multiple = 2
    dropouts = (
        Dropout("attention", "attn_pdrop"),
        Dropout("hidden", "resid_pdrop"),
        Dropout("embedding", "embd_pdrop"),
    )
    tokenizer_files = VOCABULARY_FILES

    def paddle_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """
        Raises:
            UserError: what this module does not compute.
        """
        known = {
            "model_type": "gptj",
            "architectures": ["GPTJForCausalLM"],
            **{name: config[name] for name in _KEPT if name in config},
            **{name: config.get(name, default) for name, default in _DEFAULTS.items()},
            "tie_word_embeddings": False,
        }
        rotated, head_dim = known["rotary_dim"], self.shape(config).head_dim
        faults = []
        if rotated is None or rotated % 2 or rotated > head_dim:
            faults.append(f"config.json: rotary_dim is {rotated!r}; expected an even number up to {head_dim}")
        if config.get("tie_word_embeddings"):
            faults.append("config.json: tie_word_embeddings is not supported; a GPT-J model has a head of its own")
        raise_if(faults)
        return known

    def published_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return self.paddle_config(config)

    def ignored_weights(self) -> tuple[str, ...]:
        return (r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",)  # the causal mask as a buffer

    def tokenizer(self, folder: Path, config: Mapping[str, Any]) -> Tokenizer | None:
        return bpe_tokenizer(folder, config)

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        hidden, heads = config["n_embd"], config["n_head"]
        return ModelShape(
            hidden=hidden,
            layers=config["n_layer"],
            heads=heads,
            kv_heads=heads,
            head_dim=hidden // heads,
            intermediate=config.get("n_inner") or 4 * hidden,
            vocabulary=config["vocab_size"],
            positions=config.get("n_positions", _DEFAULTS["n_positions"]),
            tied=False,
        )

    def architecture(self, config: Mapping[str, Any]) -> Architecture:
        known, shape = self.paddle_config(config), self.shape(config)
        return Architecture(
            shape,
            layers="transformer.h",
            parts=PARTS,
            biased=(*MLP, "head"),
            embedding="transformer.wte",
            norm="layer",
            epsilon=known["layer_norm_epsilon"],
            activation=known["activation_function"],
            gated=False,
            final_norm="transformer.ln_f",
            head="lm_head.weight",
            rotary=rotated_neighbours(shape.head_dim, known["rotary_dim"]),
            parallel=True,
            initial=Initial.spread(known["initializer_range"]),
        )


GPTJ = GptJ()
