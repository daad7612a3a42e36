"""The bytes that a token adds to a text: a token may be a part of a character."""

from __future__ import annotations

import re
from functools import cache

from utils.families.tokenizers import Tokenizer
from utils.families.tokenizers_qwen import QwenTokenizer

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how sentencepiece names a byte
INCOMPLETE = "\ufffd"


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """What a token adds to a text in which others come before it; a special token adds its name.

    An id that the tokenizer does not know has no bytes.
    """
    if isinstance(tokenizer, QwenTokenizer):
        return tokenizer.bytes_of(token_id)
    before = _ordinary(tokenizer)
    known = tokenizer.decode(before, skip_special=False)
    text = tokenizer.decode([*before, token_id], skip_special=False)[len(known) :]
    if INCOMPLETE not in text:
        return text.encode()
    name = tokenizer.token(token_id) or ""
    if found := BYTE.fullmatch(name):
        return bytes([int(found[1], 16)])
    letters = _byte_letters()
    if all(letter in letters for letter in name):
        return bytes(letters[letter] for letter in name)
    return text.encode()  # the sign itself


@cache
def _ordinary(tokenizer: Tokenizer) -> list[int]:
    """A short text, since the blank before the first token of one may be no part of it."""
    return tokenizer.encode_text("a")


@cache
def _byte_letters() -> dict[str, int]:
    """The letters that stand for bytes in byte-level vocabularies: printable Latin ones for themselves, the rest
    from U+0100 on in ascending order.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}
