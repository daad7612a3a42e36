"""Exported models: one static program with the cache as its input, in a folder that needs nothing else."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from utils.checkpoints.companions import GENERATION_CONFIG
from utils.checkpoints.files import COMPLETE, atomic_directory, check_replaceable, holds_nothing_else, write_json
from utils.checkpoints.locate import Checkpoint, read_config
from utils.checkpoints.tensors import open_tensors, write_safetensors
from utils.errors import UserError, raise_if
from utils.parallel.peers import Alone
from utils.parallel.topology import Layout
from utils.settings import FLAG, TEXT, TEXTS, Table, list_of, read_json, typed, whole

if TYPE_CHECKING:
    from utils.inference.engine import Engine
    from utils.inference.loading import Prepared

MANIFEST = "export.json"
STEM = "model"
PROGRAM, WEIGHTS = f"{STEM}.json", f"{STEM}.pdiparams"
PREFIX_CACHE = "prefix_cache.safetensors"
FORMAT = 2
_PROBED = 1 << 16  # bytes, see `_check_room`
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
    cache: tuple[int, ...]
    prefix: int
    source: str
    files: dict[str, dict[str, Any]]
    degree: int = 1
    ring: int = 0


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
    if known.get("format") != FORMAT:
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
        return Manifest(**{**known, "inputs": tuple(known["inputs"]), "cache": tuple(known["cache"])})
    except (TypeError, KeyError) as error:
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
    _check_name(folder)
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
            f"{'run' if layout.tensor > 1 else 'runs'}; start it with {python(manifest.degree)} predictor.py ..., or "
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
        elif facts["size"] < _HASHED_BELOW and _sha256(path) != facts["sha256"]:
            faults.append(f"{path}: has changed since the export; {again}")
    raise_if(faults)
    config, family = read_config(folder / "config.json")
    return Checkpoint(name, folder, config, family, "paddle", (own / PROGRAM, own / WEIGHTS)), manifest


def prefix_cache(folder: Path, manifest: Manifest) -> NDArray[np.float32] | None:
    """The keys and values of the prefix in the folder, see `CachedEngine`; None without one."""
    return open_tensors(folder / PREFIX_CACHE)["prefix"].read().copy() if manifest.prefix else None


def export(
    prepared: Prepared, output: Path, *, device: str, verify: Callable[[Path, Engine, Prepared, str], None]
) -> None:
    """Writes the program, its weights, config, tokenizer, template, generation settings and manifest; of several
    processes each the program of its part.

    `output` appears whole or not at all; only an earlier export is ever replaced.

    Args:
        verify: called with the finished folder, before it becomes `output`, and an engine of what was
            exported; raises if they differ.

    Raises:
        UserError: weights that do not fit, an `output` that holds anything else, or what `verify` finds.
    """
    check_target(output)
    from utils.inference.loading import engine_of, load_program

    peers = prepared.peers
    with _staged(output, peers) as staging:
        layer, prefix = load_program(prepared, device)
        own = own_folder(staging, peers.layout)
        own.mkdir(exist_ok=True)
        save_program(layer, own, prepared)
        if prefix is not None:
            write_safetensors(own / PREFIX_CACHE, [("prefix", prefix)], {"format": "np"})
        peers.gate("waiting for the programs of all processes")
        if peers.first:
            _describe(staging, prepared, layer, prefix)
        peers.gate("waiting for the description of the programs")
        verify(staging, engine_of(prepared, layer, prefix), prepared, device)


@contextmanager
def _staged(output: Path, peers: Alone) -> Iterator[Path]:
    """The folder that all processes fill; it becomes `output` when all have ended the block well."""
    made = atomic_directory(output) if peers.first else nullcontext(output)
    with made as staging:
        yield Path(peers.from_first(lambda: str(staging), "waiting for the folder of the export"))
        peers.gate("waiting for the programs of other processes")
    peers.gate("waiting for the end of the export")


def _describe(staging: Path, prepared: Prepared, layer: Any, prefix: NDArray[np.float32] | None) -> None:
    """Writes all that lies beside the programs."""
    checkpoint, peers = prepared.checkpoint, prepared.peers
    write_json(staging / "config.json", checkpoint.config)
    prepared.tokenizer.save(staging)
    prepared.template.save(staging)
    if (checkpoint.folder / GENERATION_CONFIG).is_file():
        settings = read_json(checkpoint.folder / GENERATION_CONFIG)
        write_json(staging / GENERATION_CONFIG, settings)
    architecture = checkpoint.family.architecture(checkpoint.config)
    adapters = {"LoRA": prepared.lora and prepared.lora.folder, "prefix": prepared.prefix}
    shape = checkpoint.family.shape(checkpoint.config)
    source = "".join([checkpoint.name, *(f" with {kind} {path}" for kind, path in adapters.items() if path)])
    manifest = Manifest(
        FORMAT,
        paddle_version(),
        prepared.inference_model,
        prepared.dtype,
        layer.inputs,
        architecture.position_parts,
        (shape.layers, layer.kv_heads, shape.head_dim),
        0 if prefix is None else prefix.shape[2],
        source,
        {
            path.relative_to(staging).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(staging.rglob("*"))
            if path.is_file() and path.name != COMPLETE
        },
        peers.layout.tensor,
        peers.groups.tensor.id if peers.several else 0,
    )
    write_json(staging / MANIFEST, asdict(manifest))


def save_program(layer: Any, folder: Path, prepared: Prepared) -> None:
    """Traces a layer like `utils.inference.decoder.Decoder` and saves it; batch, lengths and cache stay open."""
    import paddle
    from paddle.static import InputSpec

    checkpoint = prepared.checkpoint
    shape = checkpoint.family.shape(checkpoint.config)
    architecture = checkpoint.family.architecture(checkpoint.config)
    parts = architecture.position_parts
    specs = {
        "ids": InputSpec([-1, -1], "int64", "ids"),
        "positions": InputSpec([parts, -1, -1], "int64", "positions"),
        "keys": InputSpec([-1, -1], "int64", "keys"),
        "visible": InputSpec([-1, 1, -1, -1], "bool", "visible"),
        "targets": InputSpec([-1, -1], "int64", "targets"),
        "stretch": InputSpec([-1], "float32", "stretch"),
        "chosen": InputSpec([-1], "int64", "chosen"),
    }
    heads = (layer.kv_heads, -1) if layer.heads_first else (-1, layer.kv_heads)
    cache = [
        InputSpec([-1, *heads, shape.head_dim], prepared.dtype, f"cache_{number}") for number in range(2 * shape.layers)
    ]
    inputs = [specs[name] for name in layer.inputs]
    traced = paddle.jit.to_static(layer.forward, input_spec=[inputs, cache], full_graph=True)
    with _views_are_copies():
        paddle.jit.save(traced, str(folder / STEM))
    for name in (PROGRAM, WEIGHTS):
        _check_room(folder / name)


@contextmanager
def _views_are_copies() -> Iterator[None]:
    """Tells the tracer that what is overwritten shares no memory: what could be a view of it where operators run at
    once is a copy in a program, and `utils.kernels.in_place` is only given what nothing else uses."""
    name = "stride_in_no_check_dy2st_diff"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check_room(path: Path) -> None:
    """Raises `OSError` if a file cannot grow: Paddle writes it without asking whether all of it found room."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size)
        file.write(os.urandom(_PROBED))
        file.flush()
        os.fsync(file.fileno())
        file.truncate(size)


def check_target(output: Path) -> None:
    """Raises `UserError` unless `output` is free, or an earlier export that may be replaced and is not read-only."""
    _check_name(output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not is_export(output) or not holds_nothing_else(output):
        raise UserError(f"{output}: is there already and holds more than an earlier export; name a new folder")
    check_replaceable([output])


def _check_name(folder: Path) -> None:
    """Raises `UserError` for the name of a folder under which Paddle keeps no program."""
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{folder}: Paddle writes and reads programs only under names in UTF-8; give the folder another name"
        ) from None


def check_same_kind(checkpoint: Checkpoint, manifest: Manifest, inference_model: bool) -> None:
    """Raises `UserError` where --inference_model says otherwise than the export."""
    if manifest.inference_model != inference_model:
        advice = "add --inference_model" if manifest.inference_model else "leave --inference_model out"
        kind = "with" if manifest.inference_model else "without"
        raise UserError(f"{checkpoint.folder}: was exported {kind} --inference_model; {advice}, or export it again")


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _command(output: str, processes: int, model: str = "MODEL") -> str:
    model, output = shlex.quote(model), shlex.quote(output)
    return f"{python(processes)} export_model.py --model_name_or_path {model} --output_path {output}"


def _flag(inference_model: bool) -> str:
    return " --inference_model" if inference_model else ""


def python(processes: int) -> str:
    """How as many processes are started, for messages."""
    return "python" + (f" -u -m paddle.distributed.launch --nproc_per_node {processes}" if processes > 1 else "")


def run_command(output: Path, layout: Layout, inference_model: bool) -> str:
    """The command that answers with an export, for messages."""
    return (
        f"{python(layout.tensor)} predictor.py --model_name_or_path {shlex.quote(str(output))} --mode static"
        f"{_flag(inference_model)} --data_file ./data/dev.json"
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
