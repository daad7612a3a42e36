"""Texts without end of one character, of blanks, of signs: every tokenizer reads them in a time that is no square."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
from family_cases import FIXTURES, WITH_TOKENIZER, case
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import write_bpe, write_sentencepiece

from utils.families import tokenizers_qwen
from utils.families.tokenizers import Tokenizer, load_tokenizer
from utils.families.tokenizers_glm import BEFORE_MASK, MASKS

RUNS = (" ", ".", "7", "好", "a", "\n", " \n", "abc", "!?", "\u0301", "\t ", "’s")


@cache
def of_case(name: str) -> Tokenizer:
    return load_tokenizer(FIXTURES / name, case(name).checkpoint.config)


@pytest.mark.parametrize("name", WITH_TOKENIZER)
def test_a_hundred_thousand_of_one_character(name: str) -> None:
    tokenizer = of_case(name)
    for run in RUNS:
        ids, few = (tokenizer.encode(run * (length // len(run)) + "x") for length in (100_000, 1_000))
        assert len(few) <= len(ids) <= 4 * 100_000
        assert Counter(ids).most_common(1)[0][0] == Counter(few).most_common(1)[0][0]


@pytest.mark.parametrize("write", [write_bpe, write_sentencepiece])
def test_the_same_in_the_shared_formats(write: Callable[[Path], dict[str, object]], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path, write(tmp_path))
    for run in RUNS:
        text = run * (100_000 // len(run)) + "x"
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_million_blanks_before_a_mask_of_glm() -> None:
    """The square of this number of steps would be hours."""
    tokenizer = of_case("glm_tiny")
    blanks = " \n\t" * 333_333
    wanted = tokenizer.encode("我[MASK]你")
    assert tokenizer.encode(f"我{blanks}[MASK]你") == wanted


@pytest.mark.parametrize("name", ["glm_tiny", "qwen_tiny"])
def test_a_hundred_thousand_special_tokens_as_text(name: str) -> None:
    """Of GLM in this order the square of their number would be most of an hour."""
    tokenizer = of_case(name)
    part = f"{tokenizer.eos_token}  [MASK]"
    few, many = (tokenizer.encode_text(part * count) for count in (1_000, 100_000))
    assert many[:1_000] == few[:1_000] and many[-1_000:] == few[-1_000:]
    assert tokenizer.eos_id not in many


@pytest.mark.parametrize("text", ["a{}x", "{}", "a{}\nx", "!\n{}<|im_end|>"])
def test_a_million_blanks_of_qwen(text: str) -> None:
    """The library gives up behind so many, and takes the process with it where no token is special."""
    tokenizer = of_case("qwen_tiny")
    for blanks, encode in ((" " * 1_000_001, tokenizer.encode), ("\u3000" * 1_000_001, tokenizer.encode_text)):
        assert tokenizer.decode(encode(text.format(blanks)), skip_special=False) == text.format(blanks)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.sampled_from(["  ", "\n", "\u3000", "\x1c", "a", "1", ".", "'s", "\r", "<|im_end|>"]), max_size=24).map(
        "".join
    )
)
def test_runs_of_blanks_are_cut_as_the_pattern_of_qwen_cuts_them(text: str) -> None:
    tokenizer = of_case("qwen_tiny")
    wanted = tokenizer.encode(text)
    shorter = re.compile(tokenizers_qwen.MANY_BLANKS.pattern.replace(str(tokenizers_qwen.MANY), "2"))
    with mock.patch.multiple(tokenizers_qwen, MANY_BLANKS=shorter, MANY=0):
        assert tokenizer.encode(text) == wanted


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([" ", "\n", "\u3000", "\x1c", "[", "a", *MASKS]), max_size=24).map("".join))
def test_only_blanks_before_a_mask_are_left_out(text: str) -> None:
    masks = "|".join(map(re.escape, MASKS))
    assert BEFORE_MASK.sub("", text) == re.sub(rf"\s+(?={masks})", "", text)
