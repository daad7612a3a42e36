"""The shards of a tensor-parallel run merged into one checkpoint, parameter by parameter. No Paddle.

Each process of such a run stores its share of every layer in a file of its own, `model_state.tpNN.pdparams` or
`model.tpNN.safetensors`; with pipeline stages there is one per stage, `model_state.tpNN_ppMM.pdparams`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.checkpoints.companions import GENERATION_CONFIG, has_tokenizer, write_companions
from utils.checkpoints.files import (
    COMPLETE,
    atomic_directory,
    atomic_write,
    check_replaceable,
    renew_sizes,
    staging_folder,
    write_json,
)
from utils.checkpoints.heads import HEAD_NAMES
from utils.checkpoints.locate import Checkpoint, locate, shard_files
from utils.checkpoints.match import match, some
from utils.checkpoints.merge import check_target
from utils.checkpoints.save import MAX_SHARD_BYTES, write_model
from utils.checkpoints.shards import axis_of, join, runs
from utils.checkpoints.tensors import LazyTensor, cast, open_tensors
from utils.errors import UserError, notice, raise_if
from utils.families.config import COMMON
from utils.model.weights import Weight
from utils.settings import FLAG, TEXTS, Table, read_json, typed

MERGE_RECORD = "merge_tp.json"  # what was merged; also marks what another merge may replace
TRAINED_CONFIG = "config.tensor_parallel.json"  # the config.json of the shards, after a merge beside them
# Keys of config.json that describe how the run was spread over processes, not the model.
PARALLEL_KEYS = (
    "tensor_parallel_degree",
    "tensor_parallel_rank",
    "tensor_parallel_output",
    "pipeline_parallel_degree",
    "sep_parallel_degree",
    "context_parallel_degree",
    "sequence_parallel",
    "fuse_sequence_parallel_allreduce",
)
_PLACE = re.compile(r"\.(?:tp(\d+))?_?(?:pp(\d+))?\.")
_WEIGHTS = re.compile(r"(model|model_state|pytorch_model)([.-].*)?\.(safetensors|pdparams|bin)(\.index\.json)?")
_SAMPLE = 65_536  # values compared of a parameter that all processes hold
_WRITTEN = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
# Processes compute what they share from the same sums; half precision rounds the last step in several ways.
_TOLERANCES = {"float32": 1e-3, "float64": 1e-3, "float16": 4e-3, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Shards:
    """The shards of one run, checked: none is missing, all fit config.json.

    Attributes:
        checkpoint: the folder; its config is the one of the whole model, without PARALLEL_KEYS.
        files: of all processes.
        tensors: the whole parameters in the Paddle layout, in the family's order; joined when read.
    """

    checkpoint: Checkpoint
    degree: int
    files: tuple[Path, ...]
    tensors: tuple[tuple[Weight, LazyTensor], ...]


def merge_tp(
    folder: Path,
    target: Path | None = None,
    *,
    export_format: str = "paddle",
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Writes the shards in `folder` as one ordinary model.

    One parameter is in memory at a time.

    Args:
        target: a new folder, which appears complete or not at all, with tokenizer and template. None merges
            beside the shards; there the former config.json is kept as `TRAINED_CONFIG`.
        dtype: the type to store; None keeps that of each tensor.

    Returns:
        The files of tensors.

    Raises:
        UserError: shards that are missing, damaged, of several runs or of another model, or a target that
            holds anything but an earlier merge. Nothing is written then.
    """
    beside = target is None or target.resolve() == folder.resolve()
    if not beside and target is not None:
        check_target(target, MERGE_RECORD, (folder,))
    shards = open_shards(folder)
    earlier = _earlier(folder) if beside else []
    if beside:
        check_replaceable(folder / name for name in ("config.json", MERGE_RECORD, COMPLETE, *earlier))
    checkpoint = shards.checkpoint
    tensors = [(weight, _typed(tensor, dtype)) for weight, tensor in shards.tensors]
    record = {"shards": [file.name for file in shards.files], "tensor_parallel_degree": shards.degree}
    layout = (checkpoint.family, checkpoint.config, export_format, max_shard_bytes)
    if beside or target is None:
        with staging_folder(folder / "merged") as staging:  # an earlier merge stays until the new one is on disk
            files = write_model(staging, tensors, *layout)
            _put_beside(folder, staging, record, earlier)
        write_json(folder / MERGE_RECORD, {**record, "files": _weight_files(folder)})
        renew_sizes(folder)  # config.json has changed; a run can still continue from the shards
        return [folder / file.name for file in files]
    with atomic_directory(target) as staging:
        if has_tokenizer(checkpoint.folder, checkpoint.family):
            write_companions(checkpoint, checkpoint.folder, staging)
        else:
            notice(f"{folder} holds no tokenizer; copy the one that the model was trained with into {target}")
        write_json(staging / MERGE_RECORD, {**record, "source": str(folder)})
        files = write_model(staging, tensors, *layout)
    return [target / file.name for file in files]


def open_shards(folder: Path) -> Shards:
    """The shards in a folder, checked; hardly any values are read.

    Raises:
        UserError: see `merge_tp`.
    """
    located = locate(folder, allow_network=False, weights=False)
    trained = _read_trained(folder, located.config)
    config = {name: value for name, value in located.config.items() if name not in PARALLEL_KEYS}
    checkpoint = replace(located, config=config, layout="paddle")
    places = _places(folder, int(trained.get("tensor_parallel_degree") or 1))
    degree = len(places)
    stored: list[dict[str, LazyTensor]] = []
    for files in places:
        found: dict[str, LazyTensor] = {}
        for file in files:
            found.update(open_tensors(file))
        stored.append(found)
    heads = _tied_heads(checkpoint, stored)
    parts = _matched(checkpoint, places, stored)
    if _differ(checkpoint, heads, parts):
        checkpoint = _untied(checkpoint, heads, stored)
        parts = _matched(checkpoint, places, stored)
    tensors = _whole(checkpoint, places, parts)
    return Shards(checkpoint, degree, tuple(file for files in places for file in files), tuple(tensors))


def _matched(
    checkpoint: Checkpoint, places: list[list[Path]], stored: list[dict[str, LazyTensor]]
) -> list[dict[str, LazyTensor]]:
    """The parameters of each process, by name."""
    parts = []
    for files, found in zip(places, stored, strict=True):
        try:
            parts.append({name: tensor for name, (tensor, _) in match(checkpoint, found).items()})
        except UserError as error:
            said = str(checkpoint.folder)
            raise UserError([fault.replace(said, str(files[0]), 1) for fault in error.faults]) from error
    return parts


def _places(folder: Path, trained_degree: int) -> list[list[Path]]:
    """The files of each tensor-parallel process, by stage."""
    files = shard_files(folder)
    strange = sorted({file.name for file in folder.glob("model_state.tp*.pdparams")} - {file.name for file in files})
    if strange:
        raise UserError(
            f"{folder}: {some(strange)}: only shards of tensor-parallel processes (tpNN) and pipeline stages (ppNN) "
            "are merged; save the checkpoint without other sharding"
        )
    if not files:
        raise UserError(
            f"{folder}: holds no tensor-parallel shards (model_state.tp00.pdparams, ...); name the folder of a "
            "checkpoint that was saved in shards; any other model is used as it is"
        )
    if len({file.suffix for file in files}) > 1:
        kinds = " and ".join(sorted({f"*{file.suffix}" for file in files}))
        raise UserError(f"{folder}: holds shards as {kinds}; move those of one kind elsewhere")
    found: dict[tuple[int, int], Path] = {}
    staged = set()
    for file in files:
        process, stage = _place(file)
        staged.add(stage is not None)
        found[process or 0, stage or 0] = file
    if len(staged) > 1:
        raise UserError(
            f"{folder}: holds shards with and without pipeline stages (ppNN); move those of one run elsewhere"
        )
    degree, stages = (max(place[axis] for place in found) + 1 for axis in (0, 1))
    if 1 < trained_degree < degree:
        raise UserError(
            f"{folder}: config.json says tensor_parallel_degree {trained_degree}, but {found[max(found)].name} is "
            "there; shards of two runs lie together"
        )
    degree = max(degree, trained_degree)
    wanted = [(process, stage) for process in range(degree) for stage in range(stages)]
    missing = [_name(files[0], place, staged == {True}) for place in wanted if place not in found]
    if missing:
        raise UserError(
            f"{folder}: {some(missing)} of {len(wanted)} shards {'is' if len(missing) == 1 else 'are'} missing; "
            "copy the shards of all processes into this folder"
        )
    return [[found[process, stage] for stage in range(stages)] for process in range(degree)]


def _place(file: Path) -> tuple[int | None, int | None]:
    """(tensor-parallel process, pipeline stage) of a shard."""
    found = _PLACE.search(file.name)
    if found is None:  # `shard_files` lists no others
        raise ValueError(file.name)
    process, stage = found.groups()
    return None if process is None else int(process), None if stage is None else int(stage)


def _name(example: Path, place: tuple[int, int], staged: bool) -> str:
    """The name of another shard of a run."""
    process, stage = _place(example)
    words = [f"tp{place[0]:02d}"] if process is not None else []
    words += [f"pp{place[1]:02d}"] if staged and stage is not None else []
    return f"{example.name.split('.')[0]}.{'_'.join(words)}{example.suffix}"


def _whole(
    checkpoint: Checkpoint, places: list[list[Path]], parts: list[dict[str, LazyTensor]]
) -> list[tuple[Weight, LazyTensor]]:
    """The whole parameters, after all shapes, types and shared values were compared."""
    sizes = checkpoint.family.shape(checkpoint.config)
    known = checkpoint.family.architecture(checkpoint.config).matrices()
    degree = len(parts)
    mixed, foreign, found = [], [], []
    whole: dict[str, tuple[int, ...]] = {}
    for weight in checkpoint.family.weights(checkpoint.config):
        name = weight.parameter
        own = [part[name] for part in parts]
        kinds = {(tensor.shape, tensor.dtype) for tensor in own}
        if len(kinds) > 1:
            mixed.append(f"{name} ({', '.join(sorted(f'{list(shape)} {dtype}' for shape, dtype in kinds))})")
            continue
        shape = _whole_shape(weight, own[0].shape, degree, known.get(name), whole)
        axis = axis_of(weight.split, len(shape))
        try:
            fits = len(shape) == len(own[0].shape)
            held = own[0].shape[axis] if fits else 0
            for rank in range(degree):
                runs(weight.split, shape[axis], held, sizes, degree, rank)
            fits = fits and own[0].shape == (*shape[:axis], held, *shape[axis + 1 :])
        except ValueError:
            fits = False
        if not fits:
            foreign.append(f"{name} is {list(own[0].shape)} in each of {degree} shards, expected {list(shape)} in all")
            continue
        if str(weight.split).startswith("vocabulary") and shape[axis] < held * degree and held < shape[axis]:
            notice(f"{name}: {held * degree - shape[axis]} padded entries behind the vocabulary are left out")
        whole[name] = shape
        found.append((weight, _joined(weight, own, shape, checkpoint)))
    first = places[0][0].parent
    if mixed:
        raise UserError(f"{first}: shards of several runs lie together: they differ in {some(mixed)}")
    if foreign:
        raise UserError(f"{first}: the shards do not belong to config.json, or are not all of a run: {some(foreign)}")
    raise_if(_disagreements(first, found, parts))
    return found


def _whole_shape(
    weight: Weight,
    part: tuple[int, ...],
    degree: int,
    known: tuple[int, int] | None,
    whole: Mapping[str, tuple[int, ...]],
) -> tuple[int, ...]:
    """The shape of a parameter: as config.json says, else as its matrix or its parts say."""
    if known is not None:
        return known
    if weight.split is None:
        return part
    matrix = whole.get(weight.parameter.removesuffix(".bias") + ".weight")
    if matrix is not None:
        return (matrix[-1],)
    axis = axis_of(weight.split, len(part))
    return (*part[:axis], part[axis] * degree, *part[axis + 1 :])


def _joined(weight: Weight, parts: list[LazyTensor], shape: tuple[int, ...], checkpoint: Checkpoint) -> LazyTensor:
    sizes = checkpoint.family.shape(checkpoint.config)

    def read() -> np.ndarray:
        return join((part.read() for part in parts), weight.split, shape, sizes, len(parts))

    return LazyTensor(weight.parameter, parts[0].dtype, shape, read)


def _disagreements(
    folder: Path, found: list[tuple[Weight, LazyTensor]], parts: list[dict[str, LazyTensor]]
) -> list[str]:
    """Parameters that processes hold alike, but with other values."""
    unlike: list[str] = []
    trained_apart: list[str] = []
    for weight, tensor in found:
        own = [part[weight.parameter] for part in parts]
        if len(own) == 1 or own[0].shape != tensor.shape:
            continue
        if not all(_alike(own[0], other) for other in own[1:]):
            (trained_apart if weight.split == "key_value" else unlike).append(weight.parameter)
    faults = []
    if unlike:
        faults.append(
            f"{folder}: shards of several runs or steps lie together: values that all processes hold differ in "
            f"{some(unlike)}"
        )
    if trained_apart:
        faults.append(
            f"{folder}: the copies of {some(trained_apart)}, which every process holds because the degree does not "
            "divide the heads, were trained apart; no single model computes the same: train with a lower degree"
        )
    return faults


def _alike(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two copies have the same values, up to the last steps of rounding; samples big ones."""
    first, second = one.read().reshape(-1), other.read().reshape(-1)
    step = max(1, first.size // _SAMPLE)
    sampled = [cast(np.ascontiguousarray(values[::step]), "float32") for values in (first, second)]
    room = _TOLERANCES.get(one.dtype, 0.0) * float(np.abs(sampled[0]).max(initial=0.0))
    return bool(np.abs(sampled[0] - sampled[1]).max(initial=0.0) <= room)


def _tied_heads(checkpoint: Checkpoint, stored: list[dict[str, LazyTensor]]) -> list[LazyTensor]:
    """Takes the head out of the shards of a model whose head is its embedding."""
    family = checkpoint.family
    if not family.shape(checkpoint.config).tied:
        return []
    return [found.pop(name) for found in stored for name in HEAD_NAMES if name in found]


def _differ(checkpoint: Checkpoint, heads: list[LazyTensor], parts: list[dict[str, LazyTensor]]) -> bool:
    """Whether the shards hold heads that are no second copy of the embedding."""
    if len(heads) != len(parts):
        return False
    name = f"{checkpoint.family.architecture(checkpoint.config).embedding}.weight"
    for head, part in zip(heads, parts, strict=True):
        table = part[name]
        if head.shape[0] > table.shape[0]:  # whole in every process
            head, table = _rows(head, table.shape[0]), parts[0][name]
        if head.shape != table.shape or not _alike(head, table):
            return True
    return False


def _untied(checkpoint: Checkpoint, heads: list[LazyTensor], stored: list[dict[str, LazyTensor]]) -> Checkpoint:
    """The checkpoint with a head of its own, which is put back into the shards as its family keeps it."""
    family, untied = checkpoint.family, {**checkpoint.config, "tie_word_embeddings": False}
    architecture, said = family.architecture(untied), f"{checkpoint.folder}: the shards hold {heads[0].name} with other"
    if architecture.head is None:
        raise UserError(
            f"{said} values than the embedding, which is the head of a {family.title} model; copy them again"
        )
    notice(f"{said} values than the embedding, so it is a head of its own, although tie_word_embeddings ties them")
    for found, head in zip(stored, heads, strict=True):
        transposed = not architecture.head_is_table and head.shape[-1] == architecture.shape.hidden
        found[architecture.head] = _transposed(head) if transposed else head
    return replace(checkpoint, config=untied)


def _transposed(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor.name, tensor.dtype, tensor.shape[::-1], lambda: tensor.read().T)


def _rows(tensor: LazyTensor, count: int) -> LazyTensor:
    """The first rows of a table."""
    return LazyTensor(tensor.name, tensor.dtype, (count, *tensor.shape[1:]), lambda: tensor.read()[:count])


def _typed(tensor: LazyTensor, dtype: str | None) -> LazyTensor:
    if dtype is None or tensor.dtype == dtype:
        return tensor
    return LazyTensor(tensor.name, dtype, tensor.shape, lambda: cast(tensor.read(), dtype))


# --- beside the shards ------------------------------------------------------------------------------


def _read_trained(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the run, which an earlier merge may have put aside."""
    return _read_beside(folder / TRAINED_CONFIG, COMMON) if (folder / TRAINED_CONFIG).exists() else config


def _read_beside(file: Path, table: Table) -> dict[str, Any]:
    """What a merge wrote beside the shards.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    known, faults = typed(table, read_json(file), str(file))
    raise_if(faults)
    return known


def _weight_files(folder: Path) -> list[str]:
    """The weights of a whole model in a folder."""
    shards = {file.name for file in shard_files(folder)}
    return sorted(file.name for file in folder.iterdir() if _WEIGHTS.fullmatch(file.name) and file.name not in shards)


def _earlier(folder: Path) -> list[str]:
    """What an earlier merge left beside the shards.

    Raises:
        UserError: there are weights that are not of an earlier merge, or its record cannot be read.
    """
    file = folder / MERGE_RECORD
    record = _read_beside(file, {"files": TEXTS, "unfinished": FLAG}) if file.exists() else {}
    present = _weight_files(folder)
    files = record.get("files", [])
    known = {files} if isinstance(files, str) else set(files)
    if record.get("unfinished"):  # interrupted: nothing stood there when it began
        known |= {name for name in present if _WRITTEN.fullmatch(name)}
    foreign = [name for name in present if name not in known]
    if foreign:
        raise UserError(
            f"{folder}: holds {some(foreign)} beside the shards, which is no earlier merge; "
            "name a new folder with --merge_model_path"
        )
    return present


def _put_beside(folder: Path, staging: Path, record: dict[str, Any], earlier: list[str]) -> None:
    """Moves a merged model into the folder of its shards, which stay, as do their config.json and settings of
    generation; an earlier merge goes."""
    write_json(folder / MERGE_RECORD, {**record, "unfinished": True})
    if not (folder / TRAINED_CONFIG).exists():
        atomic_write(folder / TRAINED_CONFIG, (folder / "config.json").read_bytes())
    for name in sorted(earlier, key=lambda name: not name.endswith(".index.json")):
        (folder / name).unlink()
    for path in sorted(staging.iterdir(), key=lambda path: (path.name == "config.json", path.name)):  # it counts last
        if path.name != COMPLETE and not (path.name == GENERATION_CONFIG and (folder / path.name).exists()):
            os.replace(path, folder / path.name)
