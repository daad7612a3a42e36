"""Exporting and merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from utils.arguments.fields import Arguments, arg
from utils.arguments.groups.common import DEVICE_HELP, DTYPES, MODEL_HELP


@dataclass
class ExportingArguments(Arguments):
    """Exporting a static program."""

    group: ClassVar[str] = "Export"

    model_name_or_path: str | None = arg(None, MODEL_HELP, path=True)
    output_path: str = arg("./inference", "folder for the exported model, which then needs nothing else", path=True)
    inference_model: bool = arg(False, "export the fused inference model instead of the plain one")
    lora_path: str | None = arg(None, "folder of a LoRA adapter, merged into the exported weights", path=True)
    prefix_path: str | None = arg(None, "folder of a trained prefix, exported as a cache", path=True)
    model_type: str | None = arg(None, "family that the checkpoint must be of, such as gpt-3; it says so itself")
    chat_template: str | None = arg(None, "a .jinja file that replaces the model's chat template", path=True)
    dtype: str | None = arg(None, "type of the weights; the checkpoint's own by default", choices=DTYPES)
    device: str = arg("gpu", DEVICE_HELP)


@dataclass
class MergeArguments(Arguments):
    """Merging a LoRA adapter into its base."""

    group: ClassVar[str] = "Merge"
    uses_device: ClassVar[bool] = False

    model_name_or_path: str | None = arg(None, "the base: a folder or a name", path=True)
    lora_path: str | None = arg(None, "folder of the adapter (PEFT folders too)", path=True)
    merge_model_path: str | None = arg(
        None, "folder for the merged model; by default that of the adapter with _merged behind its name", path=True
    )
    device: str = arg("gpu", "accepted for older commands; merging computes on the CPU")
    dtype: str | None = arg(None, "type of the merged weights; the base's own by default", choices=DTYPES)
    export_format: str = arg("paddle", "layout: PaddleNLP's or Hugging Face transformers'", choices=("paddle", "hf"))
    max_shard_size: str = arg("5GB", "largest weights file, such as 500MB or 5GB")


@dataclass
class MergeShardsArguments(Arguments):
    """Merging the shards of a tensor-parallel run."""

    group: ClassVar[str] = "Merge"
    uses_device: ClassVar[bool] = False

    model_name_or_path: str | None = arg(None, "folder with the shards model_state.tp00.pdparams, ...", path=True)
    merge_model_path: str | None = arg(
        None, "folder for the merged model; by default it is written beside the shards", path=True
    )
    device: str = arg("gpu", "accepted for older commands; merging computes on the CPU")
    dtype: str | None = arg(None, "type of the merged weights; that of the shards by default", choices=DTYPES)
    export_format: str = arg("paddle", "layout: PaddleNLP's or Hugging Face transformers'", choices=("paddle", "hf"))
    max_shard_size: str = arg("5GB", "largest weights file, such as 500MB or 5GB")
