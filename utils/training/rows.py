"""Which rows of the training data some token ids are, in words that lead the user to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from utils.data.encode import Example, encode_row
from utils.data.sources import find_source
from utils.data.template import ChatTemplate
from utils.families.tokenizers import Tokenizer

if TYPE_CHECKING:
    from utils.arguments import FinetuneArguments

SHOWN_ROWS = 8
SHOWN_CHARACTERS = 60


class RowNames:
    """Finds training rows by their token ids: reads the data again, which only a failed run does."""

    def __init__(self, args: FinetuneArguments, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.args, self.tokenizer, self.template = args, tokenizer, template

    def __call__(self, rows: Sequence[Sequence[int]]) -> str:
        """File and line of the first of these rows (of a stream, the end of their text)."""
        more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
        return "; ".join(self._stream(rows[:SHOWN_ROWS]) if self.args.lazy else self._file(rows[:SHOWN_ROWS])) + more

    def _stream(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return [f"a row that ends in {self.tokenizer.decode(list(ids))[-SHOWN_CHARACTERS:]!r}" for ids in rows]

    def _file(self, rows: Sequence[Sequence[int]]) -> list[str]:
        args = self.args
        wanted = {tuple(ids) for ids in rows}
        found = []
        for row in find_source(str(args.dataset_name_or_path), args.task_name, "train", args.max_train_samples).rows():
            example = encode_row(row, self.tokenizer, self.template, args.src_length, args.max_length)
            if isinstance(example, Example) and (ids := tuple(example.input_ids.tolist())) in wanted:
                wanted.remove(ids)
                found.append(row.place)
            if not wanted:
                break
        return found
