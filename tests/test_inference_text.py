"""Streamed text of every kind of tokenizer: it is the whole text, and neither half characters nor stop words show."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tiny_special import all_kinds

from utils.inference.text import INCOMPLETE, TextStream, whole_text

PROMPTS = 500
STOP_WORDS = 1000
# single letters, Chinese, Korean, Hindi with its signs, joined and flagged emoji, accents of their own, directions
SIGNS = [
    *"ab e.,\n\t",
    *"é中文字「」한국어नमस्ते\u0301\u0308\u200d\u202e",
    "😀",
    "👨\u200d👩\u200d👧",
    "🇩🇪",
    "  ",
    "the ",
    "苹果",
]


class Bytes:
    """As tokenizer.json of LLaMA and Mistral has it: characters beyond the vocabulary are bytes, and beside one that
    is wrong the decoder gives up all."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer, decoders, models, normalizers

        pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abthe中"]
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        self._tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
        self._tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        self._tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        self.vocabulary = len(pieces)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Any) -> str:
        return self._tokenizer.decode(list(ids))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home: Path = tmp_path_factory.mktemp("kinds")
    return {**all_kinds(home), "bytes": Bytes()}


def texts(number: int, seed: int) -> list[str]:
    dice = random.Random(seed)
    return ["".join(dice.choices(SIGNS, k=dice.randint(1, 25))) for _ in range(number)]


def streamed(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.push(token) for token in ids), stream.finish()]


def test_a_stream_is_the_whole_text(kinds: dict[str, Any]) -> None:
    for name, tokenizer in kinds.items():
        for text in texts(PROMPTS, 1):
            ids = tokenizer.encode(text)
            whole = tokenizer.decode(ids)
            pieces = streamed(TextStream(tokenizer.decode), ids)
            assert "".join(pieces).encode() == whole.encode(), (name, text)
            assert INCOMPLETE in whole or not any(INCOMPLETE in piece for piece in pieces), (name, text)
            assert whole_text(tokenizer.decode, ids) == whole, (name, text)


def test_tokens_in_any_order_give_the_same_text_streamed_and_whole(kinds: dict[str, Any]) -> None:
    """Also bytes that make no character, special tokens, and ids that are none."""
    dice = random.Random(2)
    for name, tokenizer in kinds.items():
        for _ in range(PROMPTS):
            ids = [dice.randrange(tokenizer.vocabulary + 2) for _ in range(dice.randint(1, 14))]
            found = "".join(streamed(TextStream(tokenizer.decode), ids))
            assert found == whole_text(tokenizer.decode, ids), (name, ids)
            if name != "bytes":
                assert found == tokenizer.decode(ids), (name, ids)


def test_a_wrong_byte_takes_no_character_away() -> None:
    tokenizer = Bytes()
    ids = [*tokenizer.encode("a😀"), *tokenizer.encode("é")[1:2], *tokenizer.encode("b中")]
    assert "😀" not in tokenizer.decode(ids)  # the decoder's own text of all
    assert whole_text(tokenizer.decode, ids) == "".join(streamed(TextStream(tokenizer.decode), ids))
    assert whole_text(tokenizer.decode, ids).startswith("a😀" + INCOMPLETE)


def before_the_first(text: str, stops: list[str]) -> int:
    """The length of a text before the stop word that is complete first; of several, the longest."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return min(ends)[1] if ends else len(text)


def test_stop_words_never_show_and_what_was_held_back_comes(kinds: dict[str, Any]) -> None:
    """The word lies anywhere among the tokens; at no time has anything of it been told."""
    dice = random.Random(3)
    for name, tokenizer in kinds.items():
        for number, text in enumerate(texts(STOP_WORDS // 5, 4)):
            ids = tokenizer.encode(text)
            whole = whole_text(tokenizer.decode, ids)
            for _ in range(5):
                start = dice.randrange(max(1, len(whole)))
                word = whole[start : start + dice.randint(1, 6)] or "?"
                others = tuple(dice.sample(["ab中", "zzz", whole[:1] + "q", word + "q"], dice.randint(0, 2)))
                stops = [stop for stop in (word, *others) if stop]
                cut = before_the_first(whole, stops)
                stream = TextStream(tokenizer.decode, stops)
                told = ""
                for token in ids:
                    told += stream.push(token)
                    assert whole[:cut].startswith(told), (name, number, stops)
                told += stream.finish()
                assert told == stream.text == whole[:cut], (name, number, stops)
                assert stream.stopped == (cut < len(whole)), (name, number, stops)
