"""Tokenizers of checkpoints: text to ids and back, and which ids are special.

Two file formats are read: `tokenizer.json` (the `tokenizers` library) and a sentencepiece model
(`tokenizer.model`, or `sentencepiece.bpe.model` in folders written by PaddleNLP). The settings in
tokenizer_config.json, special_tokens_map.json, added_tokens.json and generation_config.json are honoured.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.families.tokenizer_settings import Settings
from utils.families.tokenizers_plain import PlainTwin, rewrites
from utils.settings import read_bytes, read_text

TOKENIZER_JSON = "tokenizer.json"
TAG = re.compile(r"<.+>|\[.+\]")
WORD = re.compile(r"\w")
THOUGHTS = frozenset({"<think>", "</think>"})
SENTENCEPIECE_FILES = ("tokenizer.model", "sentencepiece.bpe.model")
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
VOCABULARY_FILES = ("vocab.json", "merges.txt")


def _any_of(tokens: Iterable[str]) -> str:
    """A pattern of the tokens, the longest that fits."""
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))


class Tokenizer(ABC):
    """What the rest of the project knows of a tokenizer.

    Attributes:
        vocabulary: one more than the highest id, added tokens included.
        bos_token, bos_id: the token that begins a text, or None.
        eos_token, eos_id: the token that ends a text.
        eos_ids: every id that ends generation (a checkpoint may name several).
        pad_id: the id that fills unused places; always a valid id. It may equal `eos_id`, so nobody
            may recognise padding by it.
        rows: number of ids that the model knows, where added tokens have higher ones; else None.
        adds_bos: whether the tokenizer's own convention begins a text with `bos_id`.
        special_tokens: the special tokens, text to id.
        unknown_id: the id that stands for what the vocabulary lacks, if there is one.
        text_tokens: those that stand in texts on purpose, so that they never count as mere text.
    """

    text_tokens = THOUGHTS
    unknown_id: int | None = None
    vocabulary: int
    rows: int | None = None
    bos_token: str | None
    bos_id: int | None
    eos_token: str
    eos_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    adds_bos: bool
    special_tokens: dict[str, int]

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self._fingerprint: str | None = None
        self._written: dict[str, int] = {}
        self._split: re.Pattern[str] | None = None

    @abstractmethod
    def encode(self, text: str, *, continuation: bool = False, plain: Collection[int] = ()) -> list[int]:
        """The ids of `text`. Special tokens written in it are recognised; nothing is added.

        Args:
            text: any text.
            continuation: the text continues one that is already encoded: the blank that sentencepiece
                tokenizers put before a text is left out.
            plain: where tokens are written (the beginnings of `special_spans`) that are mere text.
        """

    def encode_text(self, text: str, *, continuation: bool = False) -> list[int]:
        """The ids of a text in which special tokens are mere text; see `encode`."""
        return self.encode(text, continuation=continuation, plain={start for start, _ in self.special_spans(text)})

    def special_spans(self, text: str, also: Collection[str] = ()) -> list[tuple[int, int]]:
        """Beginning and end of every special token written in `text`, and of `also`, but for `text_tokens`."""
        found = self._matches(text)
        return [match.span() for match in found if match[0] in self.written_special or match[0] in also]

    def tags_in(self, text: str) -> frozenset[str]:
        """The tokens in angle or square brackets that `encode` recognises in a text, special or not."""
        found = (match[0] for match in self._matches(text))
        return frozenset(token for token in found if TAG.fullmatch(token)) - self.text_tokens

    @cached_property
    def written_special(self) -> dict[str, int]:
        """The special tokens that `encode` recognises in a text, but for `text_tokens`; text to id."""
        special = self.special_ids
        return {
            token: token_id
            for token, token_id in self._written.items()
            if token_id in special and token not in self.text_tokens
        }

    def _recognise(self, tokens: Mapping[str, int], pattern: str | None = None) -> None:
        """Sets what `encode` recognises in a text; by `pattern` if not all of the tokens everywhere, longest first."""
        self._written = {token: token_id for token, token_id in tokens.items() if token}
        if self._written:
            self._split = re.compile(pattern or _any_of(self._written))

    def _matches(self, text: str) -> Iterable[re.Match[str]]:
        """Where tokens are recognised in a text, in order."""
        return self._split.finditer(text) if self._split else ()

    def _cut(self, text: str, plain: Collection[int]) -> list[str]:
        """Text and recognised tokens in turn, text first and last; what begins at a place in `plain` is text."""
        parts, done = [], 0
        for match in self._matches(text):
            if match.start() not in plain:
                parts += [text[done : match.start()], match[0]]
                done = match.end()
        return [*parts, text[done:]]

    def _broken(self, text: str) -> list[str]:
        """The parts of a text, cut behind the first character of each token written in it."""
        places = [0, *(match.start() + 1 for match in self._matches(text)), len(text)]
        return [text[first:last] for first, last in pairwise(places)]

    def _known(self, ids: list[int]) -> list[int]:
        """The ids of a text, all of which the model knows.

        Raises:
            UserError: an added token beyond the model's vocabulary.
        """
        if self.rows is not None and ids and (highest := max(ids)) >= self.rows:
            raise UserError(
                f"the text holds the token {self.token(highest)}, whose id {highest} is beyond the model's vocab_size "
                f"of {self.rows}; leave it out of the text or the chat template"
            )
        return ids

    @abstractmethod
    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; ids that the tokenizer does not know (padded vocabularies) give nothing."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of one token (not a text), or None."""

    @abstractmethod
    def token(self, token_id: int) -> str | None:
        """The token of one id, or None."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens and of everything that ends generation."""
        return frozenset(self.special_tokens.values()) | set(self.eos_ids)

    def fingerprint(self) -> str:
        """sha256 (hexadecimal) over names and contents of the tokenizer's files."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for file in self.files:
                content = read_bytes(file)
                digest.update(f"{file.name}\0{len(content)}\0".encode())
                digest.update(content)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def save(self, folder: Path) -> None:
        """Copies the tokenizer's files into `folder`, byte for byte."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.files:
            target = folder / file.name
            if not (target.exists() and target.samefile(file)):
                shutil.copyfile(file, target)


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, run by the `tokenizers` library."""

    def __init__(self, files: Sequence[Path], settings: Settings) -> None:
        import tokenizers

        super().__init__(files)
        self._text = self._description(settings)
        self._tokenizer = tokenizers.Tokenizer.from_str(self._text)
        ids = self._tokenizer.get_vocab(with_added_tokens=False)
        self._check_ids(ids, settings)
        self._registered: list[dict[str, Any]] = []
        self._add(settings)
        description = self._described()
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._recognise({token.content: token_id for token_id, token in added.items()})
        self._words = frozenset(token.content for token in added.values() if token.single_word)
        self._late = {token.content for token in added.values() if token.content and token.normalized}
        kinds = (self._written.keys() - self._late, self._late)
        self._rounds = [re.compile(_any_of(kind)) for kind in kinds if kind]
        # Text of another look can become a special token where these are looked for behind the normalisation.
        normalized = any(token.normalized for token in added.values())
        self._in_disguise = normalized and rewrites(description.get("normalizer"))
        model = description["model"]
        unknown = model.get("unk_token")
        self.unknown_id = model.get("unk_id") if unknown is None else self._tokenizer.token_to_id(unknown)
        self._twins: dict[tuple[bool, frozenset[str]], PlainTwin] = {}
        self._continuation = self._tokenizer
        if _drop_leading_blank(description):
            self._continuation = tokenizers.Tokenizer.from_str(json.dumps(description))
            self._continuation.no_truncation()
            self._continuation.no_padding()
        self.vocabulary = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.special_tokens = {token.content: token_id for token_id, token in added.items() if token.special}
        settings.apply(self, ordinary=1 + max(ids.values(), default=-1))
        encoded = self._tokenizer.encode("a", add_special_tokens=True).ids
        follows = self.bos_id is not None and encoded[:1] == [self.bos_id]
        self.adds_bos = settings.flag("add_bos_token", default=follows) and self.bos_id is not None

    def _description(self, settings: Settings) -> str:
        """The text of a valid tokenizer.json.

        Raises:
            UserError: it is not valid.
        """
        import tokenizers

        source = next(file for file in self.files if file.name == TOKENIZER_JSON)
        text = read_text(source)
        try:
            tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises a bare Exception
            raise UserError(f"{source}: not a readable tokenizer.json ({error})") from None
        return text

    def _matches(self, text: str) -> Iterable[re.Match[str]]:
        """As the library: those of the text as it is, then those of what is normalised, between the others."""
        found: list[re.Match[str]] = []
        for pattern in self._rounds:
            edges = [0, *(edge for match in found for edge in match.span()), len(text)]
            between = [pattern.finditer(text, first, last) for first, last in zip(edges[::2], edges[1::2], strict=True)]
            new = (match for matches in between for match in matches if self._stands_alone(match))
            found = sorted([*found, *new], key=re.Match.start)
        return found

    def _stands_alone(self, match: re.Match[str]) -> bool:
        """Whether no letter or digit is beside a token that is recognised as a whole word only, and no accent that
        the normalisation joins with its last sign is behind one that is sought in normalised text."""
        if self._in_disguise and match[0] in self._late:
            normal = self._tokenizer.normalizer.normalize_str
            if not normal(match.string[match.start() : match.end() + 4]).startswith(normal(match[0])):
                return False
        beside = match.string[max(0, match.start() - 1) : match.start()], match.string[match.end() : match.end() + 1]
        return match[0] not in self._words or not any(map(WORD.match, beside))

    def _described(self, *, continuation: bool = False) -> dict[str, Any]:
        """What the tokenizer was made of, with the tokens of the settings. (The library's own description would tell
        standard output of every unused id.)"""
        description: dict[str, Any] = json.loads(self._text)
        description["added_tokens"] = [*(description.get("added_tokens") or ()), *self._registered]
        if continuation:
            _drop_leading_blank(description)
        return description

    def _check_ids(self, ids: Mapping[str, int], settings: Settings) -> None:
        """Some ids may be unused, but not most of them: there is room for each one in lists and in what a model gives.

        Raises:
            UserError: an id far beyond the number of tokens and the model's vocabulary.
        """
        token = max(ids, key=ids.__getitem__, default="")
        limit = 16 * max(len(ids), int(settings.config.get("vocab_size") or 0), 256)
        if ids and ids[token] >= limit:
            raise UserError(
                f"{self.files[0]}: the token {token!r} has the id {ids[token]}, but there are {len(ids)} tokens; "
                "ids count from 0 without large gaps: use the file that was published with this model"
            )

    def _add(self, settings: Settings) -> None:
        """Registers tokens that only the settings name (older folders keep them beside tokenizer.json)."""
        import tokenizers

        known = self._tokenizer.get_vocab(with_added_tokens=True)
        for content in sorted(settings.added, key=lambda token: settings.added[token][0]):
            token_id, special = settings.added[content]
            if content in known or token_id != self._tokenizer.get_vocab_size(with_added_tokens=True):
                continue  # registering it would give it another id
            token = tokenizers.AddedToken(content, special=special, normalized=False)
            self._tokenizer.add_tokens([token])
            self._registered.append({"id": token_id, **added_token(content, special=special)})

    def encode(self, text: str, *, continuation: bool = False, plain: Collection[int] = ()) -> list[int]:
        tokenizer = self._continuation if continuation else self._tokenizer
        if not plain and not self._in_disguise:
            return self._known(tokenizer.encode(text, add_special_tokens=False).ids)
        spans = self.special_spans(text, also=self._written)
        found = {text[start:end]: self._written[text[start:end]] for start, end in spans if start in plain}
        renamed = self._renamed = {**self._renamed, **found}  # other threads may do the same at this moment
        marked, done = "", 0
        for start, end in spans:
            if start not in plain and text[start:end] in renamed:
                marked += text[done:start] + self._mark
                done = start
        return self._known(self._twin(continuation, renamed).encode(marked + text[done:]))

    @cached_property
    def _mark(self) -> str:
        """Stands before tokens that are meant; nobody can know it, and write it in a text."""
        return f"\ufdd0{secrets.token_hex(8)}"

    @cached_property
    def _renamed(self) -> dict[str, int]:
        """The tokens that are text in `_twin`: the special ones, and others once a text has needed it."""
        return dict(self.written_special)

    def _twin(self, continuation: bool, renamed: Mapping[str, int]) -> PlainTwin:
        key = (continuation, frozenset(renamed))
        if key not in self._twins:
            self._twins[key] = PlainTwin(self._described(continuation=continuation), renamed, self._mark)
        return self._twins[key]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        known = [int(i) for i in ids if 0 <= i < self.vocabulary]
        return self._tokenizer.decode(known, skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id)


def _drop_leading_blank(description: dict[str, Any]) -> bool:
    """Takes the blank before a text out of a tokenizer.json; False if there is none."""
    changed = False

    def visit(step: Any) -> Any:
        nonlocal changed
        if not isinstance(step, dict):
            return step
        if step.get("type") == "Sequence":
            key = "normalizers" if "normalizers" in step else "pretokenizers"
            parts = [visit(part) for part in step.get(key, [])]
            return {**step, key: [part for part in parts if part is not None]}
        if step.get("type") == "Prepend":
            changed = True
            return None
        if step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            changed = True
            step.pop("add_prefix_space", None)  # the older name of the same setting
            return {**step, "prepend_scheme": "never"}
        if step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
            changed = True
            return {**step, "add_prefix_space": False}
        return step

    for part in ("normalizer", "pre_tokenizer"):
        description[part] = visit(description.get(part))
    return changed


def added_token(content: str, *, special: bool) -> dict[str, Any]:
    """An added token as tokenizer.json describes it, but for its id."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, **flags, "special": special}


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, as LLaMA 1 and 2 publish it.

    By default the model puts a blank before each part of a text that stands between special tokens. With
    "legacy": false in the settings only a text itself begins with one, and none with "add_prefix_space": false too.
    """

    def __init__(self, files: Sequence[Path], settings: Settings) -> None:
        import sentencepiece

        super().__init__(files)
        source = next(file for file in files if file.suffix == ".model")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=read_bytes(source))
        except RuntimeError as error:
            raise UserError(f"{source}: not a readable sentencepiece model ({error})") from None
        self._continuation = without_dummy_prefix(self._model)
        size = self._model.vocab_size()
        control = [i for i in range(size) if self._model.is_control(i) or self._model.is_unknown(i)]
        self.special_tokens = {self._model.id_to_piece(i): i for i in control}
        self._added = {content: token_id for content, (token_id, _) in settings.added.items() if token_id >= size}
        self._added_by_id = {token_id: content for content, token_id in self._added.items()}
        self.special_tokens |= {content: token_id for content, (token_id, special) in settings.added.items() if special}
        self.vocabulary = 1 + max([size - 1, *self._added.values()])
        self._recognise({**self._added, **self.special_tokens})
        self.unknown_id = self._model.unk_id()
        self._known_tokens = frozenset(self._written.values()).difference(control)
        model = self._model
        for role, token_id in (("bos", model.bos_id()), ("eos", model.eos_id()), ("unk", model.unk_id())):
            if token_id >= 0:
                settings.default_token(role, model.id_to_piece(token_id))
        settings.apply(self, ordinary=size)
        self.adds_bos = settings.flag("add_bos_token", default=True) and self.bos_id is not None
        self._part = self._model if settings.flag("legacy", default=True) else self._continuation
        blank = self._part is self._model or settings.flag("add_prefix_space", default=True)
        self._first = self._model if blank else self._continuation

    def encode(self, text: str, *, continuation: bool = False, plain: Collection[int] = ()) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(self._cut(text, plain)):
            if not part:
                continue
            if number % 2:
                ids.append(self._written[part])
            else:
                model = self._part if number else self._continuation if continuation else self._first
                ids.extend(self._pieces(model, part) if plain else model.encode(part))
        return self._known(ids)

    def _pieces(self, model: Any, text: str) -> list[int]:
        """The pieces of a text; the model itself may know tokens as pieces."""
        ids: list[int] = model.encode(text)
        if self._known_tokens.isdisjoint(ids):
            return ids
        first, *rest = self._broken(text)
        return model.encode(first) + [piece for part in rest for piece in self._continuation.encode(part)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        special = self.special_ids
        text, run = "", list[int]()
        for token_id in map(int, ids):
            if token_id in special or token_id in self._added_by_id:
                text += self._model.decode(run)
                run = []
                if not (skip_special and token_id in special):
                    text += self.token(token_id) or ""
            elif 0 <= token_id < self._model.vocab_size():
                run.append(token_id)
        return text + self._model.decode(run)

    def token_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        found = self._model.piece_to_id(token)
        return found if self._model.id_to_piece(found) == token else None

    def token(self, token_id: int) -> str | None:
        if token_id in self._added_by_id:
            return self._added_by_id[token_id]
        return self._model.id_to_piece(token_id) if 0 <= token_id < self._model.vocab_size() else None


def without_dummy_prefix(model: Any) -> Any:
    """The same sentencepiece model without the blank before a text."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.serialized_model_proto())
    if not proto.normalizer_spec.add_dummy_prefix:
        return model
    proto.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def load_tokenizer(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    Args:
        folder: holds tokenizer.json, a sentencepiece model or the format of the model's family.
        config: the model's config.json; `vocab_size` and the ids of special tokens are used.

    Raises:
        UserError: no tokenizer, an unreadable one, or one that does not fit the model.
    """
    from utils.families import family_of

    folder = Path(folder)
    family = family_of(config)
    if family is not None and (own := family.tokenizer(folder, config)) is not None:
        return own
    names = (TOKENIZER_JSON, *SENTENCEPIECE_FILES)
    main = next((name for name in names if (folder / name).is_file()), None)
    if main is None:
        expected = (*(family.tokenizer_files if family else ()), *names)
        raise UserError(
            f"{folder}: no tokenizer found; expected one of {', '.join(expected)}. Copy the tokenizer files of "
            "the original model there; in training, tokenizer_name_or_path may name its folder instead"
        )
    kept = (*names, *SETTINGS_FILES, *VOCABULARY_FILES)
    files = [folder / name for name in kept if (folder / name).is_file()]
    settings = Settings(folder, config)
    kind = JsonTokenizer if main == TOKENIZER_JSON else SentencePieceTokenizer
    return kind(files, settings)
