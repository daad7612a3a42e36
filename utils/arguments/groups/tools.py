"""The tools that make data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from utils.arguments.fields import Arguments, arg
from utils.arguments.groups.common import SPECIAL_HELP


@dataclass
class WorkArguments(Arguments):
    """How a data tool works."""

    group: ClassVar[str] = "Work"

    workers: int = arg(1, "processes that work at the same time", minimum=1)
    log_interval: int = arg(10_000, "documents between two lines of progress", minimum=1, unit="documents")


@dataclass
class TextArguments(WorkArguments):
    """Plain text to JSON Lines."""

    group: ClassVar[str] = "Text"

    input_path: str | None = arg(None, "a text file, or a folder whose files are all read", path=True)
    output_path: str | None = arg(None, "written is OUTPUT_PATH.jsonl; with no-merge files in OUTPUT_PATH/", path=True)
    json_key: str = arg("text", "key of the document in a line")
    doc_spliter: str = arg("", "the line that stands between documents; an empty one by default")
    min_doc_length: int = arg(10, "shorter documents are left out", minimum=0, unit="characters")
    no_merge: bool = arg(False, "write one file per input file (also --no-merge)")
    no_shuffle: bool = arg(False, "keep the order of the documents (also --no-shuffle)")
    seed: int = arg(42, "seed of the order", minimum=0, maximum=2**32 - 1)


@dataclass
class TokenFileArguments(WorkArguments):
    """JSON Lines to token files."""

    group: ClassVar[str] = "Token files"

    model_name: str | None = arg(None, "the model: a folder, a hub name, or smollm2-135m-instruct", path=True)
    tokenizer_name: str | None = arg(
        None,
        "tokenizer, if it is not the model's own: a folder or a name; the name of a class is not needed",
        path=True,
    )
    input_path: str | None = arg(None, "a JSON Lines file, or a folder of *.jsonl and *.json", path=True)
    output_prefix: str | None = arg(None, "written are OUTPUT_PREFIX.bin and OUTPUT_PREFIX.idx", path=True)
    data_format: str = arg("JSON", "format of the input", choices=("JSON",))
    json_key: str = arg("text", "key of the document in a line")
    split_sentences: bool = arg(False, "index the sentences of a document one by one")
    append_eos: bool = arg(False, "end every document with the end token")
    special_tokens_in_text: bool = arg(False, SPECIAL_HELP)
    data_impl: str = arg("mmap", "format of the output", choices=("mmap",))
