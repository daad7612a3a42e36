"""Which layers and parameters of a model a pipeline stage has. No Paddle."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.families.base import FamilySpec
from utils.parallel.topology import Layout


@dataclass(frozen=True)
class Part:
    """Neighbouring layers that are computed in one go.

    Attributes:
        layers: their numbers.
        first, last: whether the embedding stands before them, final norm and head behind them.
    """

    layers: range
    first: bool
    last: bool


def all_parts(layout: Layout, layers: int) -> list[Part]:
    """A model's layers spread over all stages as evenly as can be, in the order of a forward pass.

    With several parts a stage (virtual stages) a pass goes round the stages several times: part p belongs to
    stage p modulo their number.
    """
    count = layout.pipeline * layout.virtual
    cuts = [layers * number // count for number in range(count + 1)]
    return [Part(range(cuts[n], cuts[n + 1]), n == 0, n == count - 1) for n in range(count)]


def own_parts(layout: Layout, layers: int) -> list[Part]:
    """The parts of this rank's stage, in the order of a forward pass."""
    return all_parts(layout, layers)[layout.coordinates(layout.rank)[1] :: layout.pipeline]


def tied_name(family: FamilySpec, config: Mapping[str, Any]) -> str | None:
    """The parameter that is both embedding and head, which the first and the last stage have; None without one."""
    if not family.shape(config).tied:
        return None
    return next(weight.parameter for weight in family.weights(config) if weight.split == "vocabulary")


def names_elsewhere(family: FamilySpec, config: Mapping[str, Any], parts: Sequence[Part]) -> frozenset[str]:
    """The parameters of which a stage with these parts has nothing.

    `FamilySpec.weights` lists them in the order of a forward pass: what stands before the layers belongs to the
    embedding, what stands behind them to the final norm and the head.
    """
    return frozenset(_elsewhere(family, config, parts))


def _elsewhere(family: FamilySpec, config: Mapping[str, Any], parts: Sequence[Part]) -> Iterator[str]:
    own = {number for part in parts for number in part.layers}
    first, last = any(part.first for part in parts), any(part.last for part in parts)
    layers, tied = family.architecture(config).layers, tied_name(family, config)
    of_layer = re.compile(rf"{re.escape(layers)}\.(\d+)\.")
    before = True
    for weight in family.weights(config):
        name = weight.parameter
        if found := of_layer.match(name):
            before, here = False, int(found[1]) in own
        else:
            here = (first if before else last) or (name == tied and (first or last))
        if not here:
            yield name
