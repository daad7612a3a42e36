"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190): trained keys and values before every layer's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor, nn

from utils.adapters.check import PREFIX_CONFIG, adapter_weights
from utils.adapters.fill import fill_parameters
from utils.adapters.prefix_files import read_prefix_settings
from utils.checkpoints.files import atomic_write
from utils.checkpoints.fingerprint import fingerprint
from utils.checkpoints.locate import Checkpoint
from utils.checkpoints.tensors import open_tensors
from utils.families import FamilySpec
from utils.kernels import precision
from utils.kernels.linear import Embedding, linear
from utils.model.architecture import ModelShape
from utils.model.decoder import Layers
from utils.partition.tensor import ShardPlan

if TYPE_CHECKING:
    from utils.inference.engine import Engine


class PrefixTuning(nn.Layer):
    """The prefix encoder of one model.

    Without projection the keys and values are parameters; with it they are the output of a two-layer
    network over a small embedding, which trains more steadily at high learning rates.

    Attributes:
        length: number of prefix positions. They have no position of their own: the prompt starts at 0.
    """

    def __init__(
        self,
        family: FamilySpec,
        shape: ModelShape,
        length: int,
        *,
        projection: bool = False,
        projection_hidden: int | None = None,
        dtype: str = "float32",
        computed: str | None = None,
        shard_plan: ShardPlan | None = None,
    ) -> None:
        """
        Args:
            dtype: of the encoder's weights.
            computed: type of the keys and values, that of the model; `dtype` by default.
            shard_plan: what this rank holds of the model, if not all. Every rank has the whole encoder, and uses the
                heads and layers that it holds.
        """
        super().__init__(dtype=dtype)
        self.family, self.shape, self.length, self.shard_plan = family, shape, length, shard_plan
        self.computed = computed or dtype
        self.projection = projection
        self.projection_hidden = projection_hidden or shape.hidden
        size = 2 * shape.layers * shape.kv_heads * shape.head_dim
        # Names and order of the parts are those of earlier toolchains, so that their files load.
        if projection:
            width = shape.kv_heads * shape.head_dim
            parts = [
                Embedding(length, width),
                linear(width, self.projection_hidden),
                nn.Tanh(),
                linear(self.projection_hidden, size),
            ]
        else:
            parts = [Embedding(length, size)]
        self.encoder = nn.Sequential(*parts)
        self.encoder.to(dtype=dtype)
        if shard_plan is not None:
            shard_plan.mark_whole(self.encoder.parameters())

    def flat(self) -> Tensor:
        """Keys and values [1, length, 2 * layers, kv_heads, head_dim]: keys of all layers, then values."""
        encoded = self.encoder(paddle.arange(self.length, dtype="int64"))
        encoded = precision.cast(encoded, getattr(paddle, self.computed))
        return encoded.reshape([1, self.length, 2 * self.shape.layers, self.shape.kv_heads, self.shape.head_dim])

    def cache(self, batch: int, layers: Iterable[int] | None = None) -> Layers:
        """The prefix as the cache of a model: (key, value) of every layer, each [batch, length, kv_heads, head_dim]
        with the heads that this rank holds.

        Args:
            layers: the numbers of those that are wanted, if not all.
        """
        flat = self.flat()
        if self.shard_plan is not None and self.shard_plan.parts.degree > 1:
            flat = flat[:, :, :, self.shard_plan.parts.key_value_heads]
        parts = flat.expand([batch, -1, -1, -1, -1]).transpose([2, 0, 1, 3, 4])
        count = self.shape.layers
        return [(parts[number], parts[count + number]) for number in (range(count) if layers is None else layers)]

    @paddle.no_grad()
    def array(self, order: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """The prefix as `CachedEngine` takes it, of all layers and heads.

        Args:
            order: of the dimensions of a head (`Rotary.order`); None leaves them as published.
        """
        keys, values = np.split(self.flat().astype("float32").numpy()[0].transpose(1, 2, 0, 3), 2)
        keys = keys if order is None else keys[..., order]
        return np.stack([keys, values], axis=1).reshape([-1, *keys.shape[1:]])

    @paddle.no_grad()
    def start_from_text(
        self, engine: Engine, ids: Sequence[int], complete: Callable[[Tensor], Tensor] = lambda own: own
    ) -> None:
        """Starts from the keys and values of real tokens, which trains far better than noise on little
        data (Li & Liang 2021, section 7.4). With projection there is no closed form; it keeps its noise.

        Args:
            engine: a `CachedEngine` of the plain model, without a prefix.
            ids: tokens of typical text; repeated or cut to the prefix length.
            complete: makes the keys and values of all layers [2 * layers, kv_heads, length, head_dim] of those of
                the layers that the engine has.
        """
        if self.projection:
            return
        repeated = (list(ids) * (self.length // len(ids) + 1))[: self.length]
        (slot,), _ = engine.open([repeated])
        (kept,) = engine.keep(slot, [0, self.length])
        engine.free([slot])
        found = complete(paddle.to_tensor(kept.values))
        if self.shard_plan is not None:
            found = self.shard_plan.all_heads(found, axis=1)
        by_layer = found.reshape([self.shape.layers, 2, *found.shape[1:]])
        weight = self.encoder[0].weight
        weight.set_value(by_layer.transpose([3, 1, 0, 2, 4]).reshape(weight.shape).astype(weight.dtype))


def describe_prefix(folder: Path, prefix: PrefixTuning, base: Checkpoint) -> None:
    """Writes the `prefix_config.json` that belongs beside the weights of the encoder."""
    shape = prefix.shape
    config = {
        "num_prefix_tokens": prefix.length,
        "num_attention_heads": shape.heads,
        "multi_query_group_num": shape.kv_heads,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "prefix_projection": prefix.projection,
        "prefix_projection_hidden_size": prefix.projection_hidden,
        "prefix_dropout": 0.0,
        "tensor_parallel_degree": -1,
        "dtype": str(prefix.encoder[0].weight.dtype).split(".")[-1],
        "base_model_name_or_path": base.name,
        "base_fingerprint": fingerprint(base),
    }
    atomic_write(folder / PREFIX_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def restore_prefix(prefix: PrefixTuning, folder: Path) -> None:
    """Fills the prefix encoder from an adapter folder."""
    path = adapter_weights(folder, PREFIX_CONFIG)
    fill_parameters(dict(prefix.encoder.state_dict()), open_tensors(path), path)


def load_prefix(
    model: Any,
    family: FamilySpec,
    path: str | Path,
    base: Checkpoint,
    shard_plan: ShardPlan | None = None,
    *,
    dtype: str | None = None,
) -> PrefixTuning:
    """As `read_prefix`, for `model`; its weights are in the type of `model` unless another one is named."""
    computed = model.settings.dtype
    return read_prefix(family, path, base, dtype or computed, shard_plan, computed=computed)


def read_prefix(
    family: FamilySpec,
    path: str | Path,
    base: Checkpoint,
    dtype: str,
    shard_plan: ShardPlan | None = None,
    *,
    computed: str | None = None,
) -> PrefixTuning:
    """The prefix of an adapter folder, ready to run or train.

    Args:
        dtype, computed: see `PrefixTuning`.
        shard_plan: what this rank holds of the model, if not all.

    Raises:
        UserError: an adapter of another base, or one whose weights do not fit.
    """
    settings = read_prefix_settings(Path(path), base)
    prefix = PrefixTuning(
        family,
        family.shape(base.config),
        settings.length,
        projection=settings.projection,
        projection_hidden=settings.projection_hidden,
        dtype=dtype,
        computed=computed,
        shard_plan=shard_plan,
    )
    restore_prefix(prefix, Path(path))
    return prefix
