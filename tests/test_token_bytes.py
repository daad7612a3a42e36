"""The bytes of tokens: those of a text join to it, wherever tokens cut its characters."""

from __future__ import annotations

from pathlib import Path

import pytest
from family_cases import WITH_TOKENIZER, case
from tiny_tokenizers import write_bpe, write_sentencepiece

from utils.checkpoints.embedded import NAME as EMBEDDED
from utils.checkpoints.locate import locate
from utils.families.token_bytes import token_bytes
from utils.families.tokenizers import Tokenizer, load_tokenizer

TEXTS = ["one two  three", "我喜欢喝茶。", "naïve café", "🙂👩‍👩‍👧 e\u0301", "tab\tand\nline"]


@pytest.fixture(params=[EMBEDDED, "bpe", "sentencepiece", *WITH_TOKENIZER])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == EMBEDDED:
        checkpoint = locate(EMBEDDED)
        return load_tokenizer(checkpoint.folder, checkpoint.config)
    if request.param in ("bpe", "sentencepiece"):
        write = write_bpe if request.param == "bpe" else write_sentencepiece
        return load_tokenizer(tmp_path, write(tmp_path))
    return load_tokenizer(case(request.param).folder, case(request.param).checkpoint.config)


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_all_tokens_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    known = [sign for sign in text if tokenizer.unknown_id not in tokenizer.encode_text(f"a{sign}")]
    ids = tokenizer.encode_text("a" + "".join(known))
    whole = tokenizer.decode(ids, skip_special=False)
    joined = b"".join(token_bytes(tokenizer, token_id) for token_id in ids)
    assert joined.decode().lstrip(" ") == whole


def test_a_special_token_has_the_bytes_of_its_name_and_an_unknown_id_none(tokenizer: Tokenizer) -> None:
    for name, token_id in tokenizer.special_tokens.items():
        assert token_bytes(tokenizer, token_id) in (name.encode(), b"")
    assert token_bytes(tokenizer, 10**7) == b""
