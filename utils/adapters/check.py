"""Which base an adapter belongs to; checked before any weights load, so no Paddle here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils.checkpoints.fingerprint import fingerprint, same_base
from utils.checkpoints.locate import Checkpoint
from utils.errors import UserError

LORA_CONFIG = "lora_config.json"
PREFIX_CONFIG = "prefix_config.json"
WEIGHTS = {LORA_CONFIG: "lora_model_state", PREFIX_CONFIG: "prefix_model_state"}


def adapter_weights(folder: Path, config_name: str) -> Path:
    """The weights file of an adapter folder: safetensors, or the .pdparams of earlier toolchains."""
    stem = WEIGHTS[config_name]
    for suffix in (".safetensors", ".pdparams"):
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise UserError(f"{folder}: has {config_name} but neither {stem}.safetensors nor {stem}.pdparams")


def read_config(folder: Path, config_name: str) -> dict[str, Any]:
    """The adapter's configuration.

    Raises:
        UserError: the folder or file is missing, or is not a JSON object.
    """
    path = Path(folder) / config_name
    if not path.is_file():
        kind = "LoRA" if config_name == LORA_CONFIG else "prefix-tuning"
        raise UserError(f"{folder}: is no {kind} adapter, it has no {config_name}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object")
    return config


def check_adapter(folder: str | Path, config_name: str, base: Checkpoint) -> dict[str, Any]:
    """The configuration of an adapter that was trained on `base`.

    Adapters written by this toolchain carry the fingerprint of their base. Older ones do not; what
    does not fit them shows up as a shape mismatch when their weights load.

    Raises:
        UserError: no such adapter, no weights, or an adapter of another base.
    """
    folder = Path(folder)
    config = read_config(folder, config_name)
    adapter_weights(folder, config_name)
    wanted = config.get("base_fingerprint")
    if wanted and not same_base(wanted, fingerprint(base)):
        raise UserError(
            f"{folder}: this adapter was trained on another base "
            f"({config.get('base_model_name_or_path')}), not on {base.name}; give that model as "
            "model_name_or_path"
        )
    return config
