"""The operators of the generic decoder: one face, plain Paddle behind it.

Sizes that a program must leave open (batch, length, cached positions) are never read here as numbers, so
that the same code traces into a static program. On CPUs a broadcast over a middle axis costs tens of times
the operator itself, so what every layer needs is tiled once and then used as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.incubate.nn.functional import fused_rms_norm

from utils.errors import UserError
from utils.kernels import in_place
from utils.kernels.arrays import fixed

HIDDEN = -1e30  # added to the score of a key that is not seen
BLOCK = 128  # tokens whose attention is computed together
PIECES = 4  # blocks of a static program, whose number of blocks is fixed; of a short text the first ones are empty

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate=True),
    "gelu_fast": partial(F.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(F.gelu, approximate=True),
    "relu": in_place.relu,
    "silu": in_place.silu,
    "swish": in_place.silu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of a published name. It may overwrite what it is given.

    Raises:
        UserError: no such activation.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"config.json: activation {name!r} is not known; known are {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


class Operator(nn.Layer):
    """A layer without hooks. Its tensors are its parameters and are read by `self.`: so the tracer finds them."""

    def __call__(self, x: Tensor) -> Tensor:  # the library's costs as much as a small operator
        return self.forward(x)


class Table(Operator):
    """A table [vocabulary, width]: embeddings of tokens, logits of hidden states, or both.

    Kept in two halves where the vocabulary is even: the product of one row with one matrix runs on one
    core only, that with two matrices on two. A head may add a bias [vocabulary].
    """

    def __init__(self, values: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.has_bias = bias is not None
        if bias is not None:
            self.bias = fixed(bias)
        self.vocabulary, width = values.shape
        self.halved = self.vocabulary % 2 == 0
        self.weight = fixed(values.reshape([2, self.vocabulary // 2, width]) if self.halved else values)

    def embeddings(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., width]."""
        if not self.halved:
            return F.embedding(ids, self.weight)
        half = self.vocabulary // 2
        return paddle.gather_nd(self.weight, paddle.stack([ids // half, ids % half], axis=-1))

    def forward(self, x: Tensor) -> Tensor:
        """[rows, width] -> logits [rows, vocabulary]."""
        if self.halved:
            both = paddle.matmul(paddle.tile(x.unsqueeze(0), [2, 1, 1]), self.weight, transpose_y=True)
            logits = in_place.reshape(both.transpose([1, 0, 2]), [-1, self.vocabulary])
        else:
            logits = paddle.matmul(x, self.weight, transpose_y=True)
        return in_place.add(logits, self.bias) if self.has_bias else logits


class Product(Protocol):
    """A matrix, or one with a norm behind it."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def added(self, x: Tensor, base: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Residual:
    """What attention or MLP adds to the hidden states: the last product of either, not yet computed."""

    product: Product
    x: Tensor

    def computed(self) -> Tensor:
        return self.product(self.x)

    def added_to(self, hidden: Tensor, *, single_token: bool) -> Tensor:
        """The sum [n, width], which takes the place of the hidden states: what a group of layers returns stays as long
        as a program runs.

        Args:
            single_token: whether there is one of each row; of many the product is added as it is computed.
        """
        return in_place.add(hidden, self.computed()) if single_token else self.product.added(self.x, hidden)


class Norm(Operator):
    """A normalisation over the last axis."""

    def of_sum(self, hidden: Tensor, residual: Residual, *, single_token: bool) -> tuple[Tensor, Tensor]:
        """That of hidden states with a residual, and their sum; all [n, width]. `hidden` may be overwritten.

        Args:
            single_token: whether there is one of each row.
        """
        total = residual.added_to(hidden, single_token=single_token)
        return self(total), total


class RMSNorm(Norm):
    """x / sqrt(mean(x²) + epsilon) * weight [width] (Zhang & Sennrich 2019, arXiv:1910.07467), by Paddle's fused
    operator, which can add the residual as well."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = fixed(weight), epsilon
        self.on_cpu = weight.place.is_cpu_place()

    def forward(self, x: Tensor) -> Tensor:
        return fused_rms_norm(x, self.weight, None, self.epsilon, -1)[0]

    def of_sum(self, hidden: Tensor, residual: Residual, *, single_token: bool) -> tuple[Tensor, Tensor]:
        if self.on_cpu and not single_token:  # the fused sum goes to new memory, slow in some processes
            return super().of_sum(hidden, residual, single_token=single_token)
        normal, total = fused_rms_norm(residual.computed(), self.weight, None, self.epsilon, -1, residual=hidden)[:2]
        return normal, total


class LayerNorm(Norm):
    """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last axis; both [width]."""

    def __init__(self, weight: Tensor, bias: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight, self.bias, self.epsilon = fixed(weight), fixed(bias), epsilon
        self.width = list(weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.width, self.weight, self.bias, self.epsilon)


@dataclass(frozen=True)
class Block:
    """Consecutive new tokens and what they see.

    Attributes:
        first, end: their places. Numbers, or where a program leaves the length open int64 tensors [2], of a head
            and a token, as each layer cuts queries out with one operator.
        start, seen: the places of the cache that they see, from 0 on; numbers or tensors [1].
        mask: what is added to their scores, tiled over heads, [batch, kv_heads, group * tokens, seen] float32.
        by_key: the shape of queries with those of one key head behind each other, [batch, kv_heads, group * tokens,
            head_dim]; -1 is what is left, or an int64 tensor [4]: nothing is left in an empty block.
        by_query: [batch, heads, tokens, head_dim], likewise.
    """

    first: Any
    end: Any
    start: Any
    seen: Any
    mask: Tensor
    by_key: Any
    by_query: Any


def blocks_of(
    visible: Tensor, keys: Tensor | None, slopes: Tensor | None, *, heads: int, kv_heads: int, width: int, pieces: int
) -> list[Block]:
    """The blocks that attention works on: what no token of a block sees is not computed.

    Args:
        visible: [batch, 1, length, seen] bool, the first places of the cache. Of several blocks, token t sees none of
            the last length - 1 - t.
        keys: [batch, seen] int64, the key's place in its text.
        slopes: [kv_heads] float32 of linear biases (ALiBi), where each head has keys of its own; they count the
            key's place alone, since the query's adds the same to a whole row, which softmax removes.
        width: of a head.
        pieces: number of blocks, of which the first see less where no token sees a later one; 0 chooses.
    """
    length, seen = visible.shape[2:]
    is_open = length < 0  # in a static program, whose blocks may be empty
    if is_open:
        batch, length, seen = (paddle.shape(visible)[axis] for axis in (0, 2, 3))
    pieces = pieces or (PIECES if is_open else -(-length // BLOCK))
    if is_open and pieces > 1:
        size = paddle.clip((length + pieces - 1) // pieces, min=BLOCK)
        borders = [paddle.clip(length - size * number, min=0) for number in range(pieces, -1, -1)]
    else:
        borders = [length * number // pieces for number in range(pieces + 1)]
    scores = paddle.where(visible, paddle.zeros([1]), paddle.full([1], HIDDEN))
    if slopes is not None and keys is not None:
        scores = scores + slopes.reshape([1, -1, 1, 1]) * keys.astype("float32").unsqueeze([1, 2])
    group, found = heads // kv_heads, []
    for first, end in pairwise(borders):
        before = seen - length + end
        part = scores if pieces == 1 else scores[:, :, first:end, :before]
        if group > 1 or slopes is None:
            part = paddle.tile(part, [1, kv_heads, group, 1])  # queries of one key head behind each other
        by_key, by_query = _sizes(0, kv_heads, -1, width), _sizes(0, heads, -1, width)
        if not is_open:
            found.append(Block(first, end, 0, before, part, by_key, by_query))
            continue
        if pieces > 1:
            tokens = end - first
            by_key, by_query = _together(batch, kv_heads, tokens * group, width), _together(batch, heads, tokens, width)
        starts, ends = _together(0, first), _together(heads, end)
        found.append(Block(starts, ends, _size(0), _together(before), part, by_key, by_query))
    return found


def _together(*numbers: Any) -> Tensor:
    """Numbers and tensors of one as one int64 tensor."""
    tensors = [paddle.full([], x, "int64") if isinstance(x, int) else x.astype("int64") for x in numbers]
    return paddle.stack(tensors)


def _sizes(*numbers: int) -> Any:
    """Numbers as operators take them: in a static program a tensor, as a list is an operator wherever it is used."""
    if paddle.in_dynamic_mode():
        return list(numbers)
    return paddle._C_ops.full_int_array(list(numbers), paddle.int64, paddle.CPUPlace())


def _size(number: int) -> Any:
    """A number, or likewise a tensor [1]."""
    return number if paddle.in_dynamic_mode() else _sizes(number)


def _axis(number: int) -> Any:
    """The number of an axis, likewise."""
    return number if paddle.in_dynamic_mode() else paddle.full([1], number, "int32")


@dataclass(frozen=True)
class Targets:
    """Where the keys and values of new tokens go, the same for every layer.

    Attributes:
        rows: int64 [n], of a cache whose axes before the last one are made one: one for each vector of a key head.
        shape: of the cache; an int64 tensor [4] in a static program.
    """

    rows: Tensor
    shape: Any

    @classmethod
    def at(cls, places: Tensor, cache: Tensor) -> Targets:
        """
        Args:
            places: int64 [batch, length], of the new tokens in the cache.
            cache: of any layer, [batch, kv_heads, capacity, head_dim].
        """
        shape: Any = cache.shape if paddle.in_dynamic_mode() else paddle.shape(cache)
        kv_heads = cache.shape[1]
        firsts = paddle.arange(shape[0] * kv_heads, dtype="int64") * shape[2]  # place 0 of each row's heads
        rows = firsts.reshape([-1, kv_heads, 1]) + places.unsqueeze(1)
        return cls(rows.reshape([-1]), shape)

    def write(self, cache: Tensor, new: Tensor) -> Tensor:
        """The cache with new keys or values, of its layout, which are written over it."""
        rows = in_place.scatter(in_place.merge(cache, 3), self.rows, in_place.merge(new, 3))
        return cache if paddle.in_dynamic_mode() else in_place.reshape(rows, self.shape)


@dataclass(frozen=True)
class Step:
    """What attention needs to know of new tokens, the same for every layer. Sizes are as `_sizes` makes them.

    Attributes:
        single_token: whether there is one token of each row, which sees all places of the cache: it is not copied.
        blocks: of the tokens.
        targets: where their keys and values go.
        by_head: the shape of queries, keys and values by heads, [batch, length, heads + 2 * kv_heads, head_dim], of
            one token [batch, heads + 2 * kv_heads, 1, head_dim]; where a program leaves the length open, an int64
            tensor [4].
        heads: numbers of queries, keys and values, [3].
        borders: the first head of keys, of values, and the end: numbers or tensors [1].
        joined: the shape of what queries gather, [batch * length, heads * head_dim] or [batch, length, heads *
            head_dim].
        axes: axis 1 and axis 2.
    """

    single_token: bool
    blocks: list[Block]
    targets: Targets
    by_head: Any
    heads: Any
    borders: tuple[Any, Any, Any]
    joined: Any
    axes: tuple[Any, Any]

    @classmethod
    def of(
        cls,
        ids: Tensor,
        blocks: list[Block],
        targets: Targets,
        *,
        heads: int,
        kv_heads: int,
        width: int,
        single_token: bool,
        flat: bool,
    ) -> Step:
        """
        Args:
            ids: [batch, length], of the new tokens.
            blocks: of `blocks_of`; with one token the only one, or the last.
            flat: whether batch and length are one axis of what queries gather.
        """
        both = heads + 2 * kv_heads
        by_head: Any
        if single_token:
            by_head = _sizes(0, both, 1, width)
        elif paddle.in_dynamic_mode():
            by_head = [*ids.shape, both, width]
        else:
            by_head = _together(paddle.shape(ids)[0], paddle.shape(ids)[1], both, width)
        return cls(
            single_token,
            blocks[-1:] if single_token else blocks,
            targets,
            by_head,
            _sizes(heads, kv_heads, kv_heads),
            (_size(heads), _size(heads + kv_heads), _size(both)),
            _sizes(-1, heads * width) if flat else _sizes(0, 1 if single_token else 0, heads * width),
            (_axis(1), _axis(2)),
        )

    def parted(self, x: Tensor) -> Tensor:
        """Queries, keys and values by heads: [batch * length, all of them] -> [batch, heads + 2 * kv_heads, length,
        head_dim]. `x` may be overwritten."""
        x = in_place.reshape(x, self.by_head)
        return x if self.single_token else x.transpose([0, 2, 1, 3])

    def attend(self, parts: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        """Attention; the keys and values of the new tokens go into the cache first.

        Args:
            parts: of `parted`, queries already scaled.
            cache: keys and values, each [batch, kv_heads, capacity, head_dim]; they are written over.

        Returns:
            What queries gather, of the shape `joined`.
        """
        if self.single_token or len(self.blocks) == 1:
            query, key, value = paddle._C_ops.split(parts, self.heads, self.axes[0])
        else:  # each block cuts its queries by heads and tokens at once
            key, value = (_cut(parts, 1, *pair) for pair in pairwise(self.borders))
            query = parts
        return self._attend(query, key, value, cache)

    def attend_apart(self, query: Tensor, key: Tensor, value: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        """As `attend`, of what is not one tensor: [batch, length, heads or kv_heads, head_dim].

        Queries may be of a wider type than the cache; their scores are then computed in it.
        """
        if not self.single_token:
            query, key, value = (x.transpose([0, 2, 1, 3]) for x in (query, key, value))
        return self._attend(query, key.astype(cache[0].dtype), value.astype(cache[1].dtype), cache)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        """
        Args:
            query: [batch, heads, length, head_dim], of several blocks perhaps with further heads behind them; of one
                token its first axes may stand in any order, those of keys and values too.
        """
        many = not self.single_token and len(self.blocks) > 1
        queries = [_queries(query, block, self.borders[0]) for block in self.blocks] if many else [query]
        keys, values = self.targets.write(cache[0], key), self.targets.write(cache[1], value)
        found = []
        for block, part in zip(self.blocks, queries):  # noqa: B905 - it is traced
            seen = (
                (keys, values) if self.single_token else [_cut(x, 2, block.start, block.seen) for x in (keys, values)]
            )
            scores = paddle.matmul(in_place.reshape(part, block.by_key), seen[0].astype(part.dtype), transpose_y=True)
            found.append(paddle.matmul(_weights(scores, block.mask).astype(values.dtype), seen[1]))
        if self.single_token:
            return in_place.reshape(found[0], self.joined)
        found = [in_place.reshape(x, block.by_query) for x, block in zip(found, self.blocks)]  # noqa: B905
        attended = found[0] if len(found) == 1 else paddle.concat(found, axis=self.axes[1])
        return in_place.reshape(attended.transpose([0, 2, 1, 3]), self.joined)


def _queries(parts: Tensor, block: Block, heads: Any) -> Tensor:
    """The queries of a block [batch, heads, tokens, head_dim]."""
    if isinstance(block.end, int):
        return parts[:, :heads, block.first : block.end]
    return paddle.slice(parts, [1, 2], block.first, block.end)


def _cut(x: Tensor, axis: int, first: Any, end: Any) -> Tensor:
    """x from `first` to `end` along axis 1 or 2; by tensors [1] it is one operator of a program, not five."""
    if not isinstance(end, int):
        return paddle.slice(x, [axis], first, end)
    if axis == 1:
        return x[:, first:end]
    return x if (first, end) == (0, x.shape[2]) else x[:, :, first:end]


def _weights(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax in float32. It may take the place of the scores."""
    if scores.dtype == paddle.float32:
        return in_place.softmax(in_place.add(scores, mask))
    return F.softmax(scores.astype("float32") + mask, axis=-1).astype(scores.dtype)
