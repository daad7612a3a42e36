"""What the files beside a tokenizer say about its special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, notice, raise_if
from utils.families.config import IDS
from utils.settings import FLAG, Kind, Table, read_json, shown, typed, whole

if TYPE_CHECKING:
    from utils.families.tokenizers import Tokenizer

_ROLES = ("bos", "eos", "pad", "unk")
_ID = whole(0, 1_000_000_000)


def _token(entry: Any) -> str:
    """The text of a token, written as a string or as an object with "content"."""
    text = entry.get("content") if isinstance(entry, Mapping) else entry
    if not isinstance(text, str):
        raise ValueError
    text.encode()  # a ValueError for half of a surrogate pair
    return text


TOKEN = Kind("a token as text, an object with its content, or null", _token, null=True)
_KINDS: Table = {
    **{f"{role}_token": TOKEN for role in _ROLES},
    **dict.fromkeys(("add_bos_token", "add_prefix_space", "legacy"), FLAG),
    "num_image_tokens": _ID,
}
_GENERATION: Table = {f"{role}_token_id": IDS for role in _ROLES}


class Settings:
    """tokenizer_config.json, special_tokens_map.json, added_tokens.json and generation_config.json of a folder.

    Attributes:
        tokenizer, generation: tokenizer_config.json and generation_config.json, their known values typed.
        added: tokens beside the vocabulary, each with its id and whether it is special.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: a file that cannot be read, or values of another kind; all are named.
        """
        self.folder = folder
        self.config = config
        self._faults: list[str] = []
        special_map = self._read("special_tokens_map.json", _KINDS)
        self.tokenizer = self._read("tokenizer_config.json", _KINDS)
        self.generation = self._read("generation_config.json", _GENERATION)
        self._tokens: dict[str, str | None] = {}
        for source in (special_map, self.tokenizer):  # the later one wins; an empty name is no name
            named = {role: source[f"{role}_token"] for role in _ROLES if source.get(f"{role}_token", "") != ""}
            self._tokens.update(named)
        self.added: dict[str, tuple[int, bool]] = {}
        self._read_added()
        raise_if(self._faults)

    def _read(self, name: str, table: Table) -> dict[str, Any]:
        found, faults = typed(table, _read_json(self.folder / name), str(self.folder / name))
        self._faults += faults
        return found

    def _read_added(self) -> None:
        """The tokens of added_tokens.json (older folders, all special) and of added_tokens_decoder."""
        older = self.folder / "added_tokens.json"
        for content, token_id in _read_json(older).items():
            self._add(older, content, token_id, content, True)
        decoder, file = self.tokenizer.get("added_tokens_decoder") or {}, self.folder / "tokenizer_config.json"
        if not isinstance(decoder, Mapping):
            self._faults.append(f"{file}: added_tokens_decoder is {shown(decoder)}; expected an object")
            return
        for token_id, entry in decoder.items():
            special = entry.get("special", True) if isinstance(entry, Mapping) else True
            self._add(file, f"added_tokens_decoder.{token_id}", token_id, entry, special)

    def _add(self, file: Path, key: str, token_id: Any, entry: Any, special: Any) -> None:
        try:
            content, place, is_special = _token(entry), _ID.read(token_id), bool(FLAG.read(special))
        except ValueError:
            self._faults.append(f"{file}: {key} is {shown(entry)}, {shown(token_id)}; expected a token and its id")
            return
        if content:
            self.added[content] = (place, is_special)

    def default_token(self, role: str, token: str) -> None:
        """Sets a token that no file names."""
        self._tokens.setdefault(role, token)

    def token(self, role: str) -> str | None:
        """The token of a role ("bos", "eos", "pad", "unk"), if a file names one."""
        return self._tokens.get(role)

    def flag(self, name: str, *, default: bool) -> bool:
        return bool(self.tokenizer.get(name, default))

    def _find(self, tokenizer: Tokenizer, role: str) -> int | None:
        """The id of a role: by its token if a file names one, else by the id in the model's config."""
        if role in self._tokens:
            token = self._tokens[role]
            return None if token is None else tokenizer.token_id(token)
        ids = _ids(self.config.get(f"{role}_token_id"), tokenizer.vocabulary)
        return ids[0] if ids else None

    def apply(self, tokenizer: Tokenizer, *, ordinary: int) -> None:
        """Sets the special ids of `tokenizer`, whose vocabulary is complete.

        Args:
            ordinary: one more than the highest id that a text without special and added tokens can have.

        Raises:
            UserError: no token ends a text, or the vocabulary does not fit the model.
        """
        rows = self.config.get("vocab_size")
        rows = tokenizer.vocabulary if rows is None else int(rows)
        if ordinary > rows:
            raise UserError(
                f"{self.folder}: the tokenizer has {ordinary} tokens but the model's vocab_size "
                f"in config.json is {rows}; use the tokenizer that was published with this model"
            )
        limit = min(rows, tokenizer.vocabulary)
        named = [*_ids(self.generation.get("eos_token_id"), limit), *_ids(self.config.get("eos_token_id"), limit)]
        eos_id = self._find(tokenizer, "eos")
        if eos_id is None:
            if not named:
                raise UserError(
                    f"{self.folder}: no end-of-text token; set eos_token in tokenizer_config.json to a token "
                    "of the tokenizer's vocabulary"
                )
            eos_id = named[0]
        tokenizer.eos_id = eos_id
        tokenizer.eos_token = tokenizer.token(eos_id) or ""
        tokenizer.eos_ids = tuple(dict.fromkeys([eos_id, *named]))
        tokenizer.bos_id = self._find(tokenizer, "bos")
        tokenizer.bos_token = None if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id)
        for role, token_id in (("bos", tokenizer.bos_id), ("eos", eos_id)):
            if token_id is not None and token_id >= rows:
                raise UserError(
                    f"{self.folder}: {role}_token {tokenizer.token(token_id)} has the id {token_id}, but the model's "
                    f"vocab_size in config.json is {rows}; use the tokenizer that was published with this model"
                )
        candidates = (self._find(tokenizer, "pad"), self._find(tokenizer, "unk"), eos_id)
        tokenizer.pad_id = next(candidate for candidate in candidates if candidate is not None and candidate < rows)
        for token_id in (tokenizer.bos_id, eos_id):
            token = None if token_id is None else tokenizer.token(token_id)
            if token and token_id is not None:
                tokenizer.special_tokens.setdefault(token, token_id)
        if tokenizer.vocabulary > rows:
            tokenizer.rows = rows
            _say_beyond(self.folder, rows, tokenizer.vocabulary - rows, tokenizer.token(tokenizer.vocabulary - 1) or "")


@cache  # said once of each folder
def _say_beyond(folder: Path, rows: int, count: int, last: str) -> None:
    one = f"the added token {last} has an id" if count == 1 else f"{count} added tokens, the last one {last}, have ids"
    notice(f"{folder}: {one} beyond the model's vocab_size of {rows}; a text that holds such a token is refused")


def _read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; empty if there is no such file."""
    return read_json(file) if file.exists() else {}


def _ids(value: Any, vocabulary: int) -> list[int]:
    """The valid ids in a number or list of numbers (LLaMA 1 folders say pad_token_id -1)."""
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and 0 <= i < vocabulary]
