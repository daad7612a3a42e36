"""What an exported folder is and holds, and whether it is whole. No Paddle."""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.checkpoints.locate import Checkpoint, read_config
from utils.checkpoints.tensors import open_tensors
from utils.errors import UserError, raise_if
from utils.parallel.topology import Layout
from utils.settings import FLAG, TEXT, TEXTS, Table, list_of, read_json, typed, whole

MANIFEST = "export.json"
STEM = "model"
PROGRAM, WEIGHTS = f"{STEM}.json", f"{STEM}.pdiparams"
PREFIX_CACHE = "prefix_cache.safetensors"
FORMAT = 3
_PLAIN_BY_TOKEN = 2  # the same, but for the layout of the cache of plain programs, see `Manifest.heads_first`
_HASHED_BELOW = 64 * 2**20  # bytes; larger files are compared by size when a model is loaded


@dataclass(frozen=True)
class Manifest:
    """What an exported folder is.

    Attributes:
        format: of the folder.
        paddle: the version of Paddle that wrote the program, which must run it too.
        inference_model: whether the program is the inference model or the library's.
        dtype: of weights and cache.
        inputs: names of the program's inputs before the cache, in order.
        position_parts: number of positions of each token.
        cache: layers, heads of keys and values, and width of a head.
        prefix: length of the prefix in the folder; 0 without one.
        source: what was exported, in words.
        files: size and SHA-256 of every file.
        degree: processes that share the model; from 2 on each has its program in a folder "rank_N" of its own.
        ring: the number under which they exchange.
    """

    format: int
    paddle: str
    inference_model: bool
    dtype: str
    inputs: tuple[str, ...]
    position_parts: int
    cache: tuple[int, int, int]
    prefix: int
    source: str
    files: dict[str, dict[str, Any]]
    degree: int = 1
    ring: int = 0

    @property
    def heads_first(self) -> bool:
        """The layout of the cache, see `utils.model.cache.Cache`."""
        return self.inference_model or self.format != _PLAIN_BY_TOKEN


_COUNT = whole(0, 1 << 62)
_FACTS: Table = {"size": _COUNT, "sha256": TEXT}
_KINDS: Table = {
    **dict.fromkeys(("paddle", "dtype", "source"), TEXT),
    "inference_model": FLAG,
    "inputs": TEXTS,
    "cache": list_of(_COUNT.read, "a list of whole numbers"),
    **dict.fromkeys(("position_parts", "prefix", "degree", "ring"), _COUNT),
    "files": {},
}


def _manifest(file: Path, known: dict[str, Any], again: str) -> Manifest:
    """What the file of an exported folder says.

    Raises:
        UserError: it is of another format, or damaged.
    """
    if known.get("format") not in (_PLAIN_BY_TOKEN, FORMAT):
        raise UserError(f"{file}: format {known.get('format')!r} is not known here; {again}")
    known, faults = typed(_KINDS, known, str(file))
    for name, facts in dict(known.get("files", {})).items():
        found, wrong = typed({name: _FACTS}, {name: facts}, str(file), "files.")
        faults += wrong
        if not wrong and not found.get(name, {}).keys() >= _FACTS.keys():
            faults.append(f"{file}: files.{name} has no size or no sha256")
        known["files"].update(found)
    raise_if([f"{fault}; {again}" for fault in faults])
    try:
        layers, kv_heads, head_dim = known["cache"]
        return Manifest(**{**known, "inputs": tuple(known["inputs"]), "cache": (layers, kv_heads, head_dim)})
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{file}: is damaged ({error}); {again}") from error


def paddle_version() -> str:
    """The installed version of Paddle; asks no Paddle."""
    for name in ("paddlepaddle", "paddlepaddle-gpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "none"


def is_export(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def own_folder(folder: Path, layout: Layout) -> Path:
    """Where the program of this process lies in an exported folder."""
    return folder if layout.tensor == 1 else folder / f"rank_{layout.rank}"


def read_export(name: str, layout: Layout) -> tuple[Checkpoint, Manifest]:
    """An exported folder that is known to be whole, as far as this process needs it.

    Raises:
        UserError: no export, files missing or changed, written by another version of Paddle, or for another number
            of processes.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"--model_name_or_path {name}: no such folder; export the model first: {_command(name, layout.tensor)}"
        )
    if not is_export(folder):
        plain = (folder / "config.json").is_file() and not (folder / PROGRAM).is_file()
        command = _command(f"{name.rstrip('/')}_static", layout.tensor, name if plain else "MODEL")
        raise UserError(f"{folder}: holds no exported model (no {MANIFEST}); export one first: {command}")
    check_name(folder)
    known = read_json(folder / MANIFEST)
    again = f"export it again: {_command(name, layout.tensor)}{_flag(known.get('inference_model') is True)}"
    manifest = _manifest(folder / MANIFEST, known, again)
    faults = []
    if manifest.paddle != paddle_version():
        faults.append(
            f"{folder}: was exported by Paddle {manifest.paddle}, this is Paddle {paddle_version()}; "
            f"programs run in the version that wrote them: {again}"
        )
    own = own_folder(folder, layout)
    if manifest.degree != layout.tensor:
        raise UserError(
            f"{folder}: was exported for {_processes(manifest.degree)}, but {_processes(layout.tensor)} "
            f"{'run' if layout.tensor > 1 else 'runs'}; start it with {_python(manifest.degree)} predictor.py ..., or "
            f"{again}"
        )
    for file, facts in manifest.files.items():
        if (folder / file).parent not in (folder, own):
            continue
        path = folder / file
        if not path.is_file():
            faults.append(f"{folder}: {file} is missing; {again}")
        elif path.stat().st_size != facts["size"]:
            faults.append(f"{path}: has {path.stat().st_size} bytes, exported were {facts['size']}; {again}")
        elif facts["size"] < _HASHED_BELOW and sha256(path) != facts["sha256"]:
            faults.append(f"{path}: has changed since the export; {again}")
    raise_if(faults)
    config, family = read_config(folder / "config.json")
    return Checkpoint(name, folder, config, family, "paddle", (own / PROGRAM, own / WEIGHTS)), manifest


def prefix_cache(folder: Path, manifest: Manifest) -> NDArray[np.float32] | None:
    """The keys and values of the prefix in the folder, see `CachedEngine`; None without one."""
    return open_tensors(folder / PREFIX_CACHE)["prefix"].read().copy() if manifest.prefix else None


def check_same_kind(checkpoint: Checkpoint, manifest: Manifest, inference_model: bool) -> None:
    """Raises `UserError` where --inference_model says otherwise than the export."""
    if manifest.inference_model != inference_model:
        advice = "add --inference_model" if manifest.inference_model else "leave --inference_model out"
        kind = "with" if manifest.inference_model else "without"
        raise UserError(f"{checkpoint.folder}: was exported {kind} --inference_model; {advice}, or export it again")


def check_name(folder: Path) -> None:
    """Raises `UserError` for the name of a folder under which Paddle keeps no program."""
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{folder}: Paddle writes and reads programs only under names in UTF-8; give the folder another name"
        ) from None


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _command(output: str, processes: int, model: str = "MODEL") -> str:
    model, output = shlex.quote(model), shlex.quote(output)
    return f"{_python(processes)} export_model.py --model_name_or_path {model} --output_path {output}"


def _flag(inference_model: bool) -> str:
    return " --inference_model" if inference_model else ""


def _python(processes: int) -> str:
    """How as many processes are started, for messages."""
    return "python" + (f" -u -m paddle.distributed.launch --nproc_per_node {processes}" if processes > 1 else "")


def run_command(output: Path, layout: Layout, inference_model: bool) -> str:
    """The command that answers with an export, for messages."""
    return (
        f"{_python(layout.tensor)} predictor.py --model_name_or_path {shlex.quote(str(output))} --mode static"
        f"{_flag(inference_model)} --data_file ./data/dev.json"
    )


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
