"""The files beside a tokenizer as people and other tools write them: empty names, wrong types, unreadable files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from family_cases import FIXTURES, case
from tiny_tokenizers import write_bpe, write_sentencepiece

from utils.errors import UserError
from utils.families.tokenizers import Tokenizer, load_tokenizer

WRITERS = {"bpe": write_bpe, "pieces": write_sentencepiece}


def write(folder: Path, kind: str, **settings: Any) -> dict[str, Any]:
    """A tokenizer of a kind with exactly these settings; returns a config.json that names BOS 1 and EOS 2."""
    config = {**WRITERS[kind](folder), "bos_token_id": 1}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return config


def faults(folder: Path, config: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder, config)
    return caught.value.faults


def roles(tokenizer: Tokenizer) -> tuple[object, ...]:
    return tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids, tokenizer.bos_token, tokenizer.eos_token


@pytest.mark.parametrize("empty", ["", {"content": ""}, {"content": "", "lstrip": False, "special": True}])
@pytest.mark.parametrize("kind", WRITERS)
def test_an_empty_name_is_no_name(kind: str, empty: object, tmp_path: Path) -> None:
    names = {f"{role}_token": empty for role in ("bos", "eos", "pad", "unk")}
    plain = load_tokenizer(tmp_path / "a", write(tmp_path / "a", kind))
    config = write(tmp_path / "b", kind, **names, added_tokens_decoder={"1": empty})
    found = load_tokenizer(tmp_path / "b", config)
    assert roles(found) == roles(plain) and found.eos_id == 2 and found.bos_id == 1
    assert (found.pad_id, found.special_tokens) == (plain.pad_id, plain.special_tokens)
    assert "" not in found.special_tokens
    assert found.encode("one two") == plain.encode("one two")
    assert found.adds_bos == plain.adds_bos
    # what another file names is still there
    (tmp_path / "b" / "special_tokens_map.json").write_text(json.dumps({"eos_token": plain.bos_token}), "utf-8")
    assert load_tokenizer(tmp_path / "b", config).eos_id == 1


@pytest.mark.parametrize("name", ["glm_tiny", "chatglm_tiny", "chatglm2_tiny", "qwen_tiny", "gpt2_tiny"])
def test_an_empty_name_in_the_formats_of_families(name: str, tmp_path: Path) -> None:
    checkpoint = case(name).checkpoint
    plain = load_tokenizer(checkpoint.folder, checkpoint.config)
    shutil.copytree(FIXTURES / name, tmp_path / "m")
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "")
    (tmp_path / "m" / "special_tokens_map.json").write_text(json.dumps(names), "utf-8")
    found = load_tokenizer(tmp_path / "m", checkpoint.config)
    assert roles(found) == roles(plain) and found.pad_id == plain.pad_id


def test_null_is_none(tmp_path: Path) -> None:
    found = load_tokenizer(tmp_path, write(tmp_path, "pieces", bos_token=None))
    assert (found.bos_id, found.bos_token, found.adds_bos) == (None, None, False)


def test_values_of_another_kind_are_named_all_at_once(tmp_path: Path) -> None:
    config = write(
        tmp_path,
        "pieces",
        bos_token=5,
        eos_token={"content": 7},
        unk_token={"text": "<unk>"},
        pad_token="<pad>\ud83d",
        add_bos_token="no",
        added_tokens_decoder={"x": {"content": "<a>"}, "400": 3},
    )
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": true}', "utf-8")
    (tmp_path / "added_tokens.json").write_text('{"<b>": "many"}', "utf-8")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["end"]}', "utf-8")
    token = "expected a token as text, an object with its content, or null"
    assert sorted(faults(tmp_path, config)) == [
        f'{tmp_path / "added_tokens.json"}: <b> is "<b>", "many"; expected a token and its id',
        f"{tmp_path / 'generation_config.json'}: eos_token_id is a list of 1; "
        "expected the id of a token, a list of ids or null",
        f"{tmp_path / 'special_tokens_map.json'}: eos_token is true; {token}",
        f'{tmp_path / "tokenizer_config.json"}: add_bos_token is "no"; expected true or false',
        f'{tmp_path / "tokenizer_config.json"}: added_tokens_decoder.400 is 3, "400"; expected a token and its id',
        f'{tmp_path / "tokenizer_config.json"}: added_tokens_decoder.x is an object of 1, "x"; '
        "expected a token and its id",
        f"{tmp_path / 'tokenizer_config.json'}: bos_token is 5; {token}",
        f"{tmp_path / 'tokenizer_config.json'}: eos_token is an object of 1; {token}",
        f'{tmp_path / "tokenizer_config.json"}: pad_token is "<pad>\ud83d"; {token}',
        f"{tmp_path / 'tokenizer_config.json'}: unk_token is an object of 1; {token}",
    ]


def test_flags_and_ids_as_text(tmp_path: Path) -> None:
    decoder = {"400": {"content": "<go>", "special": "false"}}
    config = {**write(tmp_path, "pieces", add_bos_token="false", added_tokens_decoder=decoder), "vocab_size": 401}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["2", "400.0"]}', "utf-8")
    found = load_tokenizer(tmp_path, config)
    assert not found.adds_bos and found.eos_ids == (2, 400)
    assert "<go>" not in found.special_tokens and found.encode("<go>") == [400]


def test_byte_order_marks_before_every_file(tmp_path: Path) -> None:
    for kind, writer in WRITERS.items():
        plain, config = tmp_path / kind, writer(tmp_path / kind)
        expected = roles(load_tokenizer(plain, config))
        for file in plain.glob("*.json"):
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        assert roles(load_tokenizer(plain, config)) == expected
    shutil.copytree(FIXTURES / "gpt2_tiny", tmp_path / "gpt2")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "gpt2" / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / "gpt2" / name).read_bytes())
    config = case("gpt2_tiny").checkpoint.config
    plain_ids = load_tokenizer(FIXTURES / "gpt2_tiny", config).encode("one two")
    assert load_tokenizer(tmp_path / "gpt2", config).encode("one two") == plain_ids


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("gpt2_tiny", ("vocab.json", "merges.txt", "special_tokens_map.json")),
        ("glm_tiny", ("cog-pretrain.model",)),
        ("chatglm_tiny", ("ice_text.model",)),
        ("chatglm2_tiny", ("tokenizer.model",)),
        ("qwen_tiny", ("qwen.tiktoken",)),
        ("llama_tiny", ("tokenizer.json", "tokenizer_config.json", "generation_config.json")),
    ],
)
def test_unreadable_and_damaged_files_are_named(name: str, files: tuple[str, ...], tmp_path: Path) -> None:
    config = case(name).checkpoint.config
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(FIXTURES / name, folder)
        for content in (None, b"\xff\xfe\x00", b"[" * 100_000):
            (folder / file).unlink(missing_ok=True)
            if content is None:
                (folder / file).symlink_to("/proc/self/mem")  # is there, and gives an error even to root
            else:
                (folder / file).write_bytes(content)
            found = faults(folder, config)
            assert all(str(folder / file) in fault for fault in found), (content, found)
