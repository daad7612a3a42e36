"""Prefixes in files: what their configuration says, read and checked against weights and base. No Paddle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from utils.adapters.check import PREFIX_CONFIG, adapter_weights, base_faults, misfits, read_config, value_faults
from utils.checkpoints.locate import Checkpoint
from utils.checkpoints.tensors import open_tensors
from utils.errors import UserError, raise_if
from utils.model.architecture import ModelShape
from utils.settings import FLAG, Table, whole

MAX_SIZE = 2**31 - 1
_TABLE: Table = {
    "num_prefix_tokens": whole(1, MAX_SIZE),
    "prefix_projection": FLAG,
    "prefix_projection_hidden_size": whole(1, MAX_SIZE),
}
# Sizes of the base, which the weights must fit anyway, and how the prefix was trained or is stored.
_HARMLESS = {
    "base_fingerprint",
    "base_model_name_or_path",
    "dtype",
    "hidden_size",
    "multi_query_group_num",
    "num_attention_heads",
    "num_hidden_layers",
    "prefix_dropout",
    "tensor_parallel_degree",
}


@dataclass(frozen=True)
class PrefixSettings:
    """The prefix encoder of one model.

    Attributes:
        length: number of prefix positions.
        projection: whether keys and values are the output of a small network.
        projection_hidden: its width; None is that of the model.
    """

    length: int
    projection: bool = False
    projection_hidden: int | None = None

    def shapes(self, base: ModelShape) -> dict[str, tuple[int, ...]]:
        """The shapes of the encoder's parameters, by their names in files."""
        width = base.kv_heads * base.head_dim
        size = 2 * base.layers * width
        if not self.projection:
            return {"0.weight": (self.length, size)}
        hidden = self.projection_hidden or base.hidden
        return {
            "0.weight": (self.length, width),
            "1.weight": (width, hidden),
            "1.bias": (hidden,),
            "3.weight": (hidden, size),
            "3.bias": (size,),
        }


def read_prefix_settings(folder: Path, base: Checkpoint) -> PrefixSettings:
    """What the prefix in a folder is; all its values are finite.

    Raises:
        UserError: no prefix, one of another base, or files that do not fit; every fault that can be told is.
    """
    file = folder / PREFIX_CONFIG
    if not file.is_file():
        raise UserError(f"{folder}: is no prefix-tuning adapter, it has no {PREFIX_CONFIG}")
    config, faults = read_config(file, _TABLE, needed=("num_prefix_tokens",), harmless=_HARMLESS)
    try:
        weights = adapter_weights(folder, PREFIX_CONFIG)
        tensors = open_tensors(weights)
    except UserError as error:
        raise UserError([*faults, *error.faults]) from error
    faults += base_faults(folder, config, base) + value_faults(weights, tensors.items())
    raise_if(faults)
    settings = PrefixSettings(
        config["num_prefix_tokens"],
        config.get("prefix_projection", False),
        config.get("prefix_projection_hidden_size"),
    )
    shapes = settings.shapes(base.family.shape(base.config))
    raise_if(misfits(weights, shapes, {name: tensor.shape for name, tensor in tensors.items()}))
    return settings
