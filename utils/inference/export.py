"""Writing exported models: one static program with the cache as its input, in a folder that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from utils.checkpoints.companions import GENERATION_CONFIG
from utils.checkpoints.files import COMPLETE, atomic_directory, check_replaceable, holds_nothing_else, write_json
from utils.checkpoints.tensors import write_safetensors
from utils.errors import UserError
from utils.inference.loading import Prepared, engine_of, load_program
from utils.inference.manifest import (
    FORMAT,
    MANIFEST,
    PREFIX_CACHE,
    PROGRAM,
    STEM,
    WEIGHTS,
    Manifest,
    check_name,
    is_export,
    own_folder,
    paddle_version,
    sha256,
)
from utils.parallel.process_group import ProcessGroup
from utils.settings import read_json

if TYPE_CHECKING:
    from utils.inference.engine import Engine

_PROBED = 1 << 16  # bytes, see `_check_room`


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
    processes = prepared.processes
    with _staged(output, processes) as staging:
        layer, prefix = load_program(prepared, device, merged=True)
        own = own_folder(staging, processes.layout)
        own.mkdir(exist_ok=True)
        save_program(layer, own, prepared.dtype)
        if prefix is not None:
            write_safetensors(own / PREFIX_CACHE, [("prefix", prefix)], {"format": "np"})
        processes.barrier("waiting for the programs of all processes")
        if processes.first:
            _describe(staging, prepared, layer, prefix)
        processes.barrier("waiting for the description of the programs")
        verify(staging, engine_of(prepared, layer, prefix), prepared, device)


@contextmanager
def _staged(output: Path, processes: ProcessGroup) -> Iterator[Path]:
    """The folder that all processes fill; it becomes `output` when all have ended the block well."""
    made = atomic_directory(output) if processes.first else nullcontext(output)
    with made as staging:
        yield Path(processes.from_first(lambda: str(staging), "waiting for the folder of the export"))
        processes.barrier("waiting for the programs of other processes")
    processes.barrier("waiting for the end of the export")


def _describe(staging: Path, prepared: Prepared, layer: Any, prefix: NDArray[np.float32] | None) -> None:
    """Writes all that lies beside the programs."""
    checkpoint, processes = prepared.checkpoint, prepared.processes
    write_json(staging / "config.json", checkpoint.config)
    prepared.tokenizer.save(staging)
    prepared.template.save(staging)
    if (checkpoint.folder / GENERATION_CONFIG).is_file():
        settings = read_json(checkpoint.folder / GENERATION_CONFIG)
        write_json(staging / GENERATION_CONFIG, settings)
    adapters = {"LoRA": prepared.lora and prepared.lora.folder, "prefix": prepared.prefix}
    source = "".join([checkpoint.name, *(f" with {kind} {path}" for kind, path in adapters.items() if path)])
    manifest = Manifest(
        FORMAT,
        paddle_version(),
        prepared.inference_model,
        prepared.dtype,
        layer.inputs,
        layer.architecture.position_parts,
        layer.cache_shape,
        0 if prefix is None else prefix.shape[2],
        source,
        {
            path.relative_to(staging).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(staging.rglob("*"))
            if path.is_file() and path.name != COMPLETE
        },
        processes.layout.tensor,
        processes.groups.tensor.id if processes.several else 0,
    )
    write_json(staging / MANIFEST, asdict(manifest))


def save_program(layer: Any, folder: Path, dtype: str) -> None:
    """Traces a decoder, plain or fused, of a type and saves it; batch, lengths and cache stay open."""
    import paddle
    from paddle.static import InputSpec

    for parameter in layer.parameters():
        parameter.stop_gradient = True  # else the tracer would take the operators that have gradients
    layers, kv_heads, head_dim = layer.cache_shape
    specs = {
        "ids": InputSpec([-1, -1], "int64", "ids"),
        "positions": InputSpec([layer.architecture.position_parts, -1, -1], "int64", "positions"),
        "keys": InputSpec([-1, -1], "int64", "keys"),
        "visible": InputSpec([-1, 1, -1, -1], "bool", "visible"),
        "targets": InputSpec([-1, -1], "int64", "targets"),
        "stretch": InputSpec([-1], "float32", "stretch"),
        "chosen": InputSpec([-1], "int64", "chosen"),
    }
    cache = [InputSpec([-1, kv_heads, -1, head_dim], dtype, f"cache_{number}") for number in range(2 * layers)]
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
    check_name(output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not is_export(output) or not holds_nothing_else(output):
        raise UserError(f"{output}: is there already and holds more than an earlier export; name a new folder")
    check_replaceable([output])
