"""One small tokenizer of every kind, each with the special tokens that its users could write in a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_tokenizers import TEXT, train_sentencepiece, write_bpe, write_sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from utils.families.tokenizers import Tokenizer as Loaded
from utils.families.tokenizers import load_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
LETTERS = ["▁", *"abcdefghijklmnopqrstuvwxyz<>/|_1."]


def _gemma(folder: Path) -> dict[str, Any]:
    """A sentencepiece model that knows a special token as a piece of its own, as Gemma's does."""
    model = train_sentencepiece(folder / "tokenizer.model", user_defined_symbols=["<end_of_turn>"])
    place = model.piece_to_id("<end_of_turn>")
    added = {str(place): {"content": "<end_of_turn>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return {"vocab_size": model.vocab_size(), "eos_token_id": place}


def _unigram(folder: Path) -> dict[str, Any]:
    """A tokenizer.json whose model would find special tokens in any text, and puts a blank before it."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), *((letter, -5.0) for letter in LETTERS)]
    library = Tokenizer(models.Unigram(pieces, unk_id=0))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.add_special_tokens(["</s>", "<pad>", AddedToken("<end>", rstrip=True)])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "<pad>"}')
    return {"vocab_size": len(pieces) + 1}


def _legacy(folder: Path) -> dict[str, Any]:
    """A tokenizer.json with the normalizer of LLaMA 2: a blank before every part."""
    library = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate([*LETTERS, "</s>"])}, merges=[]))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    library.add_special_tokens(["</s>", "<end>"])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return {"vocab_size": len(LETTERS) + 2}


def _disguised(folder: Path) -> dict[str, Any]:
    """A tokenizer.json that looks for special tokens behind a normalisation, which makes them of other signs."""
    library = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(LETTERS)}, merges=[]))
    library.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    library.add_special_tokens([AddedToken("</s>", normalized=True), AddedToken("<end>", normalized=True)])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return {"vocab_size": len(LETTERS) + 2}


def _english_glm(folder: Path) -> dict[str, Any]:
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, vocab_size=400, show_progress=False
    )
    library.train_from_iterator(TEXT, trainer)
    library.model.save(str(folder))
    size = library.get_vocab_size() + 8
    names = ("sop_token_id", "eop_token_id", "mask_token_id", "gmask_token_id", "smask_token_id")
    places = {name: size - 8 + place for name, place in zip(names, (0, 1, 3, 6, 7), strict=True)}
    return {"model_type": "glm", "num_layers": 1, "vocab_size": size, **places}


def _fixture(name: str) -> Loaded:
    return load_tokenizer(FIXTURES / name, json.loads((FIXTURES / name / "config.json").read_text()))


FIXED = ("chatglm_tiny", "chatglm2_tiny", "glm_tiny", "qwen_tiny")
WRITTEN = {
    "bpe": write_bpe,
    "pieces": write_sentencepiece,
    "gemma": _gemma,
    "unigram": _unigram,
    "legacy": _legacy,
    "disguised": _disguised,
    "english_glm": _english_glm,
}
KINDS = (*FIXED, *WRITTEN)


def all_kinds(home: Path) -> dict[str, Loaded]:
    """The tokenizers by kind, some of them written into `home`."""
    found = {name: _fixture(name) for name in FIXED}
    for name, write in WRITTEN.items():
        folder = home / name
        folder.mkdir()
        found[name] = load_tokenizer(folder, write(folder))
    return found
