"""What a decoder computes, as facts: enough for one generic decoder to stand in for every family's model.

No Paddle. Names are those of the Paddle model's parameters (see `Weight.parameter`) without ".weight" and ".bias".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
# Of a model that reads the beginning of a text in both directions: (ids [batch, length], ends [batch, length]) ->
# (positions int64 [parts, batch, length], who sees whom, bool [batch, 1, query, key]). For each token of packed rows
# `ends` says where its text ends (exclusive); None means that every row is one text.
PrefixReading = Callable[[Ints, Ints | None], tuple[Ints, NDArray[np.bool_]]]
Role = Literal["query_key_value", "attention_out", "mlp_in", "mlp_out", "head"]  # of a matrix
ATTENTION: tuple[Role, ...] = ("query_key_value", "attention_out")
MLP: tuple[Role, ...] = ("mlp_in", "mlp_out")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder: counts of heads, layers, vocabulary; `positions` is None without a limit."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    positions: int | None
    tied: bool

    @property
    def parameters(self) -> int:
        """Number of weights, norms and biases left out (below 1 %)."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.vocabulary * self.hidden * (1 if self.tied else 2)


@dataclass(frozen=True)
class Rotary:
    """How positions rotate queries and keys (Su et al. 2021, arXiv:2104.09864).

    The generic decoder rotates the pairs (i, i + head_dim / 2). Models that pair otherwise, or rotate a part
    of each head only, are brought into this form by `order`: products of queries and keys do not
    change when both are permuted alike, and what does not rotate has the frequency 0.

    Attributes:
        inverse: float32 [parts, head_dim / 2], radians per position, of each part of the positions; the
            angles of the parts add up.
        order: int64 [head_dim], the published place of each dimension; None is as published.
        magnitude: factor of cos and sin (YaRN).
        stretch_power: float32 [head_dim / 2]; a text's frequencies are inverse * stretch ** power
            (dynamic NTK, see `Text.stretch`); None where nothing is stretched.
        logn_length: queries behind this many positions are scaled by log(position + 1) / log(this);
            None scales none.
    """

    inverse: Floats
    order: NDArray[np.int64] | None = None
    magnitude: float = 1.0
    stretch_power: Floats | None = None
    logn_length: int | None = None


@dataclass(frozen=True)
class PositionTable:
    """Learned positions: row `position + offset` of a table of so many rows, for one part of the positions."""

    name: str
    rows: int
    part: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Initial:
    """How the matrices of a new model are drawn: each is the standard deviation of a normal distribution around 0.

    None is a uniform distribution within sqrt(6 / (rows + columns)) (Glorot & Bengio 2010). Biases begin as 0; norms
    multiply with 1.

    Attributes:
        linears: of layers, but for their outputs.
        outputs: of attention and MLP.
        tables: embedding, positions, and projections beside them.
        head: of one that is not the embedding.
    """

    linears: float | None = None
    outputs: float | None = None
    tables: float | None = None
    head: float | None = None

    @classmethod
    def spread(cls, deviation: float, *, layers: int | None = None, head: bool = True) -> Initial:
        """All alike.

        Args:
            layers: their number, if outputs are smaller the more of them add up (Radford et al. 2019, GPT-2).
            head: whether the head too, else it is drawn uniformly.
        """
        outputs = deviation if layers is None else deviation / (2 * layers) ** 0.5
        return cls(deviation, outputs, deviation, deviation if head else None)


@dataclass(frozen=True)
class LayerNames:
    """The parts of a layer, by their names within it; those that `Architecture.layer` gives are whole names.

    Attributes:
        query_key_value: one Linear with all three behind each other, or three Linears.
        mlp_norm: the name of `attention_norm` where both read the same.
        mlp_in: the Linears into the MLP; of a gated one the gate comes first (both in one Linear, or two).
        by_head: in the one Linear each head's query, key and value stand together.
        norms: where the norms stand among the parameters of a layer: before the matrices that read them, or before or
            behind all matrices.
        query_norm, key_norm: root mean squares of the queries and keys of each head, before they rotate.
        attention_out_norm, mlp_out_norm: of what is added to the hidden states.
        score_scale: factor of the attention scores; None is 1 / sqrt(head_dim).
    """

    attention_norm: str
    query_key_value: tuple[str, ...]
    attention_out: str
    mlp_norm: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    by_head: bool = False
    norms: Literal["between", "first", "last"] = "between"
    query_norm: str | None = None
    key_norm: str | None = None
    attention_out_norm: str | None = None
    mlp_out_norm: str | None = None
    score_scale: float | None = None

    @property
    def head_norms(self) -> tuple[str, ...]:
        """Norms that see the heads of a process only."""
        return tuple(name for name in (self.query_norm, self.key_norm) if name is not None)

    def within(self, place: str) -> LayerNames:
        """The same parts by their whole names."""

        def whole(name: Any) -> Any:
            if isinstance(name, str):
                return f"{place}.{name}"
            return None if name is None else tuple(map(whole, name))

        return replace(self, **{name: whole(getattr(self, name)) for name in _NAMES})


_NAMES = tuple(field.name for field in fields(LayerNames) if field.name not in ("by_head", "norms", "score_scale"))


@dataclass(frozen=True)
class Local:
    """Layers that see only what is near, among others that see all (Gemma 2 and 3).

    Attributes:
        layers: their numbers.
        window: how many tokens one sees, itself among them; a prefix is always seen.
        rotary: theirs, with the `order` of the other layers'.
    """

    layers: frozenset[int]
    window: int
    rotary: Rotary


@dataclass(frozen=True)
class Architecture:
    """A decoder.

    Attributes:
        shape: its sizes.
        layers: the path of its layers; behind it comes the number of one.
        parts: of each layer.
        norm: root mean square (without bias) or LayerNorm, everywhere.
        norm_offset: what is added to the weights of norms.
        embedding_scale: what the embeddings of tokens are multiplied with.
        activation: of the MLP, by its published name (see `utils.kernels.inference`).
        gated: activation(gate) * up instead of activation(x).
        biased: the matrices that have a bias.
        head: the parameter of the logits, a table [vocabulary, width] or a matrix [width, vocabulary], by its
            whole name; None is the embedding.
        head_is_table: which of the two.
        norm_first: norms stand before attention and MLP, else after the sums.
        residual: what the outputs of attention and MLP are added to: the hidden states, or their norm.
        residual_factor: what that is multiplied with.
        parallel: the MLP reads the hidden states before attention, through its own norm or attention's, and both
            outputs are added at once (Wang & Komatsuzaki 2021, GPT-J); only with `norm_first` and `residual` "hidden".
        causal: whether no token ever sees a later one.
        prefix_reading: where tokens stand and what they see, if not.
        window: how many tokens one sees, itself among them; None sees all before it.
        wide_scores: attention scores would overflow float16 and are computed in float32.
        scale_by_layer: whether the scores of layer n are divided by n + 1 (GPT-2's `scale_attn_by_inverse_layer_idx`).
        slopes: float32 [heads] of linear biases by position (ALiBi, arXiv:2108.12409), or None.
        embedding_width: of an embedding with a projection behind it.
        initial: how the weights of a new model are drawn.
    """

    shape: ModelShape
    layers: str
    parts: LayerNames
    embedding: str
    norm: Literal["rms", "layer"]
    epsilon: float
    activation: str
    gated: bool
    final_norm: str | None
    biased: tuple[Role, ...] = ()
    head: str | None = None
    head_is_table: bool = False
    embedding_norm: str | None = None
    embedding_projection: str | None = None
    output_projection: str | None = None
    tables: tuple[PositionTable, ...] = ()
    rotary: Rotary | None = None
    local: Local | None = None
    slopes: Floats | None = None
    causal: bool = True
    prefix_reading: PrefixReading | None = None
    window: int | None = None
    wide_scores: bool = False
    embedding_width: int | None = None
    initial: Initial = Initial()
    norm_first: bool = True
    residual: Literal["hidden", "normed"] = "hidden"
    residual_factor: float = 1.0
    parallel: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    scale_by_layer: bool = False

    @property
    def head_layer(self) -> str:
        """The layer that has the head; where the embedding is the head, the name that files give a second copy."""
        return "lm_head" if self.head is None else self.head.rpartition(".")[0]

    def layer(self, number: int) -> LayerNames:
        """The parts of one layer."""
        parts = self.parts.within(f"{self.layers}.{number}")
        if not self.scale_by_layer:
            return parts
        scale = self.shape.head_dim**-0.5 if parts.score_scale is None else parts.score_scale
        return replace(parts, score_scale=scale / (number + 1))

    def is_local(self, number: int) -> bool:
        """Whether a layer is one of `local`."""
        return self.local is not None and number in self.local.layers

    @property
    def plain_scores(self) -> bool:
        """Whether attention scores have no biases, and the type of queries and keys."""
        return self.slopes is None and not self.wide_scores

    @property
    def position_parts(self) -> int:
        """Number of positions of each token."""
        learned = max((table.part + 1 for table in self.tables), default=1)
        return learned if self.rotary is None else self.rotary.inverse.shape[0]

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The shapes of the big parameters in the Paddle layout, by whole name.

        Linears are [in, out], tables [vocabulary, width].
        """
        shape = self.shape
        wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        found: dict[str, tuple[int, int]] = {}
        width = self.embedding_width or shape.hidden
        found[f"{self.embedding}.weight"] = (shape.vocabulary, width)
        if self.embedding_projection is not None:
            found[f"{self.embedding_projection}.weight"] = (width, shape.hidden)
        if self.output_projection is not None:
            found[f"{self.output_projection}.weight"] = (shape.hidden, width)
        for number in range(shape.layers):
            layer = self.layer(number)
            apart = len(layer.query_key_value) > 1
            outputs = (wide, narrow, narrow) if apart else (wide + 2 * narrow,)
            for name, size in zip(layer.query_key_value, outputs, strict=True):
                found[f"{name}.weight"] = (shape.hidden, size)
            inner = shape.intermediate * (2 if self.gated and len(layer.mlp_in) == 1 else 1)
            for name in layer.mlp_in:
                found[f"{name}.weight"] = (shape.hidden, inner)
            found[f"{layer.attention_out}.weight"] = (wide, shape.hidden)
            found[f"{layer.mlp_out}.weight"] = (shape.intermediate, shape.hidden)
        if self.head is not None and self.head_is_table:
            found[self.head] = (shape.vocabulary, width)
        elif self.head is not None:
            found[self.head] = (width, shape.vocabulary)
        return found


def rotated_halves(head_dim: int, rotated: int, base: float) -> Rotary:
    """Of heads whose first `rotated` dimensions rotate in halves (i, i + rotated / 2), the others not at all."""
    inverse = np.zeros(head_dim // 2, dtype=np.float64)
    inverse[: rotated // 2] = base ** (-np.arange(0, rotated, 2) / rotated)
    half, rest = rotated // 2, (head_dim - rotated) // 2
    still = rotated + rest
    order = np.r_[0:half, rotated:still, half:rotated, still:head_dim].astype(np.int64)
    return Rotary(inverse[None].astype(np.float32), None if rotated == head_dim else order)


def rotated_neighbours(head_dim: int, rotated: int, ratio: float = 1.0) -> Rotary:
    """Of heads whose first `rotated` dimensions rotate in pairs of neighbours (2i, 2i + 1), the others not at all.

    Args:
        ratio: what positions are divided by.
    """
    inverse = np.zeros(head_dim // 2, dtype=np.float64)
    inverse[: rotated // 2] = 10000.0 ** (-np.arange(0, rotated, 2) / rotated) / ratio
    still = rotated + (head_dim - rotated) // 2
    order = np.r_[0:rotated:2, rotated:still, 1:rotated:2, still:head_dim].astype(np.int64)
    return Rotary(inverse[None].astype(np.float32), order)


def alibi_slopes(heads: int) -> Floats:
    """Slopes of linear position biases (Press et al. 2021, arXiv:2108.12409), [heads].

    Heads beyond the largest power of two take every other slope of twice that many.
    """

    def powers(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (number + 1) / count) for number in range(count)]

    whole = 1 << (heads.bit_length() - 1)
    return np.array(powers(whole) + powers(2 * whole)[::2][: heads - whole], dtype=np.float32)
