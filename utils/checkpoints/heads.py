"""A head that is stored beside the embedding it is declared tied to: the same values, or a head of its own?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from utils.checkpoints.tensors import LazyTensor, cast
from utils.errors import UserError, notice
from utils.families import FamilySpec

HEAD_NAMES = ("lm_head.weight", "lm_head.decoder_weight")  # under which the head of a tied model may be stored
_BLOCK = 1 << 22  # values compared at once


def with_own_head(
    folder: Path, config: dict[str, Any], family: FamilySpec, stored: Mapping[str, LazyTensor]
) -> dict[str, Any]:
    """The configuration of a model, untied where its head is stored with other values than its embedding.

    Values are read only where both are stored, a block at a time.

    Args:
        stored: the tensors of the checkpoint by name, in either layout.

    Raises:
        UserError: heads differ in a family whose head is always the embedding.
    """
    if not family.shape(config).tied:
        return config
    head = next((stored[name] for name in HEAD_NAMES if name in stored), None)
    table = _embedding(config, family, stored)
    if head is None or table is None or _same(table, head):
        return config
    untied = {**config, "tie_word_embeddings": False}
    said = f"{head.name} has other values than {table.name}"
    if family.shape(untied).tied:
        raise UserError(
            f"{folder}: {said}, but the head of a {family.title} model is its embedding; the weights were changed "
            f"or are damaged: copy them again, or remove {head.name}"
        )
    notice(f"{folder}: {said}, so it is used as a head of its own, although tie_word_embeddings ties them")
    return untied


def can_be_tied(family: FamilySpec, config: Mapping[str, Any]) -> bool:
    """Whether there are models of a family whose head is their embedding."""
    try:
        return family.shape({**config, "tie_word_embeddings": True}).tied
    except UserError:  # the family refuses it
        return False


def _embedding(config: Mapping[str, Any], family: FamilySpec, stored: Mapping[str, LazyTensor]) -> LazyTensor | None:
    """The table of the embedding, by its name in either layout, which may lack the prefix of the backbone."""
    parameter = f"{family.architecture(config).embedding}.weight"
    weight = next(weight for weight in family.weights(config) if weight.parameter == parameter)
    for name in (weight.published, parameter):
        for written in (name, name.split(".", 1)[1]):
            if written in stored:
                return stored[written]
    return None


def _same(table: LazyTensor, head: LazyTensor) -> bool:
    """Whether a head, [vocabulary, width] or [width, vocabulary], has the values of a table [vocabulary, width]."""
    if head.shape not in (table.shape, table.shape[::-1]):
        return False
    transposed = head.shape != table.shape
    rows = max(1, _BLOCK // max(1, table.shape[1]))
    for start in range(0, table.shape[0], rows):
        place = slice(start, start + rows)
        one, other = table.read()[place], (head.read().T if transposed else head.read())[place]
        if table.dtype != head.dtype:  # the one that was written again in another type has been rounded to it
            one, other = cast(one, head.dtype), cast(other, head.dtype)
        if not np.array_equal(one, other):
            return False
    return True
