"""The decoder lowered for serving, put together from the `Architecture` of any family: the inference model."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn
from tqdm import tqdm

from utils.kernels import in_place
from utils.kernels import inference as kernels
from utils.kernels.arrays import fixed
from utils.model.architecture import Architecture, LayerNames, ModelShape, Rotary
from utils.model.fused_weights import Read, Weights, first_half, second_half, whole
from utils.model.steps import branches, input_names, own_architecture, through
from utils.partition.parts import Parts


class FusedDecoder(nn.Layer):
    """A model of one family: token ids and the cache in, logits out; new keys and values go into the cache.

    Query, key and value are one matrix; the factor on attention scores is in the query's, and the dimensions of
    heads stand in `Rotary.order`.

    A tensor-parallel rank has some heads, columns of the MLP and tokens of the vocabulary; hidden states and logits
    are whole.

    Attributes:
        cache_shape: layers, heads of keys and values, and width of a head, of the cache.
    """

    def __init__(
        self,
        architecture: Architecture,
        parameters: Container[str],
        read: Read,
        dtype: str,
        *,
        parts: Parts | None = None,
        group: Any = None,
        beside: FusedDecoder | None = None,
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
        weights = Weights(architecture, parameters, read, dtype, parts, group, shared, changed)
        self.weights: list[Any] = weights.made
        architecture = own_architecture(architecture, parts)
        self.architecture, self.dtype = architecture, dtype
        shape = architecture.shape
        self.cache_shape = (shape.layers, shape.kv_heads, shape.head_dim)
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
            self.head = weights.table(architecture.head, bias, transposed=not architecture.head_is_table)
        if architecture.slopes is not None:
            self.slopes = fixed(paddle.to_tensor(architecture.slopes))
        rotaries = [architecture.rotary, None if architecture.local is None else architecture.local.rotary]
        self.rotaries = nn.LayerList(_Rotary(rotary, shape, dtype) for rotary in rotaries if rotary is not None)
        self.activation = kernels.activation(architecture.activation)
        self.inputs = input_names(architecture)
        self.eval()

    # --- the forward pass ---------------------------------------------------------------------------

    def forward(self, inputs: Sequence[Tensor], cache: Sequence[Tensor]) -> list[Tensor]:
        """One step over new tokens.

        Args:
            inputs: what `self.inputs` names. ids int64 [batch, length]; targets int64 [batch, length], their places in
                the cache; positions, keys, visible, stretch, see `utils.families.text.AttentionInputs`, keys being the
                first places of the cache, of one token of each row all; chosen int64 [n], the tokens whose logits are
                wanted, counted row by row.
            cache: keys and values of every layer in turn, each [batch, kv_heads, capacity, head_dim]. Those of the new
                tokens are written into it.

        Returns:
            Logits [n, vocabulary], alone in a list.
        """
        given = dict(zip(self.inputs, inputs))  # noqa: B905 - the tracer's zip has no `strict`
        return [self._compute(given, cache)]

    @paddle.jit.not_to_static  # traced as it runs: the only control flow are choices between two branches
    def _compute(self, given: Mapping[str, Tensor], cache: Sequence[Tensor]) -> Tensor:
        head = self.embedding if self.architecture.head is None else self.head
        return head(self.states(given, cache))

    def states(self, given: Mapping[str, Tensor], cache: Sequence[Tensor]) -> Tensor:
        """As `forward`, but what the head would turn into logits: [n, hidden]."""
        architecture = self.architecture
        hidden = self.embedding.embeddings(given["ids"].flatten())  # of all tokens, row by row: [tokens, width]
        if architecture.embedding_scale != 1.0:
            hidden = hidden * architecture.embedding_scale
        for operator in self.after_embedding:
            hidden = operator(hidden)
        for number, table in enumerate(architecture.tables):
            places = given["positions"][table.part].flatten() + table.offset
            hidden = hidden + nn.functional.embedding(places, getattr(self, f"table_{number}"))
        slopes = None if architecture.slopes is None else self.slopes
        steps = branches(architecture, slopes, given, cache, flat=True)
        angles = [rotary.angles(given["positions"], given.get("stretch")) for rotary in self.rotaries]

        def run(numbers: Sequence[int], hidden: Tensor, step: Sequence[kernels.Step]) -> Tensor:
            return self._layers(numbers, hidden, given["chosen"], cache, angles, step)

        hidden = through(range(architecture.shape.layers), hidden, given["ids"], steps, run)
        for operator in self.before_head:
            hidden = operator(hidden)
        return hidden

    def _layers(
        self,
        numbers: Sequence[int],
        hidden: Tensor,
        chosen: Tensor,
        cache: Sequence[Tensor],
        angles: Sequence[tuple[Tensor, Tensor]],
        steps: Sequence[kernels.Step],
    ) -> Tensor:
        """Consecutive layers: hidden states [tokens, width], or of the chosen tokens [n, width].

        Args:
            angles, steps: those of layers that see all, then those of local ones.
        """
        architecture, single_token = self.architecture, steps[0].single_token
        residual: kernels.Residual | None = None  # is still to be added to the hidden states, which the next norm does
        for number in numbers:
            layer, kind = self.layers[number], int(architecture.is_local(number))
            step = steps[kind]
            if not architecture.norm_first:
                normed = hidden
            elif residual is None:
                normed = layer.attention_norm(hidden)
            else:
                normed, hidden = layer.attention_norm.of_sum(hidden, residual, single_token=single_token)
            parts = step.parted(layer.head_norms(layer.attention_in(normed)))
            if angles:
                parts = self.rotaries[kind].rotated(parts, angles[kind])
            attended = step.attend(parts, (cache[2 * number], cache[2 * number + 1]))
            if number == architecture.shape.layers - 1:  # from here on only the tokens whose logits are wanted count
                hidden, normed, attended = (paddle.index_select(x, chosen) for x in (hidden, normed, attended))
                single_token = True
            if architecture.parallel:
                beside = normed if layer.mlp_norm is None else layer.mlp_norm(hidden)
                residual = kernels.Residual(layer.mlp_out, self._inner(layer, beside))
                hidden = kernels.Residual(layer.attention_out, attended).added_to(hidden, single_token=single_token)
                continue
            middle = layer.mlp_norm if architecture.norm_first else layer.attention_norm
            gathered = kernels.Residual(layer.attention_out, attended)
            normed, hidden = middle.of_sum(self._base(hidden, normed), gathered, single_token=single_token)
            residual = kernels.Residual(layer.mlp_out, self._inner(layer, normed))
            if architecture.norm_first:
                hidden = self._base(hidden, normed)
            else:
                hidden, residual = (
                    layer.mlp_norm.of_sum(self._base(normed, normed), residual, single_token=single_token)[0],
                    None,
                )
        return hidden if residual is None else residual.added_to(hidden, single_token=single_token)

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

    def __init__(self, weights: Weights, names: LayerNames) -> None:
        super().__init__()
        self.attention_norm = weights.norm(names.attention_norm)
        self.attention_in = weights.joined(names.query_key_value, weights.by_part(names))
        self.head_norms = weights.head_norms(names)
        self.attention_out = weights.output(names.attention_out, names.attention_out_norm)
        self.mlp_norm = None if names.mlp_norm == names.attention_norm else weights.norm(names.mlp_norm)
        if len(names.mlp_in) == 2 or not weights.architecture.gated:
            columns = [(source, whole) for source in names.mlp_in]
        else:  # the gate's columns come first
            columns = [(names.mlp_in[0], first_half), (names.mlp_in[0], second_half)]
        self.mlp_in, *up = (weights.joined((source,), weights.own_columns(half)) for source, half in columns)
        if up:  # not one matrix with the gate: parting their outputs costs more than a second product
            self.mlp_up = up[0]
        self.mlp_out = weights.output(names.mlp_out, names.mlp_out_norm)


class _Rotary(nn.Layer):
    """Rotates queries and keys by their positions."""

    def __init__(self, rotary: Rotary, shape: ModelShape, dtype: str) -> None:
        super().__init__()
        self.rotary, self.shape, self.dtype = rotary, shape, dtype
        half = shape.head_dim // 2
        swap = np.zeros((2 * half, 2 * half), dtype=np.float32)
        swap[np.arange(half) + half, np.arange(half)] = -1.0
        swap[np.arange(half), np.arange(half) + half] = 1.0
        # x @ swap = (-second half, first half): a product is faster than cutting and joining
        self.swap = fixed(paddle.to_tensor(swap).astype(dtype))
        self.inverse = fixed(paddle.to_tensor(rotary.inverse.reshape(-1, 1, 1, half)))
        if rotary.stretch_power is not None:
            self.stretch_power = fixed(paddle.to_tensor(rotary.stretch_power))

    def angles(self, positions: Tensor, stretch: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin of queries, keys and values, each [batch, heads + 2 * kv_heads, length, head_dim]: tiled
        over the heads once, for all layers. Values are not rotated: parting them from the rest costs more.

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
        waves = []
        for wave, still in ((angles.cos(), 1.0), (angles.sin(), 0.0)):
            wave = wave if rotary.magnitude == 1.0 else wave * rotary.magnitude
            of_queries = wave
            if rotary.logn_length is not None:
                length = paddle.full([1], rotary.logn_length, dtype="float32")
                of_queries = wave * paddle.clip(paddle.log(places[0] + 1.0) / paddle.log(length), min=1.0).unsqueeze(1)
            parts = (of_queries, shape.heads), (wave, shape.kv_heads), (paddle.full_like(wave, still), shape.kv_heads)
            tiled = [paddle.tile(part, [1, count, 1, 1]) for part, count in parts]
            waves.append(paddle.concat(tiled, axis=1).astype(self.dtype))
        return waves[0], waves[1]

    def rotated(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Queries and keys by their positions, values as they are: [batch, heads + 2 * kv_heads, length, head_dim],
        which may be overwritten."""
        rotated = in_place.multiply(paddle.matmul(x, self.swap), angles[1])
        return in_place.add(in_place.multiply(x, angles[0]), rotated)
