"""A tokenizer.json whose added tokens have other names, so that their text is text like any other."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

REWRITING = ("NFKC", "NFKD", "Precompiled", "Lowercase", "BertNormalizer", "StripAccents")


def rewrites(normalizer: dict[str, Any] | None) -> bool:
    """Whether the normalizer of a tokenizer.json makes letters and signs out of others."""
    if normalizer is None:
        return False
    return normalizer.get("type") in REWRITING or any(map(rewrites, normalizer.get("normalizers", [])))


class PlainTwin:
    """A tokenizer that takes its added tokens for text, unless `mark` stands before them.

    Everything else is as in the original: what the tokens take of the blanks beside them, and what begins a text or a
    part of it.
    """

    def __init__(self, description: dict[str, Any], added: Mapping[str, int], mark: str) -> None:
        """
        Args:
            description: a valid tokenizer.json; it is changed.
            added: the tokens and their ids.
            mark: no text may hold it.
        """
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(_renamed(description, added, mark)))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A token that is no piece of the model's vocabulary gets its id by the order of the added ones.
        self._ids = {self._tokenizer.token_to_id(mark + token): token_id for token, token_id in added.items()}

    def encode(self, text: str) -> list[int]:
        """The ids of the original."""
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self._ids.get(token_id, token_id) for token_id in found]


def _renamed(description: dict[str, Any], added: Collection[str], mark: str) -> dict[str, Any]:
    """The description with `mark` before each added token, among the pieces of its model too."""

    def name(token: str) -> str:
        return mark + token if token in added else token

    for entry in description["added_tokens"]:
        if entry["content"] in added:
            entry |= {"content": name(entry["content"]), "single_word": False}  # who sets the mark sees to that
    model = description["model"]
    pieces = model["vocab"]
    if isinstance(pieces, dict):
        model["vocab"] = {name(token): token_id for token, token_id in pieces.items()}
    else:
        model["vocab"] = [[name(token), *rest] for token, *rest in pieces]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = name(model["unk_token"])
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, added)]
    return description


def _makes(merge: str | list[str], added: Collection[str]) -> bool:
    """Whether a merge joins an added token, or makes one."""
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return first in added or second in added or first + second in added
