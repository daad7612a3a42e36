"""Exchanges of tensors among the ranks of a gloo group: all types, all methods, errors that name the ranks.

Every exchange is over when its method returns, whether it was asked to wait or not: what is asked for in one
order happens in that order. gloo refuses tensors without elements, the hidden states of a micro-batch without
targets for one; there is nothing to exchange of them.

gloo gives a rank 30 s to wait for its partners. The limit is a constant of gloo's context; Paddle hands none
on (`new_group(timeout=...)` is for stores, and `ProcessGroupGloo.create` takes no options). What one rank sends
to another waits longer, see `pairs.meet`. Other work that may keep one rank longer must end at
`ConnectedGroup.barrier`, which has no such limit, before the ranks exchange anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from utils.parallel.cpu.pairs import group_of, meet, pair

# Types that gloo lacks, for some of which it ends the process; sums of half types are better in float32 anyway.
SENT_AS = {
    "float16": "float32",
    "bfloat16": "float32",
    "bool": "int32",
    "uint8": "int32",
    "int8": "int32",
    "int16": "int32",
}
PIECES_FROM = 1 << 18  # elements: one reduce per rank then takes half the time of an all-reduce, below it several times
STREAMS = "_on_calc_stream"  # ending of the methods by which fleet asks for an exchange in order


class Done:
    """The task of an exchange that is over."""

    def wait(self, *_: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


@contextmanager
def naming_ranks(process_group: Any, what: str, tensor: Any) -> Iterator[None]:
    """Adds to gloo's errors who was exchanging what; gloo does not know which rank is at fault.

    Raises:
        RuntimeError: the exchange failed, or a rank did not come within 30 s.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        group = group_of(process_group)
        ranks = list(range(process_group.size())) if group is None else group.ranks
        kind = str(tensor.dtype).removeprefix("paddle.")
        raise RuntimeError(
            f"an exchange among ranks {', '.join(map(str, ranks))} failed, for rank {ranks[process_group.rank()]} "
            f"{what} of {kind} {list(tensor.shape)}: {reason(error)}"
        ) from error


def reason(error: BaseException) -> str:
    """The line of a message that says what happened, without Paddle's frame around it."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("---", "C++ Traceback", "Error Message"))]
    return told[-1] if told else type(error).__name__


@contextmanager
def as_sent(tensor: Any, *, back: bool) -> Iterator[Any]:
    """The tensor as gloo can send it: of a type that it has, without gaps in memory.

    Args:
        back: whether the result of the exchange belongs into `tensor`.
    """
    import paddle

    name = str(tensor.dtype).removeprefix("paddle.")
    if name not in SENT_AS and tensor.is_contiguous():
        yield tensor
        return
    with paddle.no_grad():
        sent = tensor.astype(SENT_AS.get(name, name)).contiguous()
        yield sent
        if back:
            paddle.assign(sent.astype(tensor.dtype), tensor)


def whole_exchanges() -> None:
    """Completes the methods of ProcessGroupGloo and adds their `..._on_calc_stream` twins.

    Fleet calls the twins for exchanges in the order of the computation. On a CPU everything is in order, so
    they are the same methods.
    """
    from paddle.base import core

    gloo = core.ProcessGroupGloo
    plain = {
        name: getattr(gloo, name)
        for name in ("all_reduce", "broadcast", "reduce", "send", "recv", "all_gather_into_tensor")
    }

    def all_reduce(self: Any, tensor: Any, op: Any = core.ReduceOp.SUM, *_: Any) -> Done:
        if tensor.size == 0:
            return Done()
        with naming_ranks(self, "an all-reduce", tensor), as_sent(tensor, back=True) as sent:
            plain["all_reduce"](self, sent, op, True).wait()
        return Done()

    def broadcast(self: Any, tensor: Any, src: int, *_: Any) -> Done:
        if tensor.size == 0:
            return Done()
        with naming_ranks(self, "a broadcast", tensor), as_sent(tensor, back=self.rank() != src) as sent:
            plain["broadcast"](self, sent, src, True).wait()
        return Done()

    def reduce(self: Any, tensor: Any, dst: int, op: Any = core.ReduceOp.SUM, *_: Any) -> Done:
        if tensor.size == 0:
            return Done()
        with naming_ranks(self, "a reduce", tensor), as_sent(tensor, back=self.rank() == dst) as sent:
            plain["reduce"](self, sent, dst, op, True).wait()
        return Done()

    def send(self: Any, tensor: Any, dst: int, *_: Any) -> Done:
        with naming_ranks(self, f"a send to rank {dst} of them", tensor), as_sent(tensor, back=False) as sent:
            meet(self, dst)
            group, place = pair(self, dst)
            plain["send"](group, sent, place, True).wait()
        return Done()

    def recv(self: Any, tensor: Any, src: int, *_: Any) -> Done:
        with naming_ranks(self, f"a receive from rank {src} of them", tensor), as_sent(tensor, back=True) as sent:
            meet(self, src)
            group, place = pair(self, src)
            plain["recv"](group, sent, place, True).wait()
        return Done()

    def all_gather_into_tensor(self: Any, out: Any, tensor: Any, *_: Any) -> Done:
        """Each rank's [n, ...] -> [ranks * n, ...] (or [ranks, n, ...], as `out` is shaped)."""
        if out.size == 0:
            return Done()
        with (
            naming_ranks(self, "an all-gather", tensor),
            as_sent(tensor, back=False) as sent,
            as_sent(out, back=True) as filled,
        ):
            plain["all_gather_into_tensor"](self, filled, sent, True).wait()
        return Done()

    def all_gather(self: Any, outs: Any, tensor: Any, *_: Any) -> Done:
        import paddle

        if isinstance(outs, paddle.Tensor):  # the older form, (tensor, out)
            return all_gather_into_tensor(self, tensor, outs)
        parts = paddle.empty([self.size(), *tensor.shape], dtype=tensor.dtype)
        all_gather_into_tensor(self, parts, tensor)
        with paddle.no_grad():
            for out, part in zip(outs, parts, strict=True):
                paddle.assign(part, out)
        return Done()

    def reduce_scatter_tensor(self: Any, out: Any, tensor: Any, op: Any = core.ReduceOp.SUM, *_: Any) -> Done:
        """Each rank's [ranks * n, ...] -> [n, ...]: part r of the sum of them, for rank r."""
        import paddle

        ranks, rank = self.size(), self.rank()
        with paddle.no_grad():
            if tensor.size < PIECES_FROM:
                total = tensor.clone()
                all_reduce(self, total, op)
                part = total.reshape([ranks, -1])[rank]
            else:
                for dst, view in enumerate(tensor.reshape([-1]).split(ranks)):
                    piece = view.clone()
                    reduce(self, piece, dst, op)
                    if dst == rank:
                        part = piece
            paddle.assign(part.reshape(out.shape).astype(out.dtype), out)
        return Done()

    def reduce_scatter(self: Any, out: Any, tensors: Sequence[Any], op: Any = core.ReduceOp.SUM, *_: Any) -> Done:
        import paddle

        return reduce_scatter_tensor(self, out, paddle.stack(list(tensors)), op)

    for method in (
        all_reduce,
        broadcast,
        reduce,
        send,
        recv,
        all_gather_into_tensor,
        all_gather,
        reduce_scatter_tensor,
        reduce_scatter,
    ):
        setattr(gloo, method.__name__, method)
        setattr(gloo, method.__name__ + STREAMS, method)
