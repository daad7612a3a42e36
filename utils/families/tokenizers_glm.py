"""GLM's tokenizers: text pieces of sentencepiece (Chinese) or of GPT-2 (English), special tokens behind them."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.families.tokenizer_settings import Settings
from utils.families.tokenizers import (
    SETTINGS_FILES,
    THOUGHTS,
    VOCABULARY_FILES,
    SentencePieceTokenizer,
    Tokenizer,
)
from utils.families.tokenizers_bpe import BpeTokenizer
from utils.settings import read_bytes

END, END_OF_SPAN = "<|endoftext|>", "<|endofpiece|>"
MASKS = ("[MASK]", "[sMASK]", "[gMASK]")
# Behind the last text piece, in this order. One place of the Chinese list holds no token that is used.
CHINESE = (END, "[SEP]", "[CLS]", "[MASK]", "[UNK]", "[UNUSED1]", "<|startofpiece|>", END_OF_SPAN, "[sMASK]", "[gMASK]")
ENGLISH = ("<|startofpiece|>", END_OF_SPAN, "[CLS]", "[MASK]", "[SEP]", "[UNK]", "[gMASK]", "[sMASK]")
# A mask takes the blank before it: the span that fills it brings its own.
# Only a whole run of blanks is looked at, once: from each of its places it would take the square of its length.
BEFORE_MASK = re.compile(r"(?<!\s)\s+(?=" + "|".join(map(re.escape, MASKS)) + ")")


def _settings(folder: Path, config: Mapping[str, Any]) -> Settings:
    """Settings with the published defaults: texts begin with [CLS]; padding is the end token."""
    settings = Settings(folder, config)
    for role, token in (("bos", "[CLS]"), ("eos", END), ("pad", END)):
        settings.default_token(role, token)
    return settings


def _files(folder: Path, names: Sequence[str]) -> list[Path]:
    return [folder / name for name in (*names, *SETTINGS_FILES) if (folder / name).is_file()]


def _end_of_span(tokenizer: Tokenizer) -> tuple[int, ...]:
    """An answer ends with its span; the end of the text ends it too."""
    return tuple(dict.fromkeys([*tokenizer.eos_ids, tokenizer.special_tokens[END_OF_SPAN]]))


class ChineseTokenizer(SentencePieceTokenizer):
    """A `cog-pretrain.model`. Its own normalisation (NFKC, blanks merged, no line ends) is part of it."""

    text_tokens = THOUGHTS.union(MASKS)

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        settings = _settings(folder, config)
        size = _pieces(folder / "cog-pretrain.model")
        for place, token in enumerate(CHINESE, start=size):
            settings.added.setdefault(token, (place, True))
        super().__init__(_files(folder, ["cog-pretrain.model"]), settings)
        self.eos_ids = _end_of_span(self)

    def encode(self, text: str, *, continuation: bool = False, plain: Collection[int] = ()) -> list[int]:
        return super().encode(BEFORE_MASK.sub("", text), continuation=continuation, plain=_moved(text, plain))


def _moved(text: str, places: Collection[int]) -> set[int]:
    """The places of a text where they are once it has no blanks before masks."""
    blanks = [match.span() for match in BEFORE_MASK.finditer(text)] if places else []
    ends = [end for _, end in blanks]
    gone = list(accumulate((end - start for start, end in blanks), initial=0))
    return {place - gone[bisect_right(ends, place)] for place in places}


def _pieces(source: Path) -> int:
    """Number of pieces of a sentencepiece model.

    Raises:
        UserError: the file is no such model.
    """
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=read_bytes(source)).vocab_size()
    except RuntimeError as error:
        raise UserError(f"{source}: not a readable sentencepiece model ({error})") from None


class EnglishTokenizer(BpeTokenizer):
    """GPT-2's vocab.json and merges.txt."""

    text_tokens = THOUGHTS.union(MASKS)

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__(_files(folder, VOCABULARY_FILES), _settings(folder, config))
        self.eos_ids = _end_of_span(self)
        self.adds_bos = True

    def _description(self, settings: Settings) -> str:
        text = super()._description(settings)
        for place, token in enumerate(ENGLISH, start=len(json.loads(text)["model"]["vocab"])):
            settings.added.setdefault(token, (place, True))
        return text

    def encode(self, text: str, *, continuation: bool = False, plain: Collection[int] = ()) -> list[int]:
        return super().encode(BEFORE_MASK.sub("", text), continuation=continuation, plain=_moved(text, plain))
