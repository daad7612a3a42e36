"""Exact resume: everything that decides the next step's loss, in files that hold data only (no pickle)."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.checkpoints.files import is_complete, remove, write_json
from utils.checkpoints.locate import stored_tensors
from utils.checkpoints.tensors import LazyTensor
from utils.errors import UserError
from utils.training.record import PROGRESS, Types, is_count, is_number, is_run, read_object, wrong
from utils.training.step_metrics import SUMS

if TYPE_CHECKING:
    from utils.parallel.sharding import Share
    from utils.partition.tensor import ShardPlan

OPTIMIZER = "optimizer"
STATE = "trainer_state.json"
MASTER = "master"  # accumulator of the float32 copy of a parameter in half precision
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_random(value: object) -> bool:
    """Of `random_state`."""
    sizes = {"python": 3, "numpy": 5, "paddle": None, "device": None}
    return isinstance(value, dict) and all(
        isinstance(part := value.get(name), list) and size in (None, len(part)) for name, size in sizes.items()
    )


def _is_metrics(value: object) -> bool:
    names = (*SUMS, "seconds")
    return isinstance(value, dict) and all(is_number(value.get(name)) for name in names)


def _is_scaler(value: object) -> bool:
    """Of `LossScaler.to_json`."""
    return (
        isinstance(value, dict)
        and isinstance(scale := value.get("scale"), list)
        and len(scale) == 1
        and is_number(scale[0])
        and is_count(value.get("incr_count"))
    )


def _is_stream(value: object) -> bool:
    """Of `StreamDataset.state_after`."""
    from utils.data.stream import Position

    if not isinstance(value, dict) or not isinstance(value.get("position"), dict):
        return False
    files, place = value.get("files"), value["position"]
    return (
        place.keys() <= {field.name for field in fields(Position)}
        and all(map(is_count, place.values()))
        and is_count(value.get("items"))
        and "seed" in value
        and isinstance(files, list)
        and all(isinstance(file, list) for file in files)
    )


_TYPES: Types = {
    "global_step": is_count,
    "run": is_run,
    "scheduler": _is_object,
    "random": _is_random,
    "total_loss": is_number,
    "total_targets": is_number,
    "total_tokens": is_number,
    "window": _is_metrics,
}
_TYPES_IF_THERE: Types = {  # which not every run or version writes
    "stream": _is_stream,
    "train_seconds": is_number,
    "evaluation": lambda value: value is None or isinstance(value, dict),
    "random_of_other_ranks": lambda value: isinstance(value, list) and all(map(_is_random, value)),
    "scaler": _is_scaler,
    "scale": is_number,
}


def is_checkpoint(path: Path) -> bool:
    """Whether a path has the name of a checkpoint, good or not."""
    return _CHECKPOINT.match(path.name) is not None


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(load_progress(checkpoint)["global_step"])


def is_good(folder: Path) -> bool:
    """Whether a folder is a checkpoint with all of its files, and those that decide how to go on can be read."""
    try:
        load_progress(folder)
    except UserError:
        return False
    return True


def checkpoints(output_dir: Path) -> list[Path]:
    """The good checkpoints of a run, oldest first."""
    named = [(int(match[1]), path) for path in output_dir.glob("*") if (match := _CHECKPOINT.match(path.name))]
    return [path for _, path in sorted(named) if is_good(path)]


def last_good(output_dir: Path) -> str:
    """The newest good checkpoint of a run in words, for messages."""
    good = checkpoints(output_dir)
    return f"{good[-1]} is the last good checkpoint" if good else "no checkpoint had been saved yet"


def delete_old(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Keeps the newest `limit` checkpoints (None or a negative number: all) and the one named `best`."""
    if limit and limit > 0:
        for folder in checkpoints(output_dir)[:-limit]:
            if folder.name != best:
                remove(folder)


def incomplete(output_dir: Path) -> list[Path]:
    """Folders with a checkpoint's name that are none: files are missing, cut short or damaged."""
    return sorted(path for path in output_dir.glob("checkpoint-*") if is_checkpoint(path) and not is_good(path))


def optimizer_tensors(
    optimizer: Any, parameters: Mapping[str, Any], shard_plan: ShardPlan, share: Share | None = None
) -> list[LazyTensor]:
    """What the optimizer keeps, as whole tensors "PARAMETER|ACCUMULATOR" (accumulators: moments, powers, master
    weights).

    Args:
        parameters: the trained ones by their names in files. Paddle's internal names depend on how many layers
            the process built before.
        share: with sharding; reading is then an exchange with the other ranks that share.
    """
    tensors = []
    if share is not None:
        named = {id(parameter): name for name, parameter in parameters.items()}
        for accumulator in share.accumulators():
            name = named[id(share.trained[accumulator.parameter])]
            own = LazyTensor(
                f"{name}|{accumulator.name}", "float32", accumulator.shape, partial(share.read, accumulator)
            )
            tensors.append(shard_plan.joined(name, own))
        return tensors
    names = {parameter.name: name for name, parameter in parameters.items()}
    for key, value in optimizer.state_dict().items():
        if key == "LR_Scheduler":
            continue
        entries = {f"{k}|{MASTER}": v for k, v in value.items()} if key == "master_weights" else {key: value}
        for entry, tensor in entries.items():
            internal = max((n for n in names if entry.startswith((f"{n}_", f"{n}|"))), key=len)
            name = names[internal]
            tensors.append(shard_plan.whole(name, tensor, key=f"{name}|{entry[len(internal) + 1 :]}"))
    return tensors


def load_optimizer(
    folder: Path, optimizer: Any, parameters: Mapping[str, Any], shard_plan: ShardPlan, share: Share | None = None
) -> None:
    """Fills the optimizer from what `optimizer_tensors` gave, in this run's precision or in another.

    A parameter that is float32 now takes the value of its copy, which is more exact than that of a half one.

    Raises:
        UserError: the file holds the state of what this run does not train.
    """
    import paddle

    from utils.parallel.states import OF_MASTER, OptimizerStates

    states = OptimizerStates(optimizer) if share is None else share.states
    accumulators = (
        {} if share is None else {(id(share.trained[one.parameter]), one.name): one for one in share.accumulators()}
    )
    state: dict[str, Any] = {}
    for key, stored in stored_tensors(folder, OPTIMIZER).items():
        name, accumulator = key.split("|")
        name = name.removeprefix("base.").removeprefix("prefix.encoder.")  # as earlier versions wrote them
        if not shard_plan.here(name):
            continue
        if name not in parameters:
            raise UserError(f"{folder / OPTIMIZER}: holds the state of {name}, which this run does not train")
        values, parameter = np.ascontiguousarray(shard_plan.part(name, stored).read()), parameters[name]
        own = states.own_accumulator(accumulator, parameter.dtype)
        if share is not None:
            if own is not None:
                share.write(accumulators[id(parameter), own], values)
        elif own is None:
            parameter.set_value(values)
        elif own == MASTER:
            copy = paddle.to_tensor(values)
            copy.name = f"{parameter.name}_{OF_MASTER.removesuffix('_')}"  # the optimizer looks for its moments by it
            state.setdefault("master_weights", {})[parameter.name] = copy
        else:
            state[f"{parameter.name}_{own}"] = paddle.to_tensor(values)
    if share is None:
        optimizer.set_state_dict(state)


def random_state() -> dict[str, Any]:
    """The state of every generator that training draws from, as JSON values."""
    import paddle

    kind, key, position, has_gauss, gauss = np.random.get_state(legacy=True)
    python = random.getstate()
    return {
        "python": [python[0], list(python[1]), python[2]],
        "numpy": [kind, [int(k) for k in key], int(position), int(has_gauss), float(gauss)],
        "paddle": [_generator_values(state) for state in paddle.get_rng_state("cpu")],
        "device": [_generator_values(state) for state in paddle.get_rng_state()],
    }


def set_random_state(saved: Mapping[str, Any]) -> None:
    """Restores what `random_state` returned."""
    import paddle

    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, key, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((kind, np.array(key, dtype=np.uint32), position, has_gauss, cached))
    paddle.set_rng_state([_generator_state(values) for values in saved["paddle"]], "cpu")
    paddle.set_rng_state([_generator_state(values) for values in saved["device"]])


def _generator_values(state: Any) -> list[Any]:
    device, seed, offset, engine = state.__getstate__()
    return [device, seed, offset, bytes(engine).decode("ascii")]


def _generator_state(values: list[Any]) -> Any:
    import paddle

    device, seed, offset, engine = values
    state = paddle.base.core.GeneratorState.__new__(paddle.base.core.GeneratorState)
    state.__setstate__((device, seed, offset, list(engine.encode("ascii"))))
    return state


def save_progress(folder: Path, progress: Mapping[str, Any]) -> None:
    """Writes the scheduler, the generators, sums for the averages, and the place in the data."""
    write_json(folder / PROGRESS, dict(progress))


def load_progress(folder: Path) -> dict[str, Any]:
    """What `save_progress` wrote.

    Raises:
        UserError: `folder` is no checkpoint of a training run, or its progress file is broken.
    """
    path = folder / PROGRESS
    if not path.is_file() or not is_complete(folder):
        raise UserError(
            f"resume_from_checkpoint {folder}: is no complete checkpoint of this toolchain (it has no {PROGRESS}); "
            "give a checkpoint-N folder, or leave the option out to continue from the last good one"
        )
    advice = "give another checkpoint, or leave the option out to continue from the last good one"
    read_object(folder / STATE, advice)
    progress = read_object(path, advice)
    types = {**_TYPES, **{name: right for name, right in _TYPES_IF_THERE.items() if name in progress}}
    faults = wrong(progress, types)
    if not faults and progress["run"].get("lazy") and "stream" not in progress:
        faults = ["it lacks stream"]
    if faults:
        raise UserError(f"{path}: is damaged, {', '.join(faults)}; {advice}")
    return progress
