"""One decoder for every family, put together from its `Architecture`: the inference model."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import paddle
from paddle import Tensor, nn
from tqdm import tqdm

from utils.checkpoints.tensors import cast
from utils.kernels import in_place
from utils.kernels import inference as kernels
from utils.kernels.shared import SharedRows, SharedTable
from utils.model.architecture import Architecture, LayerNames, ModelShape, Rotary
from utils.partition.parts import Parts

Read = Callable[[str], np.ndarray]  # float32 values of a parameter, by name
Made = TypeVar("Made")

# Layers of one choice. A static program chooses between its ways anew for each such group: Paddle's executor lists, for
# every operator of a block, all that must run before and after it, so one block of all layers takes hundreds of MB.
TOGETHER = 5


def input_names(architecture: Architecture) -> tuple[str, ...]:
    """What a step needs beside the cache; a static program must not have inputs that change nothing."""
    rotary = architecture.rotary
    used = {
        "ids": True,
        "positions": rotary is not None or bool(architecture.tables),
        "keys": architecture.slopes is not None,
        "visible": True,
        "targets": True,
        "stretch": rotary is not None and rotary.stretch_power is not None,
        "chosen": True,
    }
    return tuple(name for name, needed in used.items() if needed)


def own_architecture(architecture: Architecture, parts: Parts | None) -> Architecture:
    """What a tensor-parallel rank computes of a model: some of the heads."""
    if parts is None:
        return architecture
    queries, read = parts.query_heads, parts.read_heads
    shape = replace(architecture.shape, heads=len(queries), kv_heads=len(read))
    return replace(
        architecture, shape=shape, slopes=None if architecture.slopes is None else architecture.slopes[queries]
    )


class Decoder(nn.Layer):
    """A model of one family: token ids and the cache in, logits out; new keys and values go into the cache.

    Query, key and value are one matrix; the factor on attention scores is in the query's, and the dimensions of
    heads stand in `Rotary.order`.

    A tensor-parallel rank has some heads, columns of the MLP and tokens of the vocabulary; hidden states and logits
    are whole.

    Attributes:
        kv_heads: how many heads of keys and values the cache has.
        heads_first: the cache of a layer is [batch, kv_heads, room, head_dim].
    """

    heads_first = True

    def __init__(
        self,
        architecture: Architecture,
        parameters: Container[str],
        read: Read,
        dtype: str,
        *,
        parts: Parts | None = None,
        group: Any = None,
        beside: Decoder | None = None,
        changed: Container[str] = (),
    ) -> None:
        """
        Args:
            parameters: names of the model's parameters.
            read: gives their values in the Paddle layout, in layer order.
            dtype: of weights and hidden states.
            parts, group: what this tensor-parallel rank has of the model, and all ranks that share it; None for all
                of it.
            beside: a decoder that was made alike, whose weights this one shares.
            changed: names of the parameters that differ from those of `beside`. What is joined with one of them, as
                queries, keys and values are, is a matrix of its own too.
        """
        super().__init__()
        shared = [] if beside is None else beside.weights
        weights = _Weights(architecture, parameters, read, dtype, parts, group, shared, changed)
        self.weights: list[Any] = weights.made
        architecture = own_architecture(architecture, parts)
        self.architecture, self.dtype = architecture, dtype
        shape = architecture.shape
        self.kv_heads = shape.kv_heads
        self.embedding = weights.table(f"{architecture.embedding}.weight")
        self.after_embedding = weights.some(architecture.embedding_norm, architecture.embedding_projection)
        for number, table in enumerate(architecture.tables):
            self.add_parameter(f"table_{number}", weights.fixed(f"{table.name}.weight"))
        self.layers = nn.LayerList()
        for number in tqdm(range(shape.layers), desc="loading", unit="layer", delay=5, leave=False):
            self.layers.append(_Layer(weights, architecture.layer(number)))
        self.before_head = weights.some(architecture.final_norm, architecture.output_projection)
        if architecture.head is not None:
            bias = weights.bias(architecture.head)
            self.head = weights.table(architecture.head, bias, turned=not architecture.head_is_table)
        if architecture.slopes is not None:
            self.slopes = kernels.fixed(paddle.to_tensor(architecture.slopes))
        if architecture.rotary is not None:
            self.turns = _Rotary(architecture.rotary, shape, dtype)
        self.activation = kernels.activation(architecture.activation)
        self.inputs = input_names(architecture)
        self.eval()

    # --- the forward pass ---------------------------------------------------------------------------

    def forward(self, inputs: Sequence[Tensor], cache: Sequence[Tensor]) -> list[Tensor]:
        """One step over new tokens.

        Args:
            inputs: what `self.inputs` names. ids int64 [batch, length]; targets int64 [batch, length], their places in
                the cache; positions, keys, visible, stretch, see `utils.families.text.Places`, keys being the first
                places of the cache, of one token of each row all; chosen int64 [n], the tokens whose logits are
                wanted, counted row by row.
            cache: keys and values of every layer in turn, each [batch, kv_heads, room, head_dim]. Those of the new
                tokens are written into it.

        Returns:
            Logits [n, vocabulary], alone in a list.
        """
        given = dict(zip(self.inputs, inputs))  # noqa: B905 - the tracer's zip has no `strict`
        return [self._compute(given, cache)]

    @paddle.jit.not_to_static  # traced as it runs: the only control flow are choices between two ways
    def _compute(self, given: Mapping[str, Tensor], cache: Sequence[Tensor]) -> Tensor:
        head = self.embedding if self.architecture.head is None else self.head
        return head(self.states(given, cache))

    def states(self, given: Mapping[str, Tensor], cache: Sequence[Tensor]) -> Tensor:
        """As `forward`, but what the head would turn into logits: [n, hidden]."""
        architecture, shape = self.architecture, self.architecture.shape
        length = given["ids"].shape[1]
        is_open = length < 0  # in a static program
        one = not is_open and length == 1
        hidden = self.embedding.embeddings(given["ids"].flatten())  # of all tokens, row by row: [tokens, width]
        for operator in self.after_embedding:
            hidden = operator(hidden)
        for number, table in enumerate(architecture.tables):
            places = given["positions"][table.part].flatten() + table.offset
            hidden = hidden + nn.functional.embedding(places, getattr(self, f"table_{number}"))
        sizes = {"heads": shape.heads, "kv_heads": shape.kv_heads, "width": shape.head_dim}
        pieces = 1 if one or not architecture.causal else 0
        slopes = None if architecture.slopes is None else self.slopes
        blocks = kernels.blocks_of(given["visible"], given.get("keys"), slopes, pieces=pieces, **sizes)
        targets = kernels.Targets.at(given["targets"], cache[0])
        ways = (True, False) if is_open else (one,)
        steps = [kernels.Step.of(given["ids"], blocks, targets, one=one, **sizes) for one in ways]
        angles = None if architecture.rotary is None else self.turns.angles(given["positions"], given.get("stretch"))
        for first in range(0, shape.layers, TOGETHER):
            layers = range(first, min(first + TOGETHER, shape.layers))
            runs = [partial(self._layers, layers, hidden, given["chosen"], cache, angles, step) for step in steps]
            hidden = paddle.static.nn.cond(paddle.shape(given["ids"])[1] == 1, *runs) if is_open else runs[0]()
        for operator in self.before_head:
            hidden = operator(hidden)
        return hidden

    def _layers(
        self,
        numbers: range,
        hidden: Tensor,
        chosen: Tensor,
        cache: Sequence[Tensor],
        angles: tuple[Tensor, Tensor] | None,
        step: kernels.Step,
    ) -> Tensor:
        """Consecutive layers: hidden states [tokens, width], or of the chosen tokens [n, width]."""
        architecture, few = self.architecture, step.one
        update: kernels.Update | None = None  # is still to be added to the hidden states, which the next norm does
        for number in numbers:
            layer = self.layers[number]
            if not architecture.norm_first:
                normed = hidden
            elif update is None:
                normed = layer.attention_norm(hidden)
            else:
                normed, hidden = layer.attention_norm.of_sum(hidden, update, few=few)
            parts = step.parted(layer.attention_in(normed))
            if angles is not None:
                parts = self.turns.turned(parts, angles)
            attended = step.attend(parts, (cache[2 * number], cache[2 * number + 1]))
            if number == architecture.shape.layers - 1:  # from here on only the tokens whose logits are wanted count
                hidden, normed, attended = (paddle.index_select(x, chosen) for x in (hidden, normed, attended))
                few = True
            if architecture.parallel:
                beside = normed if layer.mlp_norm is None else layer.mlp_norm(hidden)
                update = kernels.Update(layer.mlp_out, self._inner(layer, beside))
                hidden = kernels.Update(layer.attention_out, attended).added_to(hidden, few=few)
                continue
            middle = layer.mlp_norm if architecture.norm_first else layer.attention_norm
            gathered = kernels.Update(layer.attention_out, attended)
            normed, hidden = middle.of_sum(self._base(hidden, normed), gathered, few=few)
            update = kernels.Update(layer.mlp_out, self._inner(layer, normed))
            if architecture.norm_first:
                hidden = self._base(hidden, normed)
            else:
                hidden, update = layer.mlp_norm.of_sum(self._base(normed, normed), update, few=few)[0], None
        return hidden if update is None else update.added_to(hidden, few=few)

    def _base(self, hidden: Tensor, normed: Tensor) -> Tensor:
        """What the output of attention or MLP is added to."""
        if self.architecture.residual == "hidden":
            return hidden
        factor = self.architecture.residual_factor
        return normed if factor == 1.0 else normed * factor

    def _inner(self, layer: _Layer, x: Tensor) -> Tensor:
        """What the MLP's last product takes."""
        inner = self.activation(layer.mlp_in(x))
        return in_place.multiply(inner, layer.mlp_up(x)) if self.architecture.gated else inner


class _Layer(nn.Layer):
    """The operators of one layer."""

    def __init__(self, weights: _Weights, names: LayerNames) -> None:
        super().__init__()
        self.attention_norm = weights.norm(names.attention_norm)
        self.attention_in = weights.joined(names.query_key_value, weights.by_part(names))
        self.attention_out = weights.rows(names.attention_out)
        self.mlp_norm = None if names.mlp_norm == names.attention_norm else weights.norm(names.mlp_norm)
        if len(names.mlp_in) == 2 or not weights.architecture.gated:
            ways = [(source, _whole) for source in names.mlp_in]
        else:  # the gate's columns come first
            ways = [(names.mlp_in[0], _first_half), (names.mlp_in[0], _second_half)]
        self.mlp_in, *up = (weights.joined((source,), weights.own_columns(half)) for source, half in ways)
        if up:  # not one matrix with the gate: parting their outputs costs more than a second product
            self.mlp_up = up[0]
        self.mlp_out = weights.rows(names.mlp_out)


def _whole(values: np.ndarray) -> np.ndarray:
    return values


def _first_half(values: np.ndarray) -> np.ndarray:
    return values[:, : values.shape[1] // 2]


def _second_half(values: np.ndarray) -> np.ndarray:
    return values[:, values.shape[1] // 2 :]


class _Rotary(nn.Layer):
    """Turns queries and keys by their positions."""

    def __init__(self, rotary: Rotary, shape: ModelShape, dtype: str) -> None:
        super().__init__()
        self.rotary, self.shape, self.dtype = rotary, shape, dtype
        half = shape.head_dim // 2
        swap = np.zeros((2 * half, 2 * half), dtype=np.float32)
        swap[np.arange(half) + half, np.arange(half)] = -1.0
        swap[np.arange(half), np.arange(half) + half] = 1.0
        # x @ swap = (-second half, first half): a product is faster than cutting and joining
        self.swap = kernels.fixed(paddle.to_tensor(swap).astype(dtype))
        self.inverse = kernels.fixed(paddle.to_tensor(rotary.inverse.reshape(-1, 1, 1, half)))
        if rotary.stretch_power is not None:
            self.stretch_power = kernels.fixed(paddle.to_tensor(rotary.stretch_power))

    def angles(self, positions: Tensor, stretch: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin of queries, keys and values, each [batch, heads + 2 * kv_heads, length, head_dim]: spread
        over the heads once, for all layers. Values are turned by nothing: parting them from the rest costs more.

        Args:
            positions: [parts, batch, length] int64.
            stretch: [batch] float32, or None where nothing is stretched.
        """
        rotary, shape = self.rotary, self.shape
        places = positions.astype("float32").unsqueeze(-1)
        inverse = self.inverse
        if stretch is not None:
            inverse = inverse * (stretch.reshape([1, -1, 1, 1]) ** self.stretch_power)
        angles = (places * inverse).sum(0)
        angles = paddle.concat([angles, angles], axis=-1).unsqueeze(1)  # [batch, 1, length, head_dim]
        spread = []
        for wave, still in ((angles.cos(), 1.0), (angles.sin(), 0.0)):
            wave = wave if rotary.magnitude == 1.0 else wave * rotary.magnitude
            of_queries = wave
            if rotary.logn_length is not None:
                length = paddle.full([1], rotary.logn_length, dtype="float32")
                of_queries = wave * paddle.clip(paddle.log(places[0] + 1.0) / paddle.log(length), min=1.0).unsqueeze(1)
            parts = (of_queries, shape.heads), (wave, shape.kv_heads), (paddle.full_like(wave, still), shape.kv_heads)
            tiled = [paddle.tile(part, [1, count, 1, 1]) for part, count in parts]
            spread.append(paddle.concat(tiled, axis=1).astype(self.dtype))
        return spread[0], spread[1]

    def turned(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Queries and keys by their positions, values as they are: [batch, heads + 2 * kv_heads, length, head_dim],
        which may be overwritten."""
        turned = in_place.multiply(paddle.matmul(x, self.swap), angles[1])
        return in_place.add(in_place.multiply(x, angles[0]), turned)


class _Weights:
    """Reads the parameters of a model, or a rank's parts of them, into the operators of the decoder."""

    def __init__(
        self,
        architecture: Architecture,
        parameters: Container[str],
        read: Read,
        dtype: str,
        parts: Parts | None,
        group: Any,
        shared: Sequence[Any],
        changed: Container[str],
    ) -> None:
        self.architecture, self._known, self._read, self._dtype = architecture, parameters, read, dtype
        self._parts, self._group = parts, group
        self._shared, self._changed = shared, changed
        self.made: list[Any] = []  # in the order in which every decoder of this architecture makes them

    def _once(self, names: Iterable[str], make: Callable[[], Made]) -> Made:
        """What stands at this place in the other decoder, if there is one that has the same parameters `names`."""
        number = len(self.made)
        same = number < len(self._shared) and not any(name in self._changed for name in names)
        self.made.append(self._shared[number] if same else make())
        found: Made = self.made[-1]
        return found

    def _tensor(self, values: np.ndarray) -> Tensor:
        return _tensor(values, self._dtype)

    def fixed(self, name: str) -> Tensor:
        """A parameter as one that is not trained."""
        return self._once((name,), lambda: kernels.fixed(self._tensor(self._read(name))))

    def bias(self, weight: str) -> Tensor | None:
        """The bias beside a parameter called "NAME.weight", if there is one."""
        name = f"{weight.removesuffix('.weight')}.bias"
        return self._tensor(self._read(name)) if name in self._known else None

    def _own(self, values: np.ndarray, axis: int) -> np.ndarray:
        """This rank's part along an axis, one of equal ones."""
        if self._parts is None:
            return values
        return np.split(values, self._parts.degree, axis)[self._parts.rank]

    def own_columns(self, arrange: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        return lambda values: self._own(arrange(values), 1)

    def table(self, name: str, bias: Tensor | None = None, *, turned: bool = False) -> kernels.Table | SharedTable:
        """The table [vocabulary, width] of a parameter, or of its transpose."""
        return self._once((name,), lambda: self._table(name, bias, turned=turned))

    def _table(self, name: str, bias: Tensor | None, *, turned: bool) -> kernels.Table | SharedTable:
        values = self._read(name)
        if self._parts is None or not self._parts.shares_vocabulary:
            return kernels.Table(self._tensor(values.T if turned else values), bias)
        own = self._tensor(self._own(values.T if turned else values, 0))
        if bias is not None:
            bias = bias.split(self._parts.degree)[self._parts.rank]
        return SharedTable(own, bias, self._group)

    def rows(self, source: str) -> kernels.Linear | SharedRows:
        """A Linear of whose inputs a rank has its part."""
        if self._parts is None:
            return self.linear(source)
        weight = f"{source}.weight"
        return self._once(
            (weight,),
            lambda: SharedRows(self._tensor(self._own(self._read(weight), 0)), self.bias(weight), self._group),
        )

    def linear(self, source: str) -> kernels.Linear:
        return self.joined((source,))

    def norm(self, source: str) -> kernels.Norm:
        return self._once((f"{source}.weight",), lambda: self._norm(source))

    def _norm(self, source: str) -> kernels.Norm:
        weight = self._tensor(self._read(f"{source}.weight"))
        if self.architecture.norm == "rms":
            return kernels.RMSNorm(weight, self.architecture.epsilon)
        return kernels.LayerNorm(weight, self._tensor(self._read(f"{source}.bias")), self.architecture.epsilon)

    def some(self, norm: str | None, linear: str | None) -> nn.LayerList:
        """A norm and a Linear, those of them that a model has."""
        found: list[kernels.Operator] = []
        if norm is not None:
            found.append(self.norm(norm))
        if linear is not None:
            found.append(self.linear(linear))
        return nn.LayerList(found)

    def joined(
        self,
        sources: tuple[str, ...],
        arrange: Callable[[np.ndarray], np.ndarray] = _whole,
    ) -> kernels.Linear:
        """Several Linears side by side as one. Some may lack a bias: theirs is 0.

        Args:
            arrange: what becomes of their columns.
        """
        return self._once([f"{source}.weight" for source in sources], lambda: self._joined(sources, arrange))

    def _joined(self, sources: tuple[str, ...], arrange: Callable[[np.ndarray], np.ndarray]) -> kernels.Linear:
        weights = [self._read(f"{source}.weight") for source in sources]
        sizes = [weight.shape[1] for weight in weights]
        values = arrange(weights[0] if len(weights) == 1 else np.concatenate(weights, axis=1))
        del weights
        matrix = self._tensor(values)
        if not any(f"{source}.bias" in self._known for source in sources):
            return kernels.Linear(matrix)
        biases = [
            self._read(f"{source}.bias") if f"{source}.bias" in self._known else np.zeros(size, np.float32)
            for source, size in zip(sources, sizes, strict=True)
        ]
        return kernels.Linear(matrix, self._tensor(arrange(np.concatenate(biases)[None])[0]))

    def by_part(self, names: LayerNames) -> Callable[[np.ndarray], np.ndarray]:
        """Arranges the columns of query, key and value: by part, in `Rotary.order`, the scale in the query; of a
        rank those of its heads."""
        shape, rotary = self.architecture.shape, self.architecture.rotary
        heads, kv_heads, width = shape.heads, shape.kv_heads, shape.head_dim
        scale = np.float32(width**-0.5 if names.score_scale is None else names.score_scale)
        own: list[int] | None = None
        if self._parts is not None:
            read = [heads + head for head in self._parts.read_heads]
            own = [*self._parts.query_heads, *read, *(head + kv_heads for head in read)]
        local = own_architecture(self.architecture, self._parts).shape
        queries, turning = local.heads, local.heads + local.kv_heads

        def arrange(values: np.ndarray) -> np.ndarray:
            rows = values.shape[0]
            if names.by_head:
                values = values.reshape(rows, heads, 3, width).transpose(0, 2, 1, 3)
            columns = values.reshape(rows, heads + 2 * kv_heads, width)
            columns = columns.copy() if own is None else columns[:, own]
            if rotary is not None and rotary.order is not None:
                columns[:, :turning] = columns[:, :turning][..., rotary.order]
            columns[:, :queries] *= scale
            return columns.reshape(rows, -1)

        return arrange


def _tensor(values: np.ndarray, dtype: str) -> Tensor:
    """float32 values as a tensor of another type; Paddle takes uint16 for bfloat16."""
    return paddle.to_tensor(np.ascontiguousarray(cast(values, dtype)), dtype=dtype)
