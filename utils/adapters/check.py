"""Files of adapters, found and read by type before any weights load, so no Paddle here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.checkpoints.fingerprint import fingerprint, same_base
from utils.checkpoints.locate import Checkpoint
from utils.checkpoints.match import some
from utils.checkpoints.tensors import LazyTensor, is_finite
from utils.errors import UserError
from utils.settings import Table, read_json, shown, typed

LORA_CONFIG = "lora_config.json"
PREFIX_CONFIG = "prefix_config.json"
SHOWN_FAULTS = 5
WEIGHTS = {LORA_CONFIG: "lora_model_state", PREFIX_CONFIG: "prefix_model_state"}


def adapter_weights(folder: Path, config_name: str) -> Path:
    """The weights file of an adapter folder: safetensors, or the .pdparams of earlier toolchains.

    Raises:
        UserError: there is none.
    """
    stem = WEIGHTS[config_name]
    for suffix in (".safetensors", ".pdparams"):
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    if any(folder.glob(f"{stem}.tp*")):
        raise UserError(
            f"{folder}: holds the shards of an adapter ({stem}.tp00...); save it whole with the tool that trained it "
            "(PaddleNLP: save_pretrained with merge_tensor_parallel)"
        )
    raise UserError(f"{folder}: has {config_name} but neither {stem}.safetensors nor {stem}.pdparams")


def read_config(
    file: Path, table: Table, *, needed: Collection[str], harmless: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """The configuration of an adapter, its known keys in their own types, and what is wrong with it.

    A key that is neither known nor harmless may change what the adapter computes: it is a fault unless its value
    turns it off (null, false, 0, empty, "none").

    Args:
        table: the keys that are honoured.
        needed: which of them must be there.
        harmless: keys that change nothing of what the adapter computes.

    Raises:
        UserError: the file cannot be read or holds no JSON object.
    """
    config, faults = typed(table, read_json(file), str(file))
    wrong = {fault.removeprefix(f"{file}: ").split(" ", 1)[0] for fault in faults}
    faults += [f"{file}: {name} is missing" for name in needed if name not in config and name not in wrong]
    faults += [
        f"{file}: {name} is set ({shown(value)}), and what such an adapter computes is not known here; merge it into "
        "its base with the tool that trained it, and name the merged model"
        for name, value in config.items()
        if name not in table and name not in harmless and value and value != "none"
    ]
    return config, faults


def base_faults(folder: Path, config: Mapping[str, Any], base: Checkpoint) -> list[str]:
    """Says so if an adapter was trained on another base.

    Adapters written by this toolchain carry the fingerprint of their base. Others do not; what does not fit them
    shows up in the shapes of their weights.
    """
    wanted = config.get("base_fingerprint")
    if not wanted or same_base(wanted, fingerprint(base)):
        return []
    return [
        f"{folder}: this adapter was trained on another base ({config.get('base_model_name_or_path')}), "
        f"not on {base.name}; give that model as model_name_or_path"
    ]


def value_faults(path: Path, tensors: Iterable[tuple[str, LazyTensor]]) -> list[str]:
    """Names the tensors that hold NaN or infinity; reads all of them, and adapters are small.

    Args:
        path: the file that they come from, for messages.
        tensors: name in the file; the tensor.
    """
    bad = [name for name, tensor in tensors if not is_finite(tensor.read())]
    advice = "its training went wrong; take an earlier checkpoint of it, or train it again with a lower learning rate"
    return [f"{path}: holds NaN or infinity in {some(bad)}; {advice}"] if bad else []


def misfits(path: Path, wanted: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> list[str]:
    """Compares the shapes of stored tensors with those of the parameters that wait for them, both by name.

    Args:
        path: where the tensors come from, for messages.
    """
    faults = [f"{path}: has no {name}" for name in wanted if name not in found]
    faults += [f"{path}: {name} belongs to no layer of this model" for name in found if name not in wanted]
    faults += [
        f"{path}: {name} has shape {list(shape)}, this model needs {list(wanted[name])}"
        for name, shape in found.items()
        if name in wanted and list(shape) != list(wanted[name])
    ]
    if len(faults) > SHOWN_FAULTS:
        faults[SHOWN_FAULTS:] = [f"{path}: and {len(faults) - SHOWN_FAULTS} more like these; is it another base's?"]
    return faults
