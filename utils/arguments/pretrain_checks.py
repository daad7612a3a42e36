"""Checks of pretraining and of its data tools; see `checks`."""

from __future__ import annotations

import glob
import math
import os
import shlex
from collections.abc import Iterator
from typing import Any

from utils.arguments.checks import unwritable
from utils.paths import NO_FILE, READ_ONLY, is_read_only
from utils.splits import looks_like_path

TASKS = ("do_train", "do_eval", "do_predict")
PARTS = {"do_train": "training", "do_eval": "validation", "do_predict": "test"}  # of split, in its order
SAMPLE_TEXT = "./data/text"


# --- what the values mean ------------------------------------------------------------------------


def is_source(path: str) -> bool:
    """Whether a path is a folder or the prefix of token files."""
    return os.path.isdir(path) or _is_prefix(path)


def _is_prefix(path: str) -> bool:
    return os.path.isfile(f"{path}.idx") or os.path.isfile(f"{path}_idx.npz")


def read_sources(text: str) -> list[tuple[float | None, str]]:
    """input_dir as (weight, folder or prefix); what is no list of weights and paths is one path.

    Raises:
        ValueError: a list in which a weight is no positive number, or a path is missing.
    """
    words = text.replace(",", " ").split()
    if is_source(text) or len(words) < 2 or _number(words[0]) is None:
        return [(None, text)]
    if len(words) % 2:
        raise ValueError(f"expected pairs of a weight and a prefix, found {len(words)} words")
    found: list[tuple[float | None, str]] = []
    for weight, path in zip(words[::2], words[1::2], strict=True):
        number = _number(weight)
        if number is None or number <= 0:
            raise ValueError(f'expected a weight above 0 before {path}, found "{weight}"')
        found.append((number, os.path.expanduser(path)))
    return found


def read_shares(text: str) -> tuple[float, ...]:
    """The three numbers of split.

    Raises:
        ValueError: anything else.
    """
    numbers = [_number(part) for part in text.replace("/", ",").split(",")]
    shares = tuple(number for number in numbers if number is not None and number >= 0)
    if len(numbers) != 3 or len(shares) != 3 or not sum(shares):
        raise ValueError('expected three numbers such as "949,50,1", the shares for training, validation and test')
    return shares


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# --- pretraining ---------------------------------------------------------------------------------


def required(run: Any) -> Iterator[str]:
    if run.model_name_or_path is None:
        yield "model_name_or_path is missing; name a model, such as smollm2-135m-instruct: its sizes, and its tokenizer"
    tasks = [name for name in TASKS if getattr(run, name)]
    if not tasks:
        yield f"nothing to do: set one of {', '.join(TASKS)}"
    else:
        if run.output_dir is None:
            yield f"output_dir is missing; {tasks[0]} writes its results there"
        if run.input_dir is None:
            yield f"input_dir is missing; {tasks[0]} needs token files: {how_to_build(run, './data')}"
        if not (run.do_train or run.continue_training):
            yield f"{tasks[0]} without do_train evaluates the model's own weights; add --continue_training true"


def text(run: Any) -> Iterator[str]:
    """input_dir must be a folder with token files, a prefix, or weights and these."""
    named = run.input_dir
    if named is None:
        return
    try:
        sources = read_sources(named)
    except ValueError as fault:
        yield f"{run.where('input_dir')}: {fault}"
        return
    for _, path in sources:
        if not is_source(path):
            folder = os.path.dirname(path) if len(sources) > 1 else path
            found = f"{path} is neither a folder nor the prefix of token files"
            yield f"{run.where('input_dir')}: {found}; {how_to_build(run, folder)}"
        elif os.path.isdir(path) and not _is_prefix(path) and not _token_files(path):
            yield f"{run.where('input_dir')} holds no token files PREFIX.bin and PREFIX.idx; {how_to_build(run, path)}"


def _token_files(folder: str) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith((".idx", "_idx.npz"))]


def how_to_build(run: Any, folder: str) -> str:
    """The commands that make token files of the sample text, for messages."""
    lines = f"{SAMPLE_TEXT}.jsonl"
    convert = f"python data/tools/trans_to_json.py --input_path {SAMPLE_TEXT} --output_path {SAMPLE_TEXT} && "
    first = "" if os.path.isfile(lines) else convert
    model = run.tokenizer_name_or_path or run.model_name_or_path or "MODEL"
    prefix = os.path.join(folder or ".", "text")
    return (
        f"build them from the sample text: {first}python data/tools/create_pretraining_data.py --model_name "
        f"{shlex.quote(model)} --input_path {lines} --output_prefix {shlex.quote(prefix)} --append_eos"
    )


def shares(run: Any) -> Iterator[str]:
    try:
        found = read_shares(run.split)
    except ValueError as fault:
        yield f"{run.where('split')}: {fault}"
        return
    for task, share in zip(TASKS, found, strict=True):
        if getattr(run, task) and not share:
            yield f"{run.where('split')} leaves nothing for {task}; its {PARTS[task]} share must be above 0"


def counts_steps(run: Any) -> Iterator[str]:
    for name in ("evaluation_strategy", "save_strategy", "logging_strategy"):
        if run.do_train and getattr(run, name) == "epoch":
            yield f"{run.where(name)}: pretraining counts updates, not epochs; use steps"


def last_rate(run: Any) -> Iterator[str]:
    below = run.lr_scheduler_type == "polynomial" and run.min_learning_rate == run.learning_rate > 0
    if below or run.min_learning_rate > run.learning_rate:
        yield f"{run.where('min_learning_rate')} must be below {run.where('learning_rate')}"
    elif run.min_learning_rate and run.lr_scheduler_type.startswith("constant"):
        yield f"{run.where('min_learning_rate')} and {run.where('lr_scheduler_type')} contradict; use linear or cosine"


# --- data tools ----------------------------------------------------------------------------------


def tool_files(run: Any) -> Iterator[str]:
    if run.input_path is None:
        yield "input_path is missing; name a file or a folder"
    elif not os.path.exists(run.input_path):
        yield f"{run.where('input_path')}: no such file or folder"
    elif not os.path.isdir(run.input_path) and not os.path.isfile(run.input_path):
        yield f"{run.where('input_path')}: {NO_FILE}"
    elif os.path.isdir(run.input_path) and not glob.glob(os.path.join(glob.escape(run.input_path), "*")):
        yield f"{run.where('input_path')} is empty"
    output = "output_path" if hasattr(run, "output_path") else "output_prefix"
    value = getattr(run, output)
    if value is None:
        yield f"{output} is missing; what is written is called after it"
    elif not os.path.basename(value):
        yield f"{run.where(output)}: expected a name behind the last /"
    elif not os.path.isdir(value) or output == "output_prefix":
        parent = _Parent(run, output, os.path.dirname(value) or ".")
        yield from unwritable(parent, output)
    endings = (".bin", ".idx") if output == "output_prefix" else () if run.no_merge else (".jsonl",)
    for file in [value + ending for ending in endings] if value else []:
        if os.path.isdir(file):
            yield f"{run.where(output)}: {file} is a folder"
        elif is_read_only(file):
            yield f"{run.where(output)}: {file} {READ_ONLY}"


class _Parent:
    """Arguments as `unwritable` reads them, with the folder of a path for the path."""

    def __init__(self, run: Any, name: str, folder: str) -> None:
        self._run, self._name, self._folder = run, name, folder

    def __getattr__(self, name: str) -> Any:
        return self._folder if name == self._name else getattr(self._run, name)


def tool_model(run: Any) -> Iterator[str]:
    if run.model_name is None:
        yield "model_name is missing; name the model that will be trained, such as smollm2-135m-instruct"
    for name in ("model_name", "tokenizer_name"):
        value = getattr(run, name)
        if value is not None and looks_like_path(value) and not os.path.isdir(value):
            yield f"{run.where(name)}: no such folder"
