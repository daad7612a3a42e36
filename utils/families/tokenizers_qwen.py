"""Qwen's tokenizer: a tiktoken vocabulary (`qwen.tiktoken`), the special tokens right behind it."""

from __future__ import annotations

import base64
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.families.tokenizer_settings import Settings
from utils.families.tokenizers import SETTINGS_FILES, Tokenizer
from utils.settings import read_bytes

# How text is cut before merging: contractions, words with one leading sign, single digits, runs of other
# signs, line ends, blanks. Given with the vocabulary: another pattern gives other ids.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The library remembers each step of a run of blanks, and crashes behind a million of them.
_BLANK = r"\t\v\f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
MANY = 100_000
MANY_BLANKS = re.compile(f"(?<![{_BLANK}])[{_BLANK}]{{{MANY},}}+(?![\r\n])")
END, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
EXTRAS = 205  # unused places that fill the published vocabulary up to 151,851


class QwenTokenizer(Tokenizer):
    """A `qwen.tiktoken` file, run by the `tiktoken` library. Texts are brought to Unicode form C first."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: a damaged file, or one that does not fit the model.
        """
        import tiktoken

        source = folder / "qwen.tiktoken"
        settings_files = [folder / name for name in SETTINGS_FILES if (folder / name).is_file()]
        super().__init__([source, *settings_files])
        ranks = _read_ranks(source)
        special = [END, START_OF_TURN, END_OF_TURN, *(f"<|extra_{i}|>" for i in range(EXTRAS))]
        self.special_tokens = {token: place for place, token in enumerate(special, start=len(ranks))}
        self.vocabulary = len(ranks) + len(special)
        self._recognise(self.special_tokens)
        self._ranks = ranks
        self._names = {token_id: token for token, token_id in self.special_tokens.items()}
        self._encoding = tiktoken.Encoding(
            "qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )
        settings = Settings(folder, config)
        for role in ("bos", "eos", "pad"):
            settings.default_token(role, END)
        settings.apply(self, ordinary=len(ranks))
        self.adds_bos = False

    def encode(self, text: str, *, continuation: bool = False, plain: Collection[int] = ()) -> list[int]:
        whole = text if plain else unicodedata.normalize("NFC", text)
        ids: list[int] = []
        for number, part in enumerate(self._cut(whole, plain)):
            if number % 2:
                ids.append(self._written[part])
            else:
                ids += self._pieces(unicodedata.normalize("NFC", part))
        return self._known(ids)

    def _pieces(self, text: str) -> list[int]:
        """The ids of a text without special tokens. Long runs of blanks are cut as the pattern cuts them: the last
        one belongs to what follows.
        """
        ids: list[int] = []
        done = 0
        for blanks in MANY_BLANKS.finditer(text) if len(text) >= MANY else ():
            end = blanks.end() if blanks.end() == len(text) else blanks.end() - 1
            ids += self._encoding.encode_ordinary(text[done : blanks.start()])
            ids += self._encoding._encode_single_piece(text[blanks.start() : end])
            done = end
        return ids + self._encoding.encode_ordinary(text[done:])

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        dropped = self.special_ids if skip_special else frozenset()
        known = [int(i) for i in ids if 0 <= i < self.vocabulary and int(i) not in dropped]
        return self._encoding.decode(known, errors="replace")

    def token_id(self, token: str) -> int | None:
        return self.special_tokens.get(token, self._ranks.get(token.encode()))

    def token(self, token_id: int) -> str | None:
        if not 0 <= token_id < self.vocabulary:
            return None
        return self._names.get(token_id) or self._encoding.decode([token_id], errors="replace")

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of one token; none of an id that is unknown."""
        return self._encoding.decode_single_token_bytes(token_id) if 0 <= token_id < self.vocabulary else b""


def _read_ranks(source: Path) -> dict[bytes, int]:
    """Byte strings and their ids: one per line, base64 and number.

    Raises:
        UserError: a line that is no such pair, or ids with gaps.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(source).splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(
                f"{source} line {number}: expected a token in base64 and its number; the file is damaged, "
                "copy it again from the original model"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{source}: its numbers have gaps; the file is damaged, copy it again")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"{source}: {len(missing)} of the 256 single bytes have no number; the file is damaged")
    return ranks
