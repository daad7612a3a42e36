"""What a finished run leaves in its output folder beside the checkpoints."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.checkpoints.files import COMPLETE, staging_folder, write_json
from utils.data.template import ChatTemplate
from utils.errors import UserError, notice
from utils.families.tokenizers import Tokenizer
from utils.parallel.process_group import ProcessGroup
from utils.training.record import (
    ALL_RESULTS,
    ARGUMENTS,
    RESULTS,
    known_weights,
    note_evaluation,
    note_weights,
    read_object,
    weights,
)

if TYPE_CHECKING:
    from utils.arguments import RunArguments

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")  # of a result, whose files vary in number


def companion_files(
    args: RunArguments, tokenizer: Tokenizer, template: ChatTemplate, source: Path
) -> Callable[[Path], None]:
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
        new, old = weights(staging), known_weights(folder)
        note_weights(folder, old, new)  # whatever happens now, all of them are ours
        written = {path.name: path for path in sorted(staging.iterdir()) if path.name != COMPLETE}
        for path in written.values():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        for path in sorted(folder.iterdir(), reverse=True):  # the index before its files
            if (path.name in old or _WEIGHTS.fullmatch(path.name)) and path.name not in written:
                path.unlink()
        for name, path in written.items():
            os.replace(path, folder / name)
        note_weights(folder, new)


def write_results(
    folder: Path,
    split: str,
    values: Mapping[str, float],
    processes: ProcessGroup | None = None,
    made_of: Mapping[str, Any] | None = None,
) -> None:
    """Writes the results file of a split and adds the values to `all_results.json`; of several processes, the first
    does.

    Args:
        made_of: of `describe_evaluation`, for an evaluation of the weights that a training has left there.
    """
    if processes is not None and not processes.first:
        return
    write_json(folder / RESULTS[split], dict(values))
    if split != "train":
        note_evaluation(folder, split, made_of)
    everything, before = folder / ALL_RESULTS, {}
    if everything.is_file():
        try:
            before = read_object(everything, "")
        except UserError:
            notice(f"{everything} was damaged, and holds only the newest results now")
    write_json(everything, {**before, **values})
