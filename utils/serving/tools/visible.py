"""The text of an answer with the special tokens that mark calls, which other texts do not show."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from utils.inference.text import TextStream
from utils.serving.tools.form import CallForm

if TYPE_CHECKING:
    from utils.families.tokenizers import Tokenizer


class Visible:
    """Decodes an answer as the scheduler does, but for those tokens; stop words end it as they do there."""

    def __init__(
        self, form: CallForm, tokenizer: Tokenizer, stop: Sequence[str] = (), end_ids: Collection[int] = ()
    ) -> None:
        """
        Args:
            stop: texts that end the answer.
            end_ids: tokens that end it and are no part of it.
        """
        self._hidden = (tokenizer.special_ids | set(end_ids)) - set(form.special.values())
        self._tokenizer = tokenizer
        self._stream = TextStream(self._decode, stop)

    def push(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """New text. `last` gives what was held back."""
        text = "".join(self._stream.push(token) for token in tokens if token not in self._hidden)
        return text + self._stream.finish() if last else text

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special=False)
