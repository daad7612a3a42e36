"""A whole tiny model folder for tests: random LLaMA weights and a real byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import paddle
from tiny_tokenizers import write_bpe

from utils.checkpoints.load import new_model
from utils.checkpoints.save import save_model
from utils.families import FAMILIES


def write_tiny_llama(folder: Path, *, seed: int = 7, **overrides: Any) -> Path:
    """Writes a LLaMA of 2 layers, grouped KV heads and about 320 tokens; returns its folder."""
    sizes = write_bpe(folder)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # wide enough that answers differ from prompt to prompt
        **sizes,
        **overrides,
    }
    paddle.seed(seed)
    family = FAMILIES["llama"]
    save_model(folder, new_model(family, config, "float32"), family, config)
    return folder
