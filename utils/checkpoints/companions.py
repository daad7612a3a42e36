"""What stands beside weights so that a folder alone is enough: tokenizer, template, generation settings."""

from __future__ import annotations

import shutil
from pathlib import Path

from utils.checkpoints.locate import Checkpoint
from utils.data.template import ChatTemplate
from utils.families import FamilySpec
from utils.families.tokenizers import SENTENCEPIECE_FILES, TOKENIZER_JSON, load_tokenizer

GENERATION_CONFIG = "generation_config.json"


def has_tokenizer(folder: Path, family: FamilySpec) -> bool:
    names = (*family.tokenizer_files, TOKENIZER_JSON, *SENTENCEPIECE_FILES)
    return any((folder / name).is_file() for name in names)


def write_companions(base: Checkpoint, adapter: Path, folder: Path) -> None:
    """Writes tokenizer and chat template as they were in training (beside the adapter), else those of the
    base, and the base's generation settings.

    Raises:
        UserError: no tokenizer, or one that does not fit the base.
    """
    source = adapter if has_tokenizer(adapter, base.family) else base.folder
    load_tokenizer(source, base.config).save(folder)
    ChatTemplate.load(source, default=base.family.chat_template).save(folder)
    if (base.folder / GENERATION_CONFIG).is_file():
        shutil.copyfile(base.folder / GENERATION_CONFIG, folder / GENERATION_CONFIG)
