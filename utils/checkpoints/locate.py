"""From the name of a model to a checkpoint that is known to be whole.

Everything here happens before any weight is read, and without Paddle.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from utils.checkpoints import embedded, quantized
from utils.checkpoints.heads import with_own_head
from utils.checkpoints.tensors import LazyTensor, open_tensors, safetensors_header
from utils.errors import UserError, raise_if
from utils.families import FAMILIES, FamilySpec, family_of
from utils.model.architecture import Architecture
from utils.settings import read_json

Layout = Literal["hf", "paddle"]
ADAPTER_FILES = ("lora_config.json", "adapter_config.json", "prefix_config.json")
# file name of one-file weights, of the index of sharded ones; the first kind found is taken
_KINDS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ("model_state.pdparams", "model_state.pdparams.index.json"),
)
_SHARD = re.compile(r"(model_state|model)\.(tp\d+|pp\d+|tp\d+_pp\d+)\.(pdparams|safetensors)")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Checkpoint:
    """A model folder that was checked: its files are there and a family knows it.

    Attributes:
        name: what the user called it.
        folder: where it is.
        config: its config.json, see `FamilySpec.read_config`; untied where a head of its own is stored.
        family: the family that it belongs to.
        layout: "hf" has published tensor names and Linear weights [out, in]; "paddle" has the names
            of the Paddle model and [in, out].
        files: its tensor files, in order; none where only the configuration was asked for.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    family: FamilySpec
    layout: Layout
    files: tuple[Path, ...]

    @property
    def architecture(self) -> Architecture:
        """What its model computes."""
        return self.family.architecture(self.config)

    @property
    def dtype(self) -> str:
        """The floating-point type in which most of its tensors are stored, e.g. "bfloat16"."""
        kinds = Counter(tensor.dtype for tensor in self.tensors().values())
        floating = [kind for kind, _ in kinds.most_common() if kind in ("float32", "float16", "bfloat16")]
        return floating[0] if floating else "float32"

    def tensors(self) -> dict[str, LazyTensor]:
        """All of its tensors by stored name, values not read.

        Raises:
            UserError: a file is damaged or holds anything but tensors.
        """
        found: dict[str, LazyTensor] = {}
        for file in self.files:
            found.update(open_tensors(file))
        return found


def locate(name_or_path: str | Path, *, allow_network: bool = True, weights: bool = True) -> Checkpoint:
    """Finds and checks a model.

    Args:
        name_or_path: a folder; "smollm2-135m-instruct", the embedded default; or a hub id "org/name".
        allow_network: whether a hub id may be downloaded; otherwise only the local hub cache is asked.
        weights: whether they are needed; without, a folder with configuration and tokenizer is enough.

    Raises:
        UserError: nothing is there, files are missing, or no family knows the model.
    """
    name = str(name_or_path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _inspect(name, folder, weights)
    if name == embedded.NAME:
        return _inspect(name, embedded.embedded_folder(), weights)
    if folder.exists():
        raise UserError(f"{name}: is a file; expected the folder of a model")
    is_path = name.startswith((".", "/", "~")) or Path(name.split("/")[0]).exists()
    if is_path or not _HUB_ID.fullmatch(name):
        raise UserError(
            f"{name}: no such folder; expected a model folder, {embedded.NAME}, or a hub id such as org/name"
        )
    return _inspect(name, _hub_folder(name, allow_network, weights), weights)


def _hub_folder(name: str, allow_network: bool, weights: bool) -> Path:
    """The local copy of a hub repository; safetensors are preferred to PyTorch's own files."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    settings = ["*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken"]
    try:
        for pattern in ("*.safetensors", "*.bin") if weights else ("*.json",):
            folder = Path(
                huggingface_hub.snapshot_download(
                    name, allow_patterns=[*settings, pattern], local_files_only=not allow_network
                )
            )
            if any(folder.glob(pattern)):
                break
        return folder
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name}: is no folder here, and the hub could not give it ({reason}); "
            "check the name and the connection, or download the folder and name its path; "
            f"{embedded.NAME} needs no hub"
        ) from error


def read_config(file: Path) -> tuple[dict[str, Any], FamilySpec]:
    """A config.json in its own types (see `FamilySpec.read_config`), and the family that it belongs to.

    Raises:
        UserError: the file cannot be read, no family knows the model, or what it says cannot be.
    """
    config = read_json(file)
    family = family_of(config)
    if family is None:
        known = ", ".join(sorted(kind for spec in FAMILIES.values() for kind in spec.model_types))
        raise UserError(f"{file}: model_type {config.get('model_type')!r} is not known; known are {known}")
    try:
        return family.read_config(config), family
    except UserError as error:
        raise UserError([f"{file}: " + fault.removeprefix("config.json: ") for fault in error.faults]) from error


def _inspect(name: str, folder: Path, weights: bool) -> Checkpoint:
    if not (folder / "config.json").is_file():
        adapter = next((file for file in ADAPTER_FILES if (folder / file).is_file()), None)
        option = "prefix_path" if adapter == "prefix_config.json" else "lora_path"
        is_adapter = f"it holds an adapter, which scripts take as {option}; name its base model here"
        hint = is_adapter if adapter else "expected a model folder"
        raise UserError(f"{folder}: has no config.json; {hint}")
    config, family = read_config(folder / "config.json")
    if weights and (method := quantized.method_of(config)) is not None:
        raise UserError(f"{folder / 'config.json'}: the weights were quantized {method}; {quantized.ADVICE}")
    files = _weight_files(folder) if weights else ()
    layout: Layout = _layout(files, family, config) if files else "paddle"
    found = Checkpoint(name, folder, config, family, layout, files)
    return replace(found, config=with_own_head(folder, config, family, found.tensors())) if files else found


def stored_tensors(folder: Path, stem: str) -> dict[str, LazyTensor]:
    """The tensors of `STEM.safetensors`, or of the files that its index names, values not read.

    Raises:
        UserError: a file is missing or damaged.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if not single.is_file() and not index.is_file():
        raise UserError(f"{folder}: has no {single.name}")
    found: dict[str, LazyTensor] = {}
    for file in _indexed_files(index) if index.is_file() else (single,):
        found.update(open_tensors(file))
    return found


def _weight_files(folder: Path) -> tuple[Path, ...]:
    for single, index in _KINDS:
        if (folder / index).is_file():
            return _indexed_files(folder / index)
        if (folder / single).is_file():
            return (folder / single,)
    if shard_files(folder) or any(folder.glob("model_state.tp*.pdparams")):
        raise UserError(
            f"{folder}: holds the shards of a tensor-parallel run; merge them first: "
            f"python merge_tp_params.py --model_name_or_path {shlex.quote(str(folder))}"
        )
    expected = " or ".join(single for single, _ in _KINDS)
    raise UserError(f"{folder}: holds no weights; expected {expected} (or shards with their index)")


def shard_files(folder: Path) -> list[Path]:
    """The weights of the processes of one run (tensor parallel, and by pipeline stage), sorted by name."""
    return sorted(file for file in folder.iterdir() if _SHARD.fullmatch(file.name))


def _indexed_files(index: Path) -> tuple[Path, ...]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: has no weight_map; download or save the checkpoint again")
    names = list(dict.fromkeys(str(place) for place in places.values()))
    outside = [file for file in names if Path(file).name != file]
    raise_if([f"{index}: names {file}, which is not a file of this folder" for file in outside])
    missing = [file for file in names if not (index.parent / file).is_file()]
    raise_if([f"{index.parent}: {file}, named in {index.name}, is missing; download it" for file in missing])
    return tuple(index.parent / file for file in names)


def _layout(files: Sequence[Path], family: FamilySpec, config: Mapping[str, Any]) -> Layout:
    """By the writer's mark in safetensors files, else by the kind of file, else by the names inside."""
    if files[0].suffix == ".bin":
        return "hf"
    if files[0].suffix == ".pdparams":
        return "paddle"
    tensors, metadata = safetensors_header(files[0])
    written = metadata.get("format")
    if written == "pt":
        return "hf"
    if written in ("np", "pd"):
        return "paddle"
    published = {weight.published for weight in family.weights(config)}
    return "hf" if published & set(tensors) else "paddle"
