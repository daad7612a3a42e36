"""Which part of every parameter a rank holds under tensor parallelism. No Paddle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from utils.checkpoints.shards import axis_of, join, split
from utils.errors import raise_if
from utils.families.base import FamilySpec
from utils.model.weights import Split

_ADAPTER = ("lora_A", "lora_B")


class Parts:
    """How the tensor-parallel ranks of a run share the parameters of a model.

    A vocabulary or key and value heads that the degree does not divide are whole on every rank, as are the
    fused queries, keys and values of such a model, and projections between embedding and layers. What is fused
    is cut so that a part is fused in the same order.

    Attributes:
        degree: ranks that share a model's layers.
        rank: which of them this is.
    """

    def __init__(self, family: FamilySpec, config: Mapping[str, Any], degree: int = 1, rank: int = 0) -> None:
        self.sizes, self.degree, self.rank = family.shape(config), degree, rank
        self._stored = {weight.parameter: weight.split for weight in family.weights(config)}
        layers = family.architecture(config).layers
        self._running = {name: self._rule(rule, layers in name) for name, rule in self._stored.items()}

    def _rule(self, rule: Split | None, in_layer: bool) -> Split | None:
        sizes = self.sizes
        if self.degree == 1 or rule is None:
            return None
        if rule.startswith("vocabulary"):
            return None if sizes.vocabulary % self.degree else rule
        if not in_layer:
            return None
        if rule in ("key_value", "query_key_value"):
            return None if sizes.kv_heads % self.degree else rule
        return "query_key_value" if rule == "by_head" else rule

    @property
    def shares_vocabulary(self) -> bool:
        """Whether every rank has other rows of the embedding and of the head."""
        return self.degree > 1 and self.sizes.vocabulary % self.degree == 0

    @property
    def shares_key_value(self) -> bool:
        """Whether every rank has all key and value heads, and reads some of them."""
        return self.sizes.kv_heads % self.degree > 0

    @property
    def key_value_heads(self) -> slice:
        """The key and value heads that this rank has."""
        if self.shares_key_value:
            return slice(None)
        few = self.sizes.kv_heads // self.degree
        return slice(self.rank * few, (self.rank + 1) * few)

    @property
    def query_heads(self) -> list[int]:
        """The heads that this rank computes."""
        return self._queries_of(self.rank)

    def _queries_of(self, rank: int) -> list[int]:
        few = self.sizes.heads // self.degree
        return list(range(rank * few, (rank + 1) * few))

    @property
    def read_heads(self) -> list[int]:
        """The key and value heads that those read, in their order, where a rank need not have others."""
        return self.heads_read_by(self.rank)

    def heads_read_by(self, rank: int) -> list[int]:
        """The `read_heads` of a rank.

        Equally many heads read each. Where the degree neither divides the key and value heads nor is a multiple
        of their number, this takes as many copies as there are heads.
        """
        read = [head * self.sizes.kv_heads // self.sizes.heads for head in self._queries_of(rank)]
        divides = self.sizes.kv_heads % self.degree == 0 or self.degree % self.sizes.kv_heads == 0
        return list(dict.fromkeys(read)) if divides else read

    def rule(self, name: str) -> Split | None:
        """The rule by which a parameter is cut: one of the model, or of a LoRA layer in it.

        Of W + A B, A takes the inputs of W and B gives its outputs.
        """
        path, _, kind = name.rpartition(".")
        if kind not in _ADAPTER:
            return self._running.get(name)
        rule = self._running.get(f"{path}.weight")
        return rule if (rule == "row") == (kind == "lora_A") else None

    def check(self, matrices: Mapping[str, tuple[int, int]]) -> None:
        """Raises `UserError` unless the degree divides what is shared of parameters of these shapes."""
        lengths = {name: sizes[axis_of(self.rule(name), 2)] for name, sizes in matrices.items() if self.rule(name)}
        raise_if(
            [
                f"tensor_parallel_degree {self.degree} does not divide the {length} rows or columns of {name}"
                for name, length in lengths.items()
                if length % self.degree
            ]
        )

    def stored_rule(self, name: str) -> Split | None:
        """The rule by which shard files of tensor-parallel runs hold a parameter of the model."""
        return self._stored.get(name)

    def cut(self, name: str, values: np.ndarray) -> np.ndarray:
        """What this rank holds of a whole parameter, in the Paddle layout."""
        return split(values, self.rule(name), self.sizes, self.degree, self.rank)

    def whole_shape(self, name: str, shape: Iterable[int]) -> tuple[int, ...]:
        """The shape of a parameter of which a rank's part has this shape."""
        sizes, rule = list(shape), self.rule(name)
        if rule is not None:
            sizes[axis_of(rule, len(sizes))] *= self.degree
        return tuple(sizes)

    def join(self, name: str, parts: Iterable[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        """A whole parameter of a shape from the parts of all ranks, in their order."""
        return join(parts, self.rule(name), shape, self.sizes, self.degree)
