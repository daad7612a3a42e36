"""GPT-2's byte-level BPE as vocab.json and merges.txt, which GPT-2 and OPT publish."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.families.tokenizer_settings import Settings
from utils.families.tokenizers import SETTINGS_FILES, TOKENIZER_JSON, VOCABULARY_FILES, JsonTokenizer, added_token
from utils.settings import read_json, read_text

END = "<|endoftext|>"  # what ends a text where no file says anything else
_ROLES = ("bos", "eos", "pad", "unk")


class BpeTokenizer(JsonTokenizer):
    """vocab.json (token -> id) and merges.txt (one pair per line, in order), run by the `tokenizers` library."""

    def _description(self, settings: Settings) -> str:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        folder = settings.folder
        vocabulary = _read_vocabulary(folder / VOCABULARY_FILES[0])
        merges = _read_merges(folder / VOCABULARY_FILES[1])
        unknown = sorted({token for pair in merges for token in (*pair, "".join(pair))} - vocabulary.keys())
        if unknown:
            raise UserError(
                f"{folder}: {VOCABULARY_FILES[1]} joins {unknown[0]!r}, which {VOCABULARY_FILES[0]} does not have; "
                "the two files do not belong together"
            )
        tokenizer = Tokenizer(models.BPE())
        blank = settings.flag("add_prefix_space", default=False)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=blank)
        tokenizer.decoder = decoders.ByteLevel()
        if END in vocabulary:
            for role in ("bos", "eos"):
                settings.default_token(role, END)
        description = json.loads(tokenizer.to_str())
        description["model"] |= {"vocab": vocabulary, "merges": merges}
        special = dict.fromkeys(token for token in map(settings.token, _ROLES) if token in vocabulary)
        description["added_tokens"] = [
            {"id": vocabulary[token], **added_token(token, special=True)} for token in special if token
        ]
        return json.dumps(description)


def _read_vocabulary(file: Path) -> dict[str, int]:
    found = read_json(file)
    if not all(type(place) is int and 0 <= place < 1 << 32 for place in found.values()):
        raise UserError(f"{file}: expected a JSON object of tokens and their ids")
    try:
        "".join(found).encode()
    except UnicodeEncodeError:
        raise UserError(f"{file}: a token holds half of a surrogate pair; copy the file again") from None
    return found


def _read_merges(file: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise UserError(f"{file} line {number}: expected two tokens with a blank between, found {line!r}")
        merges.append((pair[0], pair[1]))
    return merges


def bpe_tokenizer(folder: Path, config: Mapping[str, Any]) -> BpeTokenizer | None:
    """The tokenizer of a folder that has both files but no tokenizer.json, which would say the same and more.

    Raises:
        UserError: one of the files is missing or damaged, they do not belong together, or do not fit the model.
    """
    have = [(folder / name).is_file() for name in VOCABULARY_FILES]
    if (folder / TOKENIZER_JSON).is_file() or not any(have):
        return None
    if not all(have):
        missing = VOCABULARY_FILES[have.index(False)]
        raise UserError(f"{folder}: {missing} is missing; copy it from the original model")
    files = [folder / name for name in (*VOCABULARY_FILES, *SETTINGS_FILES) if (folder / name).is_file()]
    return BpeTokenizer(files, Settings(folder, config))
