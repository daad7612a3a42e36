"""Tokenizers: ids, special tokens, vocabulary checks, and folders that go through save and load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import write_bpe, write_sentencepiece

from utils.errors import UserError
from utils.families.tokenizers import Tokenizer, load_tokenizer

SETTINGS = settings(deadline=None, max_examples=60)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bpe")
    return load_tokenizer(folder, write_bpe(folder))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("pieces")
    return load_tokenizer(folder, write_sentencepiece(folder))


@pytest.mark.parametrize("kind", ["bpe", "pieces"])
@SETTINGS
@given(text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00▁"), max_size=40))
def test_text_survives_encoding(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocabulary for i in ids)


def test_special_tokens_in_a_text_are_recognised_and_nothing_is_added(bpe: Tokenizer) -> None:
    ids = bpe.encode("<|im_start|>user\none<|im_end|>")
    assert ids[0] == bpe.token_id("<|im_start|>") == bpe.bos_id
    assert ids[-1] == bpe.token_id("<|im_end|>") == bpe.eos_id
    assert ids.count(bpe.eos_id) == 1
    assert bpe.encode("one") == ids[ids.index(bpe.encode("\n")[0]) + 1 : -1]
    assert bpe.decode(ids) == "user\none"
    assert bpe.decode(ids, skip_special=False) == "<|im_start|>user\none<|im_end|>"


def test_sentencepiece_gives_the_ids_of_the_library(pieces: Tokenizer) -> None:
    model = sentencepiece.SentencePieceProcessor(model_proto=pieces.files[0].read_bytes())
    text = "What is the capital of France? 你好"
    assert pieces.encode(text) == model.encode(text)
    assert pieces.encode(f"<s>{text}</s>") == [1, *model.encode(text), 2]
    assert (pieces.bos_id, pieces.eos_id, pieces.adds_bos) == (1, 2, True)
    assert pieces.pad_id == model.unk_id()  # config says -1, which is no id
    assert pieces.decode([1, *model.encode(text), 2], skip_special=False) == f"<s>{text}</s>"


def test_a_continuation_has_no_blank_of_its_own(pieces: Tokenizer) -> None:
    whole = pieces.encode("one two")
    assert pieces.encode("one") + pieces.encode(" two", continuation=True) == whole
    assert pieces.encode("one") + pieces.encode(" two") != whole


def test_a_continuation_in_tokenizer_json_has_no_blank_of_its_own(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers

    letters = "▁abc"
    model = models.BPE(vocab={letter: i for i, letter in enumerate([*letters, "</s>"])}, merges=[])
    library = Library(model)
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = load_tokenizer(tmp_path, {"vocab_size": 5})
    assert tokenizer.encode("ab c") == [0, 1, 2, 0, 3]
    assert tokenizer.encode(" c", continuation=True) == [0, 3]
    assert tokenizer.decode([0, 1, 2, 0, 3]) == "ab c"


def written(tokenizer: Tokenizer, text: str, *, continuation: bool = False) -> str:
    """The pieces of a text, one behind the other."""
    return "".join(str(tokenizer.token(i)) for i in tokenizer.encode(text, continuation=continuation))


@pytest.mark.parametrize(
    ("settings", "parts", "whole"),
    [
        ({}, "▁the</s>▁river", "▁the"),  # as the field's library without the key: as with "legacy": true
        ({"legacy": True}, "▁the</s>▁river", "▁the"),
        ({"legacy": True, "add_prefix_space": False}, "▁the</s>▁river", "▁the"),
        ({"legacy": False}, "▁the</s>river", "▁the"),
        ({"legacy": "false"}, "▁the</s>river", "▁the"),
        ({"legacy": False, "add_prefix_space": False}, "the</s>river", "the"),
    ],
)
def test_the_blank_of_sentencepiece_behind_a_special_token(
    settings: dict[str, object], parts: str, whole: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tmp_path, write_sentencepiece(tmp_path, **settings))
    assert written(tokenizer, "the</s>river") == parts
    assert written(tokenizer, "the") == whole
    assert written(tokenizer, "<s>the</s>river") == "<s>" + (
        "the</s>river" if settings.get("legacy") in (False, "false") else parts
    )
    assert written(tokenizer, "the</s>river", continuation=True) == parts.removeprefix("▁")
    assert written(tokenizer, "the</s> river").endswith("</s>▁river" if "</s>r" in parts else "</s>▁▁river")


def test_a_tokenizer_json_says_itself_where_blanks_stand(tmp_path: Path) -> None:
    """ "first" is what "legacy": false becomes there, "always" the default."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    for scheme, expected in (("first", [0, 1, 5, 2]), ("always", [0, 1, 5, 0, 2]), ("never", [1, 5, 2])):
        library = Library(models.BPE(vocab={letter: i for i, letter in enumerate("▁abcd")}, merges=[]))
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        library.add_special_tokens(["</s>"])
        library.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "legacy": false}')
        assert load_tokenizer(tmp_path, {"vocab_size": 6}).encode("a</s>b") == expected


def test_every_named_end_token_ends_generation(tmp_path: Path) -> None:
    config = write_bpe(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert load_tokenizer(tmp_path, config).eos_ids == (2, 0)


def test_tokens_that_only_the_settings_name(tmp_path: Path) -> None:
    config = write_sentencepiece(
        tmp_path,
        pad_token="<pad>",
        added_tokens_decoder={
            "400": {"content": "<pad>", "special": True},
            "401": {"content": "<go>", "special": False},
        },
    )
    config["vocab_size"] = 402
    tokenizer = load_tokenizer(tmp_path, config)
    assert (tokenizer.pad_id, tokenizer.vocabulary) == (400, 402)
    ids = tokenizer.encode("one<pad><go>")
    assert ids[-2:] == [400, 401]
    assert tokenizer.decode(ids) == "one<go>"


def added_beyond(folder: Path, kind: str) -> dict[str, Any]:
    """A tokenizer as CodeLlama's and WizardLM's: its last tokens were added and have no row in the model."""
    config = {"bpe": write_bpe, "pieces": write_sentencepiece}[kind](folder)
    rows = config["vocab_size"]
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": rows, "<more>": rows + 1}))
    said = json.loads((folder / "tokenizer_config.json").read_text()) if kind == "bpe" else {}
    (folder / "tokenizer_config.json").write_text(json.dumps({**said, "pad_token": "<pad>"}))
    return config


@pytest.mark.parametrize("kind", ["bpe", "pieces"])
def test_added_tokens_beyond_the_model_are_accepted_until_a_text_holds_one(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = added_beyond(tmp_path, kind)
    rows = config["vocab_size"]
    tokenizer = load_tokenizer(tmp_path, config)
    assert load_tokenizer(tmp_path, config).vocabulary == tokenizer.vocabulary == rows + 2
    assert capsys.readouterr().err == (
        f"note: {tmp_path}: 2 added tokens, the last one <more>, have ids beyond the model's vocab_size of {rows}; "
        "a text that holds such a token is refused\n"
    )
    assert 0 <= tokenizer.pad_id < rows and max(tokenizer.eos_ids) < rows
    assert max(tokenizer.encode("one two")) < rows
    for continuation in (False, True):
        with pytest.raises(UserError, match=f"token <pad>, whose id {rows} is beyond the model's vocab_size of {rows}"):
            tokenizer.encode("one<pad>two", continuation=continuation)
    assert max(tokenizer.encode_text("one<pad>two")) < rows  # there it is text
    assert load_tokenizer(tmp_path, {**config, "vocab_size": rows + 2}).encode("<pad>") == [rows]


@pytest.mark.parametrize("role", ["bos", "eos"])
def test_what_begins_or_ends_texts_must_be_known_to_the_model(role: str, tmp_path: Path) -> None:
    config = added_beyond(tmp_path, "pieces")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({f"{role}_token": "<pad>"}))
    with pytest.raises(UserError, match=f"{role}_token <pad> has the id {config['vocab_size']}"):
        load_tokenizer(tmp_path, config)


def test_ids_beyond_the_tokenizer_decode_to_nothing(bpe: Tokenizer, pieces: Tokenizer) -> None:
    for tokenizer in (bpe, pieces):
        assert tokenizer.decode([*tokenizer.encode("one"), tokenizer.vocabulary + 7]) == "one"


def test_saved_folder_loads_as_the_same_tokenizer(bpe: Tokenizer, pieces: Tokenizer, tmp_path: Path) -> None:
    for number, tokenizer in enumerate((bpe, pieces)):
        folder = tmp_path / str(number)
        tokenizer.save(folder)
        tokenizer.save(folder)  # into a folder that has it already
        again = load_tokenizer(folder, {"vocab_size": tokenizer.vocabulary, "eos_token_id": 2})
        assert again.fingerprint() == tokenizer.fingerprint()
        assert again.encode("one two 你好") == tokenizer.encode("one two 你好")
    assert bpe.fingerprint() != pieces.fingerprint()


def test_paddlenlp_file_name(tmp_path: Path) -> None:
    config = write_sentencepiece(tmp_path, "sentencepiece.bpe.model")
    assert load_tokenizer(tmp_path, config).bos_id == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("no files", "no tokenizer found"),
        ("small model", "vocab_size in config.json is 10"),
        ("no end", "no end-of-text token"),
        ("broken", "not a readable tokenizer.json"),
        ("broken settings", "not valid JSON"),
    ],
)
def test_a_folder_that_does_not_fit_is_a_user_error(change: str, said: str, tmp_path: Path) -> None:
    config = write_bpe(tmp_path)
    if change == "no files":
        (tmp_path / "tokenizer.json").unlink()
    elif change == "small model":
        config["vocab_size"] = 10
    elif change == "no end":
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))
        config = {"vocab_size": config["vocab_size"]}
    elif change == "broken":
        (tmp_path / "tokenizer.json").write_text("{")
    else:
        (tmp_path / "tokenizer_config.json").write_text("{,")
    with pytest.raises(UserError, match=said) as caught:
        load_tokenizer(tmp_path, config)
    assert str(tmp_path) in str(caught.value)


def with_unused_ids(folder: Path, kind: str, token_id: int) -> dict[str, Any]:
    config = write_bpe(folder)
    file = folder / "tokenizer.json"
    model = json.loads(file.read_text("utf-8"))
    model["model"]["vocab"]["zzz"] = token_id
    file.write_text(json.dumps(model), "utf-8")
    if kind == "gpt2":
        vocabulary, merges = model["model"]["vocab"], model["model"]["merges"]
        (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
        (folder / "merges.txt").write_text("".join(f"{' '.join(pair)}\n" for pair in merges), "utf-8")
        file.unlink()
    return {**config, "model_type": kind, "vocab_size": 400}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_unused_ids_are_no_news(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(tmp_path, with_unused_ids(tmp_path, kind, 390))
    text = "a river<|im_end|>"
    assert tokenizer.encode(text)[-1] == tokenizer.eos_id != tokenizer.encode_text(text)[-1]
    assert tokenizer.decode(tokenizer.encode_text(text)) == text
    assert (tokenizer.vocabulary, tokenizer.token(390), tokenizer.token(389)) == (391, "zzz", None)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(("kind", "file"), [("llama", "tokenizer.json"), ("gpt2", "vocab.json")])
def test_an_id_beyond_all_bounds_is_named(kind: str, file: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path, with_unused_ids(tmp_path, kind, 20_000))
    assert str(caught.value).startswith(f"{tmp_path / file}: the token 'zzz' has the id 20000, but there are ")


def with_added(folder: Path, *tokens: dict[str, Any], normalizer: dict[str, Any] | None = None) -> Tokenizer:
    config = write_bpe(folder)
    file = folder / "tokenizer.json"
    model = json.loads(file.read_text("utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    model["normalizer"] = normalizer
    model["added_tokens"] += [{"id": 320 + number, **flags, **token} for number, token in enumerate(tokens)]
    file.write_text(json.dumps(model), "utf-8")
    return load_tokenizer(folder, {**config, "vocab_size": 400})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a sword and ", 0),
        ("a word and ", 1),
        ("word", 1),
        ("word_", 0),
        ("swordword word", 1),
        ("wordé", 0),
    ],
)
def test_tokens_that_are_whole_words(text: str, expected: int, tmp_path: Path) -> None:
    """Beside a token that is mere text they are what the library makes of them."""
    tokenizer = with_added(tmp_path, {"content": "word", "single_word": True, "special": True})
    ids = tokenizer.encode(f"{text}<|im_end|>", plain={len(text)})
    assert ids[: -len(tokenizer.encode_text("<|im_end|>"))] == tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == f"{text}<|im_end|>"
    assert ids.count(320) == expected == len(tokenizer.special_spans(text))


def test_tokens_of_normalised_text_are_sought_behind_the_others(tmp_path: Path) -> None:
    late = {"content": "<|a|", "normalized": True, "special": True}
    tokenizer = with_added(tmp_path, late, {"content": "|>"})
    text = "<|a| <|a|> <|im_end|>"
    ids = tokenizer.encode(text, plain={11})
    assert tokenizer.special_spans(text) == [(0, 4), (11, 21)]
    assert ids[:1] == [320] and ids.count(320) == 1
    assert tokenizer.decode(ids, skip_special=False) == text


def test_an_accent_that_joins_a_token_of_normalised_text(tmp_path: Path) -> None:
    late = {"content": "<|a|>", "normalized": True, "special": True}
    tokenizer = with_added(tmp_path, late, normalizer={"type": "NFKC"})
    ids = tokenizer.encode("<|a|>one<|a|>\u0338 two")
    assert ids.count(320) == 1 and ids[0] == 320
    assert tokenizer.decode(ids, skip_special=False) == "<|a|>one<|a|\u226f two"
