"""What lies in an output folder and what it was made of.

So a model of another origin is never overwritten, nothing counts as done that is not, and one run at a time writes.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from utils.arguments.fields import show
from utils.checkpoints.files import COMPLETE, write_json
from utils.checkpoints.fingerprint import file_sample
from utils.errors import UserError
from utils.parallel.topology import Layout

if TYPE_CHECKING:
    from utils.arguments import RunArguments

ARGUMENTS = "arguments.json"  # of the run, beside weights
FINISHED = "finished.json"  # in output_dir, once its training has ended and its results are complete
RECORD = "result.json"  # the files of weights that the last training has left, and of what evaluations were made
ALL_RESULTS = "all_results.json"
RESULTS = {"train": "train_results.json", "dev": "eval_results.json", "test": "predict_results.json"}
PROGRESS = "progress.json"  # of a checkpoint: what a run goes on from, beside weights and optimizer
LOCK = ".lock"
WEIGHTS = (".safetensors", ".bin", ".pdparams", ".pdiparams", ".gguf", ".pt", ".pth")
_BESIDE = (".json", ".jinja", ".model", ".txt")  # settings, results, template, tokenizer
SHOWN = 3
SHOWN_TEXT = 60


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """A JSON object that a run has written.

    Args:
        advice: what to do about a damaged one.

    Raises:
        UserError: it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged, it cannot be read as JSON ({error}); {advice}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: is damaged, it holds no JSON object; {advice}")
    return found


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_run(value: object) -> bool:
    """Whether a value is what `plan.describe` gives; without these keys it could be any run."""
    return isinstance(value, dict) and {"model", "method", "data"} <= value.keys()


Types = Mapping[str, Callable[[Any], bool]]
FINISHED_TYPES: Types = {"run": is_run, "global_step": is_count, "result_step": is_count}


def wrong(found: Mapping[str, Any], types: Types) -> list[str]:
    """What is wrong with an object that a run has written: keys that are missing or of other types."""
    faults = [f"it lacks {name}" for name in types if name not in found]
    wrong_type = (name for name, right in types.items() if name in found and not right(found[name]))
    return faults + [f"its {name} cannot be {show(found[name])[:SHOWN_TEXT]}" for name in wrong_type]


def _read(output: Path) -> dict[str, Any]:
    """The record; empty without a readable one."""
    try:
        return read_object(output / RECORD, "")
    except (OSError, UserError):
        return {}


# --- weights ---------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder itself."""
    return [path for path in sorted(folder.iterdir()) if path.suffix in WEIGHTS and path.is_file()]


def weights(folder: Path) -> dict[str, Any]:
    """Of each file of weights in a folder itself, by name, what tells it from others: its size in bytes and its
    sample. Not its time, which a copy of the folder does not keep."""
    return {path.name: {"size": path.stat().st_size, "sample": file_sample(path)} for path in weight_files(folder)}


def note_weights(output: Path, *kinds: Mapping[str, Any]) -> None:
    """Notes which files of weights are those of a training; the evaluations of earlier ones are over."""
    write_json(output / RECORD, {"weights": {name: known for files in kinds for name, known in files.items()}})


def known_weights(output: Path) -> dict[str, Any]:
    """What `note_weights` has noted; all that is there, where an earlier version has left its result."""
    known = _read(output).get("weights")
    if isinstance(known, dict):
        return known
    ours = any((output / name).is_file() for name in (FINISHED, ARGUMENTS))
    return weights(output) if ours else {}


def foreign(output: Path, checkpoints: Iterable[Path]) -> list[str]:
    """The weights and checkpoints in an output folder that no training has left there.

    Args:
        checkpoints: what is named like one in it; of these also what holds no weights.
    """
    known = known_weights(output)
    found = [path.name for path in weight_files(output) if path.name not in known]
    found += [f"{path.name}/" if path.is_dir() else path.name for path in checkpoints if not is_ours(path)]
    return found


def is_ours(checkpoint: Path) -> bool:
    """Whether a training of ours has written what is named like a checkpoint, damaged or not, or nothing is in it."""
    if not checkpoint.is_dir():
        return False
    try:
        written = read_object(checkpoint / COMPLETE, "").get("files")
    except (OSError, UserError):
        written = None
    known = isinstance(written, dict) and PROGRESS in written
    return known or (checkpoint / PROGRESS).is_file() or not any(checkpoint.iterdir())


def replaced(output: Path) -> list[Path]:
    """The files right in an output folder that a training there may replace or remove: weights, and what lies beside
    them in any result."""
    return [path for path in sorted(output.glob("*")) if path.suffix in (*WEIGHTS, *_BESIDE) and path.is_file()]


def lost(output: Path) -> list[str]:
    """The files of weights of a finished training that are not there any more.

    Raises:
        UserError: others stand in their place.
    """
    here, known = weights(output), known_weights(output)
    changed = [name for name in known if name in here and known[name] not in (here[name], here[name]["size"])]
    if changed:
        raise UserError(
            f"output_dir {output}: {', '.join(changed[:SHOWN])} is not the file that the training there has written; "
            "move it away, or give another output_dir"
        )
    return [name for name in known if name not in here] if known else ["its weights"]


# --- evaluations -----------------------------------------------------------------------------------


def is_evaluated(output: Path, split: str, made_of: Mapping[str, Any]) -> bool:
    """Whether the results of a split are of the trained weights and of just this."""
    stored = _read(output).get("evaluations")
    same = isinstance(stored, dict) and stored.get(split) == json.loads(json.dumps(made_of))
    return same and (output / RESULTS[split]).is_file()


def note_evaluation(output: Path, split: str, made_of: Mapping[str, Any] | None) -> None:
    """Notes of what the results of a split were made; None for weights that are not those of a training there."""
    record = _read(output)
    evaluations = record.get("evaluations")
    evaluations = dict(evaluations) if isinstance(evaluations, dict) else {}
    if made_of is not None:
        evaluations[split] = made_of
    elif evaluations.pop(split, None) is None:
        return
    write_json(output / RECORD, {**record, "evaluations": evaluations})


# --- one run at a time -----------------------------------------------------------------------------


def claim(args: RunArguments, layout: Layout, *, new: bool = False) -> BinaryIO | None:
    """Locks the output folder of a run until the returned file is closed or the process ends, however it does.

    Args:
        new: make the folder if it is not there; else nothing is locked then.

    Raises:
        UserError: another run is at work there; names it.
    """
    output = args.output
    writes = args.do_train or args.do_eval or args.do_predict
    if not writes or args.dry_run or layout.rank > 0 or not (new or output.is_dir()):
        return None
    output.mkdir(parents=True, exist_ok=True)
    own = f"process {os.getpid()} on {socket.gethostname()}"
    file = open(output / LOCK, "a+b")  # noqa: SIM115 - closed by the caller
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().decode("utf-8", "replace") or "another process"
        if holder == own:  # an earlier run of this process
            return file
        file.close()
        raise UserError(
            f"output_dir {output}: {holder} is at work there right now; wait for it, or give another output_dir"
        ) from None
    except OSError:  # a file system without locks
        return file
    with suppress(OSError):  # a full disk: the lock holds all the same
        file.truncate(0)
        file.write(own.encode())
        file.flush()
    return file
