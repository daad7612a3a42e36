"""The parameters of a model and the tensors of published checkpoints that they come from. No Paddle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from utils.model.architecture import Architecture, Role

# How tensor parallelism shares a parameter (in the Paddle layout: a Linear's matrix is [in, out]) among processes:
# "column", "row": equal parts of the outputs (also of their bias), or of the inputs.
# "vocabulary", "vocabulary_columns": rows of a table, or columns of a head; where the degree does not divide
#     them every process has all, or the last ones are padded.
# "key_value": outputs by whole heads; too few heads are not shared.
# "query_key_value": all queries, then all keys, then all values; each of the three is shared by heads.
# "by_head": the same, but a share has the query, key and value of one head behind those of another.
# "halves": two halves, such as gate and up, of which each is shared.
Split = Literal[
    "column", "row", "vocabulary", "vocabulary_columns", "key_value", "query_key_value", "by_head", "halves"
]


@dataclass(frozen=True)
class Weight:
    """How one tensor of the Hugging Face layout maps to one parameter of the Paddle model.

    Attributes:
        published: its name in published checkpoints.
        parameter: the name of the Paddle model's parameter.
        transpose: Paddle's Linear keeps [in, out] where PyTorch keeps [out, in].
        conv1d: the matrix of a Linear that is published as [in, out] too (GPT-2's Conv1D).
        part: (index, count): the parameter is one of `count` equal parts of the published tensor along
            its output axis, such as the query of a fused query, key and value.
        split: how tensor parallelism shares the parameter; None gives every process all of it.
    """

    published: str
    parameter: str
    transpose: bool = False
    conv1d: bool = False
    part: tuple[int, int] | None = None
    split: Split | None = None

    @property
    def is_linear(self) -> bool:
        """Whether the parameter is the matrix of a Linear layer."""
        return self.transpose or self.conv1d

    @property
    def output_axis(self) -> int:
        """The axis of the published tensor (matrix or bias) along which its parts lie."""
        return 0 if self.transpose else -1


@dataclass(frozen=True)
class Stored:
    """How the files of a family hold its parameters, where that does not follow from the architecture.

    Attributes:
        published: what published checkpoints call things, by our names: of the parts of a layer within it, else from
            the beginning of a whole name to one of its dots. What is longest counts, and the rest of a name stays.
            Names that have one published name are equal parts of it, in this order.
        conv1d: the matrices of layers are published as [in, out] (GPT-2's Conv1D).
        heads_together: shards of tensor-parallel runs hold a joined query, key and value head by head, though the whole
            matrix does not.
    """

    published: Mapping[str, str] = field(default_factory=dict)
    conv1d: bool = False
    heads_together: bool = False

    def name(self, parameter: str) -> str:
        """The published name of a parameter, or of a part of a layer."""
        found = parameter
        while found not in self.published:
            found, dot, _ = found.rpartition(".")
            if not dot:
                return parameter
        return self.published[found] + parameter[len(found) :]

    def part(self, name: str) -> tuple[int, int] | None:
        """Which of how many equal parts of a published tensor a part of a layer is."""
        alike = [ours for ours, theirs in self.published.items() if theirs == self.published.get(name)]
        return (alike.index(name), len(alike)) if len(alike) > 1 else None


@dataclass(frozen=True)
class _Operator:
    """Something that has a weight, and maybe a bias.

    Attributes:
        split: of the weight.
        kind: the last part of the weight's name.
    """

    name: str
    split: Split | None = None
    linear: bool = False
    biased: bool = False
    kind: str = "weight"

    def weights(self, published: str, conv1d: bool = False, part: tuple[int, int] | None = None) -> Iterator[Weight]:
        """
        Args:
            published: the name of the weight in published checkpoints.
        """
        transposed, straight = self.linear and not conv1d, self.linear and conv1d
        yield Weight(published, f"{self.name}.{self.kind}", transposed, straight, part, self.split)
        if self.biased:  # a bias belongs to the outputs: of rows all processes have all
            split = None if self.split == "row" else self.split
            yield Weight(f"{published.rpartition('.')[0]}.bias", f"{self.name}.bias", part=part, split=split)


def weights(architecture: Architecture, stored: Stored) -> list[Weight]:
    """Every weight of a model: what comes before the layers, the layers in their order, what comes behind them."""
    found: list[Weight] = []
    for operator in _before(architecture):
        found += operator.weights(stored.name(f"{operator.name}.{operator.kind}"))
    inside = _of_layer(architecture, heads_together=stored.heads_together)
    for number in range(architecture.shape.layers):
        place = f"{architecture.layers}.{number}"
        for operator in inside:
            published = f"{stored.name(place)}.{stored.name(operator.name)}.weight"
            part = stored.part(operator.name)
            found += replace(operator, name=f"{place}.{operator.name}").weights(published, stored.conv1d, part)
    for operator in _behind(architecture):
        found += operator.weights(stored.name(f"{operator.name}.{operator.kind}"))
    return found


def _before(architecture: Architecture) -> Iterator[_Operator]:
    yield _Operator(architecture.embedding, "vocabulary")
    if architecture.embedding_norm is not None:
        yield _norm(architecture, architecture.embedding_norm)
    if architecture.embedding_projection is not None:
        yield _Operator(architecture.embedding_projection, "column", linear=True)
    for table in architecture.tables:
        yield _Operator(table.name)


def _behind(architecture: Architecture) -> Iterator[_Operator]:
    if architecture.final_norm is not None:
        yield _norm(architecture, architecture.final_norm)
    if architecture.output_projection is not None:
        yield _Operator(architecture.output_projection, "column", linear=True)
    if architecture.head is not None:
        name, _, kind = architecture.head.rpartition(".")
        split: Split = "vocabulary" if architecture.head_is_table else "vocabulary_columns"
        yield _Operator(name, split, not architecture.head_is_table, "head" in architecture.biased, kind)


def _norm(architecture: Architecture, name: str) -> _Operator:
    return _Operator(name, biased=architecture.norm == "layer")


def _of_layer(architecture: Architecture, *, heads_together: bool) -> list[_Operator]:
    """The operators of any layer, by their names within it."""
    parts = architecture.parts
    inner: Split = "halves" if architecture.gated and len(parts.mlp_in) == 1 else "column"

    def linears(role: Role, names: tuple[str, ...], *splits: Split) -> list[_Operator]:
        biased = role in architecture.biased
        return [_Operator(name, split, True, biased) for name, split in zip(names, splits, strict=True)]

    def norms(*names: str | None) -> list[_Operator]:
        return [_norm(architecture, name) for name in names if name is not None]

    attention = [
        *linears("query_key_value", parts.query_key_value, *_heads(architecture, heads_together=heads_together)),
        *linears("attention_out", (parts.attention_out,), "row"),
        *map(_Operator, parts.head_norms),
        *norms(parts.attention_out_norm),
    ]
    mlp = [
        *linears("mlp_in", tuple(sorted(parts.mlp_in)), *[inner] * len(parts.mlp_in)),
        *linears("mlp_out", (parts.mlp_out,), "row"),
        *norms(parts.mlp_out_norm),
    ]
    first = norms(parts.attention_norm)
    second = norms(None if parts.mlp_norm == parts.attention_norm else parts.mlp_norm)
    if parts.norms == "between":
        return first + attention + second + mlp
    return first + second + attention + mlp if parts.norms == "first" else attention + mlp + first + second


def _heads(architecture: Architecture, *, heads_together: bool) -> tuple[Split, ...]:
    """How processes share the matrices of queries, keys and values."""
    parts, shape = architecture.parts, architecture.shape
    if len(parts.query_key_value) == 3:
        narrow: Split = "column" if shape.kv_heads == shape.heads else "key_value"
        return "column", narrow, narrow
    if parts.by_head:
        return ("column",)
    return ("by_head" if heads_together else "query_key_value",)
