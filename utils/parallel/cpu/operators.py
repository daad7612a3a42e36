"""The operators of tensor parallel layers, which Paddle has as CUDA kernels only.

`c_embedding` and what rests on a plain all-reduce work on a CPU as they are. Ranks hold equal parts of the
last axis, in the order of their ranks. In fleet a group is known to operators by its number.
"""

from __future__ import annotations

from typing import Any


def group_of(number: int) -> Any:
    """The group with this number."""
    from paddle.distributed.communication.group import _GroupManager

    return _GroupManager.group_map_by_id[number]


def own_part(x: Any, rank: int, ranks: int) -> Any:
    """[..., n] -> [..., n / ranks], this rank's."""
    return x.split(ranks, axis=-1)[rank].contiguous()


def joined(x: Any, group: Any) -> Any:
    """[..., n] on each rank -> [..., n * ranks]."""
    import paddle

    parts = paddle.empty([group.nranks, *x.shape], dtype=x.dtype)
    group.process_group.all_gather_into_tensor_on_calc_stream(parts, x.contiguous())
    return paddle.concat(list(parts), axis=-1)


def added(x: Any, group: Any, op: Any = None) -> Any:
    """Replaces `x` by its sum (or what `op` says) over the group."""
    import paddle.distributed as dist

    dist.all_reduce(x, op=dist.ReduceOp.SUM if op is None else op, group=group)
    return x


def tensor_parallel_operators() -> None:
    """Adds `c_identity`, `c_split`, `c_concat` and `c_softmax_with_cross_entropy`, each with its gradient."""
    import paddle
    import paddle.distributed as dist
    from paddle.autograd import PyLayer
    from paddle.distributed.fleet.layers.mpu import mp_ops

    class Identity(PyLayer):
        """The same on all ranks going forward, so the gradient is the sum of what each rank made of it."""

        @staticmethod
        def forward(ctx: Any, x: Any, group: Any) -> Any:
            ctx.group = group
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return added(grad.clone(), ctx.group)

    class Split(PyLayer):
        """fleet's own gradient of it joins the parts along the first axis, which is wrong for any other split."""

        @staticmethod
        def forward(ctx: Any, x: Any, group: Any, rank: int, ranks: int) -> Any:
            ctx.group = group
            return own_part(x, rank, ranks)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return joined(grad, ctx.group)

    class Concat(PyLayer):
        """What follows is the same on all ranks, so each of them has the gradient of its part already."""

        @staticmethod
        def forward(ctx: Any, x: Any, group: Any, rank: int, ranks: int) -> Any:
            ctx.rank, ctx.ranks = rank, ranks
            return joined(x, group)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return own_part(grad, ctx.rank, ctx.ranks)

    class SoftmaxCrossEntropy(PyLayer):
        """Cross entropy of logits [..., n], part of a vocabulary of n * ranks, and labels [..., 1].

        Worked out in float32 (float64 for float64 logits). One softmax [..., n] is kept for the gradient,
        and nothing else of that size is made. A label that is `ignored` or no word has loss and gradient 0.
        """

        @staticmethod
        def forward(ctx: Any, logits: Any, label: Any, ignored: int, group: Any, rank: int, ranks: int) -> Any:
            ctx.set_materialize_grads(False)  # the softmax has no gradient, and a zero one would be as large
            ctx.dtype = logits.dtype
            size = logits.shape[-1]
            x = logits if logits.dtype == paddle.float64 else logits.astype("float32")
            label = label.astype("int64")
            counts = (label != ignored) & (label >= 0) & (label < size * ranks)
            place = label - rank * size
            mine = counts & (place >= 0) & (place < size)
            place = paddle.where(mine, place, paddle.zeros_like(place))

            shifted = x - added(x.max(axis=-1, keepdim=True), group, dist.ReduceOp.MAX)
            target = paddle.take_along_axis(shifted, place, axis=-1) * mine.astype(x.dtype)
            softmax = shifted.exp_()
            total, target = added(paddle.stack([softmax.sum(axis=-1, keepdim=True), target]), group)
            softmax.divide_(total)
            ctx.save_for_backward(softmax, place, mine.astype(x.dtype), counts.astype(x.dtype))
            return softmax, (total.log() - target) * counts.astype(x.dtype)

        @staticmethod
        def backward(ctx: Any, _: Any, grad: Any) -> Any:
            softmax, place, mine, counts = ctx.saved_tensor()
            grad = grad.astype(softmax.dtype) * counts
            result = softmax * grad
            return result.put_along_axis_(place, -grad * mine, axis=-1, reduce="add").astype(ctx.dtype)

    class EagerSplit:
        """Stands where fleet's `c_split_eager` does, see `Split`."""

        @staticmethod
        def apply(x: Any, group: Any, rank: int, ranks: int) -> Any:
            return Split.apply(x, group or group_of(0), rank, ranks)

    operators: Any = paddle._C_ops  # the last arguments of some choose streams, which a CPU does not have
    operators.c_identity = lambda x, number, *_: (
        Identity.apply(x, group_of(number)) if paddle.in_dynamic_mode() else x  # programs have no gradients here
    )
    operators.c_split = lambda x, rank, ranks, number, *_: Split.apply(x, group_of(number), rank, ranks)
    operators.c_concat = lambda x, rank, ranks, number, *_: Concat.apply(x, group_of(number), rank, ranks)
    operators.c_softmax_with_cross_entropy = lambda x, label, ignored, number, rank, ranks: SoftmaxCrossEntropy.apply(
        x, label, ignored, group_of(number), rank, ranks
    )
    mp_ops.c_split_eager = EagerSplit
