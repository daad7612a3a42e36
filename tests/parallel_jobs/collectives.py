"""One rank of a job: every part of `utils.parallel.cpu` and `utils.parallel.groups` against a plain computation."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from utils import runtime

runtime.prepare()

from training import check_pipeline, check_sharded  # noqa: E402
from values import ROWS, WIDTH, WORDS, close, leaf, numbers  # noqa: E402

from utils.parallel import groups, process_group  # noqa: E402
from utils.parallel.groups import Groups, seed_everything  # noqa: E402
from utils.parallel.topology import Layout  # noqa: E402


def check_groups(layout: Layout, found: Groups) -> None:
    """fleet's groups are those of the coordinates."""

    def ranks(*same: int) -> list[int]:
        mine = layout.coordinates(layout.rank)
        return [r for r in range(layout.world) if all(layout.coordinates(r)[axis] == mine[axis] for axis in same)]

    for group, wanted in (
        (found.data, ranks(1, 2, 3)),
        (found.pipeline, ranks(0, 2, 3)),
        (found.sharding, ranks(0, 1, 3)),
        (found.tensor, ranks(0, 1, 2)),
        (found.readers, ranks(1, 3)),
    ):
        assert (group is None) == (len(wanted) == 1), (layout, wanted)
        if group is not None:
            assert list(group.ranks) == wanted and group.rank == wanted.index(layout.rank), (layout, group, wanted)


# --- exchanges ---------------------------------------------------------------------------------------


def check_exchanges(group: Any, rank: int, ranks: int) -> None:
    """All types; the value of rank r is r + 1."""
    import paddle
    import paddle.distributed as dist

    total = ranks * (ranks + 1) / 2
    nothing = paddle.zeros([0, 4])  # gloo refuses it
    dist.all_reduce(nothing, group=group)
    dist.broadcast(nothing, group.ranks[0], group=group)
    for kind in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int8", "uint8"):
        mine = paddle.full([2, 3], rank + 1).astype(kind)
        x = mine.clone()
        dist.all_reduce(x, group=group)
        close(x, np.full([2, 3], total), f"all_reduce {kind}")
        x = mine.clone()
        dist.broadcast(x, group.ranks[-1], group=group)
        close(x, np.full([2, 3], ranks), f"broadcast {kind}")
        x = mine.clone()
        dist.reduce(x, group.ranks[1], group=group)
        if rank == 1:
            close(x, np.full([2, 3], total), f"reduce {kind}")
        every: list[Any] = []
        dist.all_gather(every, mine, group=group)
        for place, one in enumerate(every):
            assert one.dtype == mine.dtype
            close(one, np.full([2, 3], place + 1), f"all_gather {kind}")
        out = paddle.empty([2 * ranks, 3]).astype(kind)
        dist.stream.all_gather(out, mine, group=group)
        close(out, np.repeat(np.arange(ranks) + 1, 2)[:, None] * np.ones([1, 3]), f"all_gather_into {kind}")
        parts = paddle.arange(2 * ranks).astype(kind)
        out = paddle.empty([2]).astype(kind)
        dist.stream.reduce_scatter(out, parts, group=group)
        close(out, ranks * np.array([2 * rank, 2 * rank + 1]), f"reduce_scatter {kind}")
        dist.reduce_scatter(out, list(parts.split(ranks)), group=group)
        close(out, ranks * np.array([2 * rank, 2 * rank + 1]), f"reduce_scatter of a list {kind}")
    large = paddle.arange(ranks << 18).astype("float32") % 1000
    out = paddle.empty([1 << 18])
    dist.stream.reduce_scatter(out, large, group=group)
    close(out, large.reshape([ranks, -1])[rank] * ranks, "reduce_scatter of large tensors")
    close(large, np.arange(ranks << 18) % 1000, "its input")
    yes = paddle.to_tensor([rank == 0, True, False])
    dist.all_reduce(yes, op=dist.ReduceOp.MAX, group=group)
    assert yes.tolist() == [True, True, False]
    # a chain: what is not everybody's exchange must not shift those of others
    x = paddle.full([2], rank, dtype="int64")
    if rank < ranks - 1:
        dist.send(x, group.ranks[rank + 1], group=group)
    if rank > 0:
        dist.recv(x, group.ranks[rank - 1], group=group)
        assert x.tolist() == [rank - 1] * 2
    x = paddle.ones([2])
    dist.all_reduce(x, group=group)
    close(x, np.full([2], ranks), "all_reduce after a chain")


def check_signals(ours: process_group.ProcessGroup) -> None:
    """Requests to the store that a signal interrupts are answered all the same."""
    from utils.training.callbacks import StopOnSignal

    stop = StopOnSignal(several=True)
    stop.watch()
    sending = f"import os, time\nfor _ in range(2000):\n    os.kill({os.getpid()}, 15)\n    time.sleep(2e-4)"
    sender = subprocess.Popen([sys.executable, "-c", sending])
    while ours.sums([sender.poll() is None])[0]:
        pass
    assert stop.received == 15
    stop.agree(True)
    stop.release()


# --- operators and layers ----------------------------------------------------------------------------


def check_operators(group: Any) -> None:
    """Forward and backward of each operator; the loss of the plain computation is the same on all ranks."""
    import paddle
    from paddle.distributed.fleet.layers.mpu import mp_ops

    rank, ranks = group.rank, group.nranks
    weight = numbers(ROWS, WORDS)

    def part(values: np.ndarray) -> np.ndarray:
        return np.split(values, ranks, axis=-1)[rank]

    for direct in (False, True):  # as an operator of its own, and by fleet's function
        x = leaf(weight)
        y = paddle._C_ops.c_identity(x, group.id, True, True) if direct else mp_ops._c_identity(x, group=group)
        (y * (rank + 1)).sum().backward()
        close(y, weight, "identity")
        close(x.grad, np.full_like(weight, ranks * (ranks + 1) / 2), "gradient of identity")

        x = leaf(weight)
        y = paddle._C_ops.c_split(x, rank, ranks, group.id, True) if direct else mp_ops._c_split(x, group=group)
        (y * paddle.to_tensor(part(weight))).sum().backward()
        close(y, part(weight), "split")
        close(x.grad, weight, "gradient of split")

        x = leaf(part(weight))
        y = mp_ops._c_concat(x, group=group)
        (y * paddle.to_tensor(weight)).sum().backward()
        close(y, weight, "concat")
        close(x.grad, part(weight), "gradient of concat")

    x = leaf(weight * (rank + 1))
    y = mp_ops._mp_allreduce(x * 1, group=group)
    (y * paddle.to_tensor(weight)).sum().backward()
    close(y, weight * ranks * (ranks + 1) / 2, "sum")
    close(x.grad, weight, "gradient of sum")


def check_loss(group: Any) -> None:
    """Loss and gradient of each label, also of labels that are ignored or no words, against float64."""
    import paddle
    from paddle.distributed.fleet.meta_parallel import ParallelCrossEntropy

    rank, ranks = group.rank, group.nranks
    scale, labels = numbers(2, ROWS, 1), np.array([[0, 5, 6, 11, -100], [3, -100, 7, 99, -1]])
    known = ((labels >= 0) & (labels < WORDS))[..., None]
    hot = np.eye(WORDS)[np.where(known[..., 0], labels, 0)] * known
    for size, kind, exact in ((3.0, "float32", 1e-6), (5e4, "float32", 1e-6), (3.0, "bfloat16", 2e-2)):
        logits = numbers(2, ROWS, WORDS) * np.float32(size)
        shifted = logits.astype("float64") - logits.max(-1, keepdims=True)
        softmax = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
        wanted = (np.log(np.exp(shifted).sum(-1, keepdims=True)) - (shifted * hot).sum(-1, keepdims=True)) * known
        mine = leaf(np.split(logits, ranks, axis=-1)[rank])
        found = ParallelCrossEntropy()(mine.astype(kind), paddle.to_tensor(labels[..., None]))
        assert found.dtype == paddle.float32
        (found * paddle.to_tensor(scale)).sum().backward()
        np.testing.assert_allclose(found.numpy(), wanted, rtol=exact, atol=exact, err_msg=f"loss {kind}")
        part = np.split((softmax * known - hot) * scale, ranks, axis=-1)[rank]
        np.testing.assert_allclose(mine.grad.numpy(), part, rtol=exact, atol=exact, err_msg=f"gradient {kind}")


def check_layers(group: Any) -> None:
    """The embedding and the matrices that ranks share, with and without LoRA, each with the part of one weight."""
    import paddle
    import paddle.nn.functional as F

    from utils.kernels.linear import Embedding, LoraLinear, Shard, linear

    rank, ranks = group.rank, group.nranks
    shapes = {"table": (WORDS, WIDTH), "w1": (WIDTH, 8), "c1": (8,), "w2": (8, WIDTH), "c2": (WIDTH,)}
    shapes |= {"a1": (WIDTH, 2), "b1": (2, 8), "a2": (8, 2), "b2": (2, WIDTH)}
    values = {name: numbers(*shape) for name, shape in shapes.items()}
    axes = {"table": 0, "w1": 1, "c1": 0, "w2": 0, "b1": 1, "a2": 0}
    words = paddle.to_tensor(np.arange(ROWS)[None] * 5 % WORDS)

    def part(name: str, whole: np.ndarray) -> np.ndarray:
        return np.split(whole, ranks, axis=axes[name])[rank] if name in axes else whole

    def check(mine: dict[str, Any], found: Any, scale: float, told: str) -> None:
        """Output and gradients against those of the whole matrices W + scale * A B."""
        plain = {name: leaf(whole) for name, whole in values.items()}
        first, second = (plain[f"w{n}"] + scale * plain[f"a{n}"] @ plain[f"b{n}"] for n in (1, 2))
        hidden = F.gelu(F.linear(F.embedding(words, plain["table"]), first, plain["c1"]))
        wanted = F.linear(hidden, second, plain["c2"])
        wanted.square().sum().backward()
        found.square().sum().backward()
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=1e-5, atol=1e-5, err_msg=told)
        for name, parameter in mine.items():
            whole = part(name, plain[name].grad.numpy())
            np.testing.assert_allclose(parameter.grad.numpy(), whole, rtol=1e-4, atol=1e-4, err_msg=f"{name}, {told}")

    def filled(**parameters: Any) -> dict[str, Any]:
        for name, parameter in parameters.items():
            parameter.set_value(part(name, values[name]))
        return parameters

    embedding = Embedding(WORDS, WIDTH, group)
    column, row = linear(WIDTH, 8, shard=Shard("column", group)), linear(8, WIDTH, shard=Shard("row", group))
    both = {"w1": column.weight, "c1": column.bias, "w2": row.weight, "c2": row.bias}
    mine = filled(table=embedding.weight, **both)
    check(mine, row(F.gelu(column(embedding(words)))), 0.0, "plain")
    column, row = (LoraLinear(layer, 2, 0.5, dropout=1e-9) for layer in (column, row))
    mine = filled(a1=column.lora_A, b1=column.lora_B, a2=row.lora_A, b2=row.lora_B)
    for fused in (True, False):
        for parameter in (embedding.weight, *mine.values()):
            parameter.clear_gradient()
        column.dropout = row.dropout = 0.0 if fused else 1e-9
        found = row(F.gelu(column(embedding(words))))
        check({"table": embedding.weight, **mine}, found, 0.5, f"LoRA, fused {fused}")


# --- pipeline, inputs, seeds -------------------------------------------------------------------------


def check_neighbours() -> None:
    """fleet's helper between two stages: a tuple of types, forward and back, both at once."""
    import paddle
    from paddle.distributed import fleet
    from paddle.distributed.fleet.meta_parallel.pp_utils import p2p_communication

    hybrid = fleet.get_hybrid_communicate_group()
    p2p_communication.initialize_p2p_groups(hybrid)
    helper, stage = p2p_communication.P2pHelper(), hybrid.get_stage_id()
    x, mask, flags = numbers(2, 4), np.arange(6).reshape(2, 3), np.array([True, False])
    for step in range(3):
        if stage == 0:
            out = (leaf(x + step), paddle.to_tensor(mask), paddle.to_tensor(flags))
            helper.send_forward(out, False)
            grad = helper.recv_backward(False)
            grad = grad[0] if isinstance(grad, tuple) else grad
            close(grad, x * 2, "gradient from the next stage")
        else:
            got = helper.recv_forward(False)
            close(got[0], x + step, "from the stage before")
            assert got[1].dtype == paddle.int64 and got[1].numpy().tolist() == mask.tolist()
            assert got[2].numpy().tolist() == flags.tolist()
            helper.send_backward((paddle.to_tensor(x * 2),), False)


def check_inputs(group: Any) -> None:
    import paddle
    from paddle.distributed import fleet
    from paddle.distributed.fleet.utils.hybrid_parallel_util import broadcast_input_data

    hybrid = fleet.get_hybrid_communicate_group()
    given = paddle.full([2, 2], group.rank, dtype="int64"), paddle.full([3], group.rank > 0).astype("bool")
    (words, flags), named = broadcast_input_data(hybrid, *given, mask=paddle.full([2], float(group.rank)))
    assert not words.any() and not flags.any() and not named["mask"].any()


def check_seeds(layout: Layout) -> None:
    import paddle
    import paddle.distributed as dist
    from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker

    seed_everything(5, layout)
    draws: dict[str, list[list[float]]] = {}
    for name in ("", "global_seed", "local_seed", ""):
        if name:
            with get_rng_state_tracker().rng_state(name):
                mine = paddle.nn.functional.dropout(paddle.ones([64]))
        else:
            mine = paddle.nn.functional.dropout(paddle.ones([64]))
        every: list[Any] = []
        dist.all_gather(every, mine)
        draws[name] = [one.tolist() for one in every]
    for name, drawn in draws.items():
        places = [(layout.reader(r), layout.coordinates(r)[1]) for r in range(layout.world)]
        for a in range(layout.world):
            for b in range(a):
                alike = places[a] == places[b] and name != "local_seed"
                assert (drawn[a] == drawn[b]) == alike, (name, a, b)


# --- the jobs ----------------------------------------------------------------------------------------


def layout_of(tensor: int = 1, pipeline: int = 1, sharding: int = 1) -> Layout:
    return Layout.of(
        SimpleNamespace(
            tensor_parallel_degree=tensor,
            pipeline_parallel_degree=pipeline,
            sharding="stage1" if sharding > 1 else "",
            sharding_parallel_degree=sharding,
            virtual_pp_degree=1,
        )
    )


class Report:
    """Says on the error stream, which no rank closes, what was right and when."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def __call__(self, name: str, check: Callable[..., None], *given: Any) -> None:
        check(*given)
        print(f"{name}: right, {time.monotonic() - self.started:.1f} s", file=sys.stderr, flush=True)


def four() -> None:
    """Tensor 2 x pipeline 2, then pipeline 4 and tensor 2 x sharding 2 in the same processes."""
    report, layout = Report(), layout_of(tensor=2, pipeline=2)
    ours = process_group.start(layout, "cpu")
    tensor = ours.groups.tensor
    from paddle.distributed.collective import _get_default_group
    from paddle.distributed.fleet.base import topology

    report("groups", check_groups, layout, ours.groups)
    report("exchanges", check_exchanges, _get_default_group(), layout.rank, layout.world)
    report("exchanges of two", check_exchanges, tensor, tensor.rank, 2)
    report("seeds", check_seeds, layout)
    report("operators", check_operators, tensor)
    report("loss", check_loss, tensor)
    report("layers", check_layers, tensor)
    report("inputs", check_inputs, tensor)
    report("neighbours", check_neighbours)
    report("pipeline", check_pipeline, layout)
    topology._HYBRID_PARALLEL_GROUP = None  # as in a new process
    layout = layout_of(pipeline=4)
    report("groups of a pipeline", check_groups, layout, groups.create(layout))
    report("pipeline of four", check_pipeline, layout)
    topology._HYBRID_PARALLEL_GROUP = None
    layout = layout_of(tensor=2, sharding=2)
    second = groups.create(layout)
    report("groups with sharding", check_groups, layout, second)
    for stage in (1, 2, 3):
        report(f"sharded, stage {stage}", check_sharded, layout, second, stage)
    ours.barrier("the end of the checks")
    print(f"rank {layout.rank}: all right", file=sys.stderr)
    ours.leave(0)


def two() -> None:
    """Signals; then rank 1 dies while rank 0 waits for it."""
    import paddle
    import paddle.distributed as dist

    report, layout = Report(), layout_of(tensor=2)
    ours = process_group.start(layout, "cpu")
    report("signals", check_signals, ours)
    if layout.rank == 1:
        time.sleep(0.5)
        process_group.end(3)
    try:
        dist.all_reduce(paddle.ones([4, 8]), group=ours.groups.tensor)
    except RuntimeError as error:
        print(f"rank 0: {error}", file=sys.stderr, flush=True)
        process_group.end(4)


if __name__ == "__main__":
    {"four": four, "two": two}[sys.argv[1]]()
