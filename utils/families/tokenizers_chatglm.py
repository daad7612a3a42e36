"""Tokenizers of ChatGLM-6B (`ice_text.model`) and ChatGLM2-6B (`tokenizer.model`): sentencepiece and rules."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError, raise_if
from utils.families.tokenizer_settings import Settings
from utils.families.tokenizers import SETTINGS_FILES, SentencePieceTokenizer, Tokenizer, without_dummy_prefix
from utils.settings import read_bytes

ICE_TEXT = "ice_text.model"
PIECES = "tokenizer.model"
LONGEST_BLANK = 80  # spaces in a row that have one piece
OLD_IMAGE_TOKENS = 20000  # places before the text pieces in the first release, whose files do not say so
# The special tokens of ChatGLM-6B, and which key of config.json knows their ids.
ICE_SPECIAL = {
    "[MASK]": "mask_token_id",
    "[gMASK]": "gmask_token_id",
    "[sMASK]": None,
    "<unused_0>": None,
    "<sop>": "bos_token_id",
    "<eop>": "eos_token_id",
    "<ENC>": None,
    "<dBLOCK>": None,
    "<pad>": None,
}
# The special tokens of ChatGLM2-6B, which follow the last piece in this order.
GLM2_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")


def _files(folder: Path, main: str) -> list[Path]:
    return [folder / name for name in (main, *SETTINGS_FILES) if (folder / name).is_file()]


def _read_model(source: Path) -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=read_bytes(source))
    except RuntimeError as error:
        raise UserError(f"{source}: not a readable sentencepiece model ({error})") from None


class IceTokenizer(Tokenizer):
    """ChatGLM-6B's: sentencepiece ids behind the places of image tokens; line ends, tabs and runs of
    spaces are pieces of their own.

    A text always begins with sentencepiece's blank, an answer behind its prompt too: the published code
    encodes prompt and answer as two texts.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: a damaged file, or one that does not fit the model.
        """
        super().__init__(_files(folder, ICE_TEXT))
        self._model = _read_model(folder / ICE_TEXT)
        settings = Settings(folder, config)
        self._images = self._image_tokens(settings, config)
        size = self._model.vocab_size()
        control = (i for i in range(size) if self._model.is_control(i) or self._model.is_unknown(i))
        self.special_tokens = {self._model.id_to_piece(i): self._images + i for i in control}
        faults = []
        for token, key in ICE_SPECIAL.items():
            place, said = self._place(token), config.get(key) if key else None
            if place is not None and said is not None and place != said:
                faults.append(f"{folder}: {token} has id {place} in {ICE_TEXT}, but config.json says {key} {said}")
            token_id = said if place is None else place
            if token_id is not None:
                self.special_tokens[token] = token_id
            elif token in ("[gMASK]", "<sop>", "<eop>"):
                faults.append(f"{folder / ICE_TEXT}: has no piece {token}, and config.json no {key}")
        raise_if(faults)
        self._names = {token_id: token for token, token_id in self.special_tokens.items()}
        self._recognise(self.special_tokens)
        self.unknown_id = self._images + self._model.unk_id()
        self._special_pieces = frozenset(token_id - self._images for token_id in self.special_tokens.values())
        self._continuation = without_dummy_prefix(self._model)
        self.vocabulary = 1 + max(self._images + size - 1, *self.special_tokens.values())
        for role, token in (("bos", "<sop>"), ("eos", "<eop>"), ("pad", "<pad>"), ("unk", "<unk>")):
            settings.default_token(role, token)
        settings.apply(self, ordinary=self._images + size)
        self.adds_bos = False  # <sop> stands between prompt and answer, where the chat template puts it

    def _image_tokens(self, settings: Settings, config: Mapping[str, Any]) -> int:
        """How many ids come before the first text piece."""
        said = settings.tokenizer.get("num_image_tokens")
        if said is not None:
            return int(said)
        begin, piece = config.get("bos_token_id"), self._model.piece_to_id("<sop>")
        if isinstance(begin, int) and self._model.id_to_piece(piece) == "<sop>":
            return max(begin - piece, 0)
        return OLD_IMAGE_TOKENS

    def _place(self, token: str) -> int | None:
        """The id of a piece of the sentencepiece model."""
        piece = self._model.piece_to_id(token)
        return self._images + piece if self._model.id_to_piece(piece) == token else None

    def encode(self, text: str, *, continuation: bool = False, plain: Collection[int] = ()) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(self._cut(text, plain)):
            if number % 2:
                ids.append(self._written[part])
            elif part:
                ids += [self._images + piece for piece in self._pieces(part)]
        return self._known(ids)

    def _pieces(self, text: str) -> list[int]:
        """The pieces of a text; the model itself knows special tokens as pieces."""
        pieces: list[int] = self._model.encode(with_blanks(text))
        if self._special_pieces.isdisjoint(pieces):
            return pieces
        first, *rest = self._broken(text)
        pieces = self._model.encode(with_blanks(first))
        return pieces + [piece for part in rest for piece in self._continuation.encode(with_blanks(part))]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        size, special = self._model.vocab_size(), self.special_ids
        text, run = "", list[int]()
        for token_id in map(int, ids):
            if token_id in special:
                text += without_blanks(self._model.decode(run))
                run = []
                text += "" if skip_special else self.token(token_id) or ""
            elif 0 <= token_id - self._images < size:
                run.append(token_id - self._images)
        return text + without_blanks(self._model.decode(run))

    def token_id(self, token: str) -> int | None:
        found = self.special_tokens.get(token)
        return self._place(token) if found is None else found

    def token(self, token_id: int) -> str | None:
        if token_id in self._names:
            return self._names[token_id]
        if 0 <= token_id < self._images:
            return f"<image_{token_id}>"
        piece = token_id - self._images
        return self._model.id_to_piece(piece) if 0 <= piece < self._model.vocab_size() else None


def with_blanks(text: str) -> str:
    """Line ends, tabs and runs of spaces as the pieces that stand for them; longest runs first."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    return re.sub(f" {{2,{LONGEST_BLANK}}}", lambda run: f"<|blank_{len(run[0])}|>", text)


def without_blanks(text: str) -> str:
    """The inverse of `with_blanks`."""
    text = text.replace("<n>", "\n").replace("<|tab|>", "\t")

    def spaces(piece: re.Match[str]) -> str:
        count = int(piece[1])
        return " " * count if 2 <= count <= LONGEST_BLANK else piece[0]

    return re.sub(r"<\|blank_(\d+)\|>", spaces, text)


class Glm2Tokenizer(SentencePieceTokenizer):
    """ChatGLM2-6B's: five special tokens behind the pieces.

    `sop` is one of them, and part of many words: in a text it is the token only right behind a mask
    token. `eop` never is. A text always begins with sentencepiece's blank, an answer behind its prompt
    too: the published code encodes prompt and answer as two texts.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: a damaged file, or one that does not fit the model.
        """
        rows = config.get("padded_vocab_size", config.get("vocab_size"))
        settings = Settings(folder, {**config, "vocab_size": rows})
        size = _read_model(folder / PIECES).vocab_size()
        settings.added |= {token: (size + place, True) for place, token in enumerate(GLM2_SPECIAL)}
        super().__init__(_files(folder, PIECES), settings)
        self.adds_bos = False  # what begins a text is the chat template's [gMASK]sop
        anywhere = sorted(self.special_tokens.keys() - {"sop", "eop"}, key=len, reverse=True)
        self._recognise(self.special_tokens, "|".join([*map(re.escape, anywhere), r"(?<=MASK\])sop"]))

    def encode(self, text: str, *, continuation: bool = False, plain: Collection[int] = ()) -> list[int]:
        return super().encode(text, plain=plain)
