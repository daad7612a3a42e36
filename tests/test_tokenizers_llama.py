"""The published vocabulary of LLaMA 1 and 2 (32,000 pieces), with the vectors that llama.cpp publishes beside it.

`make install` fetches the files (tools/fetch_vocabularies.py). The ids of the vectors come from the original tokenizer,
BOS left out. What has no vector is judged by the sentencepiece library on the whole text, as LLaMA's own code calls it.
"""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from pathlib import Path
from types import ModuleType

import gguf
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tiny_tokenizers import LLAMA2

from utils.data.template import ChatTemplate, Message
from utils.errors import UserError
from utils.families.tokenizers import Tokenizer, load_tokenizer

CONFIG = {"model_type": "llama", "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": -1}


@pytest.fixture(scope="module")
def fetch(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_vocabularies", root / "tools" / "fetch_vocabularies.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def published(fetch: ModuleType) -> Path:
    """The vocabulary; its vectors are beside it, named .inp and .out."""
    for name, digest in fetch.DIGESTS.items():
        if not fetch.is_intact(fetch.FOLDER / name, digest):
            pytest.fail(
                f"{fetch.FOLDER / name} is missing or damaged; run `make install`, "
                "or `python tools/fetch_vocabularies.py` in an environment made by hand"
            )
    return fetch.FOLDER / fetch.LLAMA


def model_of(vocabulary: Path) -> bytes:
    """The tokenizer.model that LLaMA was published with, as far as it bears on ids, from a GGUF vocabulary."""
    fields = gguf.GGUFReader(vocabulary).fields
    pieces, scores, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type"))
    model = sentencepiece_model_pb2.ModelProto()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        model.pieces.add(piece=piece, score=score, type=kind)  # GGUF numbers the types as sentencepiece does
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, True, len(pieces)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer.name, normalizer.add_dummy_prefix = "identity", True
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    return model.SerializeToString()


@pytest.fixture(scope="module")
def folder(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    (folder / "tokenizer.model").write_bytes(model_of(published))
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "chat_template": LLAMA2}))
    return folder


@pytest.fixture(scope="module")
def llama(folder: Path) -> Tokenizer:
    return load_tokenizer(folder, CONFIG)


@pytest.fixture(scope="module")
def library(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def vectors(published: Path) -> list[tuple[str, list[int]]]:
    """Each text with its ids."""
    texts = published.with_name(f"{published.name}.inp").read_bytes().decode()  # bytes: line ends stay as they are
    lines = published.with_name(f"{published.name}.out").read_text("utf-8").splitlines()
    *separated, after = texts.split("\n__ggml_vocab_test__\n")
    assert after == ""
    return [(text, [int(i) for i in line.split()]) for text, line in zip(separated, lines, strict=True)]


def test_every_published_vector(llama: Tokenizer, vectors: list[tuple[str, list[int]]]) -> None:
    assert len(vectors) == 46
    assert {text: llama.encode(text) for text, _ in vectors} == dict(vectors)


def test_the_texts_of_the_vectors_come_back(llama: Tokenizer, vectors: list[tuple[str, list[int]]]) -> None:
    assert {text: llama.decode(ids) for text, ids in vectors} == {text: text for text, _ in vectors}
    assert {text: llama.decode([1, *ids, 2]) for text, ids in vectors} == {text: text for text, _ in vectors}


def test_special_ids_and_every_piece(llama: Tokenizer, library: sentencepiece.SentencePieceProcessor) -> None:
    assert (llama.vocabulary, llama.bos_id, llama.eos_ids, llama.adds_bos) == (32000, 1, (2,), True)
    assert (llama.bos_token, llama.eos_token, llama.special_tokens) == (
        "<s>",
        "</s>",
        {"<unk>": 0, "<s>": 1, "</s>": 2},
    )
    pieces = [llama.token(i) for i in range(32000)]
    assert pieces == [library.id_to_piece(i) for i in range(32000)]
    assert [llama.token_id(piece or "") for piece in pieces] == list(range(32000))


def test_a_plain_prompt_begins_with_one_bos(llama: Tokenizer) -> None:
    prompt = ChatTemplate.load(None, default=None).encode_prompt(llama, [{"role": "user", "content": "Hello world"}])
    assert prompt == [1, 15043, 3186]


def test_a_continuation_joins_as_if_written_at_once(
    llama: Tokenizer, library: sentencepiece.SentencePieceProcessor, vectors: list[tuple[str, list[int]]]
) -> None:
    """Texts that begin with one blank make no piece across the end of a sentence."""
    texts = [text for text, _ in vectors if text.startswith(" ") and text.strip() and text[1] != " "]
    assert len(texts) >= 5
    for text in texts:
        assert llama.encode("Yes.") + llama.encode(text, continuation=True) == library.encode(f"Yes.{text}"), text


def test_a_chat_has_the_ids_of_llama_2(
    llama: Tokenizer, folder: Path, library: sentencepiece.SentencePieceProcessor
) -> None:
    """LLaMA 2 encodes each round at once, "[INST] question [/INST] answer ", between BOS and EOS."""
    template = ChatTemplate.load(folder, default=None)
    rounds = [("Hello", "Hi there!"), ("Wie geht's? 你好 🦙", "  Gut.\n")]
    messages: list[Message] = []
    expected: list[int] = []
    for question, answer in rounds:
        messages.append({"role": "user", "content": question})
        asked = [*expected, 1, *library.encode(f"[INST] {question} [/INST]")]
        assert template.encode_prompt(llama, messages) == asked
        messages.append({"role": "assistant", "content": answer})
        expected += [1, *library.encode(f"[INST] {question} [/INST] {answer} "), 2]
    assert template.encode_conversation(llama, messages)[0] == expected
    assert expected[:9] == [1, 518, 25580, 29962, 15043, 518, 29914, 25580, 29962]


@settings(deadline=None, max_examples=100)
@given(text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00▁<"), max_size=60))
def test_any_text_comes_back(llama: Tokenizer, library: sentencepiece.SentencePieceProcessor, text: str) -> None:
    ids = llama.encode(text)
    assert ids == library.encode(text)
    assert llama.decode(ids) == text


def archive_with(path: Path, content: bytes) -> Path:
    name = "llama_cpp_python-0.3.16/vendor/llama.cpp/models/vocabulary"
    with tarfile.open(path, "w:gz") as opened:
        for place in (name, name.replace("models", "elsewhere")):
            member = tarfile.TarInfo(place)
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
            content = b"not this one"
    return path


def test_only_the_expected_files_are_kept(fetch: ModuleType, tmp_path: Path) -> None:
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    archive, folder = archive_with(tmp_path / "a.tar.gz", b"abc"), tmp_path / "kept"
    with pytest.raises(UserError, match=r"models/vocabulary is another file than expected\n.*models/more is missing"):
        fetch.extract(archive, folder, {"vocabulary": "0" * 64, "more": empty})
    assert not folder.exists()
    fetch.extract(archive, folder, {"vocabulary": of_abc})
    assert [(file.name, file.read_bytes()) for file in folder.iterdir()] == [("vocabulary", b"abc")]
    assert fetch.is_intact(folder / "vocabulary", of_abc) and not fetch.is_intact(folder / "vocabulary", empty)


def test_what_is_there_is_not_fetched_again(
    fetch: ModuleType, published: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetch, "download", lambda folder: pytest.fail("downloads again"))
    fetch.main()
    assert str(published.parent) in capsys.readouterr().out
