"""How tensor parallelism shares a parameter among processes, and back: each rule once, for both directions.

NumPy only. A rule (`utils.model.weights.Split`) says along which axis a parameter, in the Paddle layout, is cut and
which runs of that axis a process holds; `split` copies the runs out, `join` copies them back.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from utils.model.architecture import ModelShape
from utils.model.weights import Split

PADDING = 128  # a padded vocabulary has fewer rows than this more for each process
Run = tuple[int, int, int]  # its place in the whole, its place in the part, its length


def axis_of(rule: Split | None, dimensions: int) -> int:
    """The axis along which a parameter of so many dimensions is cut."""
    return 0 if rule in ("row", "vocabulary") else dimensions - 1


def part_length(rule: Split | None, whole: int, sizes: ModelShape, degree: int) -> int:
    """How much of an axis of length `whole` each of `degree` processes holds.

    Vocabularies and grouped keys and values that the degree does not divide are held whole by every process.

    Raises:
        ValueError: the degree does not divide anything else.
    """
    if rule is None or (rule.startswith("vocabulary") and whole % degree):
        return whole
    if rule == "key_value" and sizes.kv_heads % degree:
        return whole
    if rule == "query_key_value" and sizes.kv_heads % degree:
        queries = sizes.heads * sizes.head_dim
        return queries // degree + whole - queries
    if whole % degree:
        raise ValueError(f"{whole} cannot be divided by {degree}")
    runs(rule, whole, whole // degree, sizes, degree, 0)
    return whole // degree


def runs(rule: Split | None, whole: int, part: int, sizes: ModelShape, degree: int, rank: int) -> list[Run]:
    """The runs of an axis of length `whole` that process `rank` of `degree` holds in a part of length `part`.

    Where processes hold the same run, the last of them counts in `join`.

    Raises:
        ValueError: no part of this length comes from such a whole.
    """
    wrong = ValueError(f"parts of {part} do not make {whole} with {degree} processes")
    if rule is None or (part == whole and rule.startswith("vocabulary")):
        if part != whole:
            raise wrong
        return [(0, 0, whole)] if rank == 0 else []
    if rule == "key_value":
        return _grouped(0, 0, whole, part, sizes, degree, rank)
    if rule.startswith("vocabulary"):
        if part * degree < whole or part * degree - whole >= max(1, PADDING * degree):
            raise wrong
        start = min(rank * part, whole)
        return [(start, 0, min(part, whole - start))]
    if rule == "query_key_value":
        width, narrow = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        own = width // degree
        if width + 2 * narrow != whole or sizes.heads % degree or (part - own) % 2:
            raise wrong
        few = (part - own) // 2
        return [
            (rank * own, 0, own),
            *_grouped(width, own, narrow, few, sizes, degree, rank),
            *_grouped(width + narrow, own + few, narrow, few, sizes, degree, rank),
        ]
    if part * degree != whole:
        raise wrong
    if rule == "halves":
        if whole % (2 * degree):
            raise wrong
        half, own = whole // 2, part // 2
        return [(rank * own, 0, own), (half + rank * own, own, own)]
    if rule == "by_head":
        width, size = sizes.heads * sizes.head_dim, sizes.head_dim
        if 3 * width != whole or sizes.heads % degree:
            raise wrong
        few = sizes.heads // degree
        return [
            (kind * width + (rank * few + head) * size, (3 * head + kind) * size, size)
            for head in range(few)
            for kind in range(3)
        ]
    return [(rank * part, 0, part)]  # "column" and "row"


def _grouped(start: int, place: int, whole: int, part: int, sizes: ModelShape, degree: int, rank: int) -> list[Run]:
    """Heads of keys or values: a share each, or all in every process, or one head in several processes."""
    size = sizes.head_dim
    if whole != sizes.kv_heads * size or part % size or not part:
        raise ValueError(f"parts of {part} do not make {sizes.kv_heads} heads of {size} with {degree} processes")
    held = part // size
    if held * degree == sizes.kv_heads:
        return [(start + rank * part, place, part)]
    shared, rest = divmod(degree, sizes.kv_heads)  # processes that read the same head
    if held == 1 and not rest:
        return [(start + rank // shared * size, place, size)]
    if part != whole:
        raise ValueError(f"{held} heads do not make {sizes.kv_heads} with {degree} processes")
    if rank == 0:
        return [(start, place, whole)]
    if rest:
        return []
    own = rank // shared * size  # every process trains only the head that it reads, in its own copy
    return [(start + own, place + own, size)]


def split(
    values: np.ndarray,
    rule: Split | None,
    sizes: ModelShape,
    degree: int,
    rank: int,
    part: int | None = None,
) -> np.ndarray:
    """What process `rank` of `degree` holds of a parameter.

    Args:
        values: the parameter in the Paddle layout, of any type.
        sizes: of the model.
        part: the length of the part along the axis that is cut, where not the usual one (padded with zeros).

    Returns:
        A new array of the same type; `values` itself where it is not cut.

    Raises:
        ValueError: the parameter cannot be shared so.
    """
    axis = axis_of(rule, values.ndim)
    whole = values.shape[axis]
    length = part_length(rule, whole, sizes, degree) if part is None else part
    if length == whole:
        return values
    out = np.zeros((*values.shape[:axis], length, *values.shape[axis + 1 :]), values.dtype)
    for source, target, count in runs(rule, whole, length, sizes, degree, rank):
        out[_along(axis, target, count)] = values[_along(axis, source, count)]
    return out


def join(
    parts: Iterable[np.ndarray], rule: Split | None, shape: tuple[int, ...], sizes: ModelShape, degree: int
) -> np.ndarray:
    """A parameter from what all processes hold of it.

    Args:
        parts: in the order of the processes, of one type and shape; each is dropped before the next is asked for.
        shape: of the whole parameter. A part with more of a vocabulary than that loses its padding.

    Raises:
        ValueError: the parts do not make a parameter of this shape.
    """
    axis = axis_of(rule, len(shape))
    out: np.ndarray | None = None
    for rank, part in enumerate(parts):
        if out is None:
            out = np.empty(shape, part.dtype)
        for target, source, count in runs(rule, shape[axis], part.shape[axis], sizes, degree, rank):
            out[_along(axis, target, count)] = part[_along(axis, source, count)]
        del part
    if out is None:
        raise ValueError("no parts")
    return out


def _along(axis: int, start: int, count: int) -> tuple[slice, ...]:
    return (slice(None),) * axis + (slice(start, start + count),)
