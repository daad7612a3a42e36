"""A LLaMA with random weights and the embedded model's tokenizer, for benchmarks of training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_model(folder: Path, sizes: Mapping[str, Any]) -> None:
    """Writes a new folder.

    Args:
        sizes: config.json, without vocabulary and special tokens.
    """
    from utils import runtime

    runtime.prepare()
    runtime.load_paddle()
    from utils.checkpoints.locate import locate
    from utils.checkpoints.save import save_model
    from utils.families import FAMILIES
    from utils.families.tokenizers import load_tokenizer

    source = locate("smollm2-135m-instruct")
    tokenizer = load_tokenizer(source.folder, source.config)
    names = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    config = {**sizes, **{name: source.config.get(name) for name in names}}
    folder.mkdir()
    save_model(folder, FAMILIES["llama"].create(config), FAMILIES["llama"], config)
    tokenizer.save(folder)
