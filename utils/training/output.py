"""What a finished run leaves in its output folder beside the checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.checkpoints.files import COMPLETE, staging_folder, write_json
from utils.data.template import ChatTemplate
from utils.families.tokenizers import Tokenizer
from utils.parallel.peers import Alone

ARGUMENTS = "arguments.json"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")  # of a result, whose files vary in number


def companion_files(args: Any, tokenizer: Tokenizer, template: ChatTemplate, source: Path) -> Callable[[Path], None]:
    """A function that writes what belongs beside weights: tokenizer, template, generation settings
    of the base, and the arguments of the run."""

    def write(folder: Path) -> None:
        tokenizer.save(folder)
        template.save(folder)
        settings = source / "generation_config.json"
        if settings.is_file():
            shutil.copyfile(settings, folder / settings.name)
        write_json(folder / ARGUMENTS, args.to_json())

    return write


@contextmanager
def install(folder: Path) -> Iterator[Path]:
    """A folder to fill; when the block ends well each file moves into `folder`, so that none is ever half-written
    there. Weights of an earlier result go first: an index of theirs would be read instead of the new file."""
    folder.mkdir(parents=True, exist_ok=True)
    with staging_folder(folder / "final") as staging:
        yield staging
        written = {path.name: path for path in sorted(staging.iterdir()) if path.name != COMPLETE}
        for path in written.values():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        for path in sorted(folder.iterdir(), reverse=True):  # the index before its files
            if _WEIGHTS.fullmatch(path.name) and path.name not in written:
                path.unlink()
        for name, path in written.items():
            os.replace(path, folder / name)


RESULTS = {"train": "train_results.json", "dev": "eval_results.json", "test": "predict_results.json"}


def missing_results(folder: Path, splits: Sequence[str]) -> list[str]:
    """The results files that a run over these splits has not written into its output folder."""
    return [RESULTS[split] for split in splits if not (folder / RESULTS[split]).is_file()]


def write_results(folder: Path, split: str, values: Mapping[str, float], peers: Alone | None = None) -> None:
    """Writes `SPLIT_results.json` and adds the values to `all_results.json`; of several processes, the first does."""
    if peers is not None and not peers.first:
        return
    write_json(folder / f"{split}_results.json", dict(values))
    everything = folder / "all_results.json"
    try:
        before = dict(json.loads(everything.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # none yet, or a damaged file
        before = {}
    write_json(everything, {**before, **values})
