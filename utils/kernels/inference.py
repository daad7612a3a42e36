"""The operators of the generic decoder: one face, plain Paddle behind it.

Sizes that a program must leave open (batch, length, cached positions) are never read here as numbers, so
that the same code traces into a static program. On CPUs a broadcast over a middle axis costs tens of times
the operator itself, so what every layer needs is spread once, by `spread`, and then used as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.incubate.nn.functional import fused_rms_norm

from utils.errors import UserError
from utils.kernels import in_place

HIDDEN = -1e30  # added to the score of a key that is not seen
BLOCK = 128  # tokens whose attention is computed together
PIECES = 4  # blocks of a static program, whose number of blocks is fixed

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


def fixed(tensor: Tensor) -> Tensor:
    """A tensor as a parameter that is not trained: the tracer of static programs takes no other for a constant."""
    return paddle.base.framework.EagerParamBase.from_tensor(tensor, trainable=False)


class Operator(nn.Layer):
    """A layer without hooks. Its tensors are its parameters and are read by `self.`: so the tracer finds them."""

    def __call__(self, x: Tensor) -> Tensor:  # the library's costs as much as a small operator
        return self.forward(x)


class Linear(Operator):
    """x @ weight [in, out] + bias [out], if there is one."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = fixed(weight)
        self.has_bias = bias is not None
        if bias is not None:
            self.bias = fixed(bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        y = paddle.matmul(x, self.weight)
        return in_place.add(y, self.bias) if self.has_bias else y


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


class Norm(Operator):
    """A normalisation over the last axis."""

    def of_sum(self, x: Tensor, residual: Tensor, *, one: bool) -> tuple[Tensor, Tensor]:
        """That of x + residual, and the sum itself; both as `x`, which may be overwritten.

        Args:
            one: whether there is one token of each row.
        """
        total = in_place.add(x, residual)
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

    def of_sum(self, x: Tensor, residual: Tensor, *, one: bool) -> tuple[Tensor, Tensor]:
        if self.on_cpu and not one:  # the fused sum goes to new memory, slow in some processes
            return super().of_sum(x, residual, one=one)
        normal, total = fused_rms_norm(x, self.weight, None, self.epsilon, -1, residual=residual)[:2]
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
    """Consecutive new tokens and what they see, the same for every layer.

    Attributes:
        first, end: their places. Numbers, or where a program leaves the length open int64 tensors [2], of a head
            and a token, as each layer cuts queries out with one operator.
        seen: number of keys that they see, the first ones, those of the cache among them. A number or a tensor [1].
        mask: what is added to their scores, spread over heads, [batch, kv_heads, group * tokens, keys] float32.
        start: of the text: 0, as `seen`.
        by_key: the shape of queries with those of one key head behind each other, [batch, kv_heads, group * tokens,
            head_dim]; -1 is what is left, or an int64 tensor [4]: nothing is left in an empty block.
        by_query: [batch, heads, tokens, head_dim], likewise.
    """

    first: Any
    end: Any
    seen: Any
    mask: Tensor
    by_key: Any
    by_query: Any
    start: Any = 0


def blocks_of(
    visible: Tensor, keys: Tensor | None, slopes: Tensor | None, *, kv_heads: int, group: int, width: int, pieces: int
) -> list[Block]:
    """The blocks that attention works on: what no token of a block sees is not computed.

    Args:
        visible: [batch, 1, length, cached + length] bool.
        keys: [batch, cached + length] int64, the key's place in its text.
        slopes: [kv_heads] float32 of linear biases (ALiBi), where group is 1; they count the key's place
            alone, since the query's adds the same to a whole row, which softmax removes.
        width: of a head.
        pieces: number of blocks, of which the first see less where no token sees a later one; 0 chooses.
    """
    length, seen = visible.shape[2:]
    is_open = length < 0  # in a static program, whose blocks may be empty
    if is_open:
        batch, length, seen = (paddle.shape(visible)[axis] for axis in (0, 2, 3))
    pieces = pieces or (PIECES if is_open else -(-length // BLOCK))
    borders = [length * number // pieces for number in range(pieces + 1)]
    scores = paddle.where(visible, paddle.zeros([1]), paddle.full([1], HIDDEN))
    if slopes is not None and keys is not None:
        scores = scores + slopes.reshape([1, -1, 1, 1]) * keys.astype("float32").unsqueeze([1, 2])
    found = []
    for first, end in pairwise(borders):
        before = seen - length + end
        part = scores if pieces == 1 else scores[:, :, first:end, :before]
        if group > 1 or slopes is None:
            part = paddle.tile(part, [1, kv_heads, group, 1])  # queries of one key head behind each other
        if not is_open or pieces == 1:
            found.append(Block(first, end, before, part, [0, kv_heads, -1, width], [0, kv_heads * group, -1, width]))
            continue
        tokens = end - first
        found.append(
            Block(
                _together(0, first),
                _together(kv_heads * group, end),
                _together(before),
                part,
                _together(batch, kv_heads, tokens * group, width),
                _together(batch, kv_heads * group, tokens, width),
                _together(0),
            )
        )
    return found


def _together(*numbers: Any) -> Tensor:
    """Numbers and tensors of one as one int64 tensor."""
    tensors = [paddle.full([], x, "int64") if isinstance(x, int) else x.astype("int64") for x in numbers]
    return paddle.stack(tensors)


def attend(
    parts: Tensor, kv_heads: int, past: tuple[Tensor, Tensor] | None, blocks: list[Block]
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over the cache and many new tokens: keys and values are joined, which are fewer than scores.

    Args:
        parts: queries, already scaled, keys and values of the new tokens, [batch, heads + 2 * kv_heads, length,
            head_dim].
        past: keys and values of the cache, each [batch, kv_heads, cached, head_dim].

    Returns:
        What queries gather [batch, heads, length, head_dim], keys and values [batch, kv_heads, length, head_dim].
    """
    heads = parts.shape[1] - 2 * kv_heads
    if len(blocks) == 1:
        query, new_key, new_value = paddle.split(parts, [heads, kv_heads, kv_heads], axis=1)
        queries = [query]
    else:  # queries are cut by heads and tokens at once
        new_key, new_value = parts[:, heads : heads + kv_heads], parts[:, heads + kv_heads :]
        queries = [_queries(parts, block, heads) for block in blocks]
    key, value = new_key, new_value
    if past is not None:
        key, value = (paddle.concat(pair, axis=2) for pair in zip(past, (key, value)))  # noqa: B905 - it is traced
    found = []
    for number, (block, query) in enumerate(zip(blocks, queries)):  # noqa: B905
        k, v = key, value
        if number < len(blocks) - 1:
            k, v = (_cut(x, block.start, block.seen) for x in (key, value))
        scores = paddle.matmul(in_place.reshape(query, block.by_key), k, transpose_y=True)
        found.append(in_place.reshape(paddle.matmul(_weights(scores, block.mask), v), block.by_query))
    return found[0] if len(found) == 1 else paddle.concat(found, axis=2), new_key, new_value


def _queries(parts: Tensor, block: Block, heads: int) -> Tensor:
    """The queries of a block [batch, heads, tokens, head_dim]."""
    if isinstance(block.end, int):
        return parts[:, :heads, block.first : block.end]
    return paddle.slice(parts, [1, 2], block.first, block.end)


def _cut(x: Tensor, first: Any, end: Any) -> Tensor:
    """x[:, :, first:end]; by tensors [1] it is one operator of a program, not five."""
    return x[:, :, first:end] if isinstance(end, int) else paddle.slice(x, [2], first, end)


def attend_one(
    parts: Tensor, kv_heads: int, past: tuple[Tensor, Tensor], mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attend`, for one new token of each row: scores are joined, so that no cache is copied.

    Args:
        mask: of the only block.
    """
    heads, width = parts.shape[1] - 2 * kv_heads, parts.shape[3]
    query, key, value = paddle.split(parts, [heads, kv_heads, kv_heads], axis=1)
    query = in_place.reshape(query, [0, kv_heads, -1, width])
    scores = [paddle.matmul(query, keys, transpose_y=True) for keys in (past[0], key)]
    weights = _weights(paddle.concat(scores, axis=-1), mask)
    attended = in_place.add(paddle.matmul(weights[..., :-1], past[1]), weights[..., -1:] * value)
    return in_place.reshape(attended, [0, heads, 1, width]), key, value


def _weights(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax in float32. It may take the place of the scores."""
    if scores.dtype == paddle.float32:
        return in_place.softmax(in_place.add(scores, mask))
    return F.softmax(scores.astype("float32") + mask, axis=-1).astype(scores.dtype)
