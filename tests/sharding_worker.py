"""One rank of a launched job: tiny models trained sharded, beside the same training on one process.

sharding_worker.py MODEL_FOLDER SHARDING_DEGREE
"""

from __future__ import annotations

import os
import sys
from typing import Any

from utils import runtime

runtime.prepare()
sys.argv, (folder, degree) = sys.argv[:1], sys.argv[1:]

from utils.parallel import process_group  # noqa: E402
from utils.parallel.topology import Layout, world_size  # noqa: E402

RANK = int(os.environ["PADDLE_TRAINER_ID"])
LAYOUT = Layout(world=world_size(), rank=RANK, local_size=world_size(), local_rank=RANK, sharding=int(degree))
PROCESSES = process_group.start(LAYOUT, "cpu")
runtime.load_paddle()

import numpy as np  # noqa: E402
import paddle  # noqa: E402
import paddle.distributed as dist  # noqa: E402

from utils.adapters.lora import add_lora  # noqa: E402
from utils.adapters.prefix import PrefixTuning  # noqa: E402
from utils.checkpoints.load import load_model  # noqa: E402
from utils.checkpoints.locate import locate  # noqa: E402
from utils.data.encode import IGNORED  # noqa: E402
from utils.parallel.sharding import Share, wrap  # noqa: E402
from utils.training.model import TrainingModel  # noqa: E402

STEPS, ROWS, LENGTH, CLIP = 10, 8, 12, 1.0
GROUPS = PROCESSES.groups
SHARDING, DATA = GROUPS.sharding, GROUPS.data
TARGETS = [3, 11, 1, 7, 5, 2, 9, 4]  # of each row


class Unused(paddle.nn.Layer):
    """A parameter that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = self.create_parameter([40, 8], default_initializer=paddle.nn.initializer.Constant(1.0))


class Half(paddle.nn.Layer):
    """A layer of weights in half precision that a CPU can compute with: in float32."""

    def __init__(self, rows: int, columns: int, dtype: str) -> None:
        super().__init__(dtype=dtype)
        self.weight = self.create_parameter([rows, columns])
        self.norm = self.create_parameter([columns], default_initializer=paddle.nn.initializer.Constant(1.0))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return paddle.tanh(paddle.matmul(x, self.weight.astype("float32")) * self.norm.astype("float32"))


class HalfModel(paddle.nn.Layer):
    """A model in half precision, one layer in float32, one frozen, with the interface of `TrainingModel`."""

    def __init__(self, dtype: str) -> None:
        super().__init__()
        kinds = (dtype, dtype, "float32", dtype)
        self.layers = paddle.nn.LayerList([Half(48, 48, kind) for kind in kinds])
        self.layers[1].weight.stop_gradient = True
        self.head = paddle.nn.Layer()
        self.head.borrowed = ()

    def outputs(self, ids: paddle.Tensor) -> paddle.Tensor:
        x = paddle.nn.functional.one_hot(ids % 48, 48)
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, labels: paddle.Tensor, input_ids: paddle.Tensor) -> paddle.Tensor:
        kept = (labels != IGNORED).astype("float32").unsqueeze(-1)
        return ((self.outputs(input_ids) - 0.5) ** 2 * kept).sum()

    @paddle.no_grad()
    def score(self, labels: paddle.Tensor, input_ids: paddle.Tensor) -> tuple[float, int, int]:
        return float(self(labels, input_ids)), 0, 1


def build(method: str, dtype: str = "float32", recompute: bool = False) -> TrainingModel:
    if method == "half":
        paddle.seed(3)
        return HalfModel(dtype)
    checkpoint = locate(folder, allow_network=False)
    base = load_model(checkpoint, dtype)
    paddle.seed(3)
    prefix = None
    if method == "lora":
        add_lora(base, rank=8, lora_plus_scale=4.0)
    if method == "prefix":
        family = checkpoint.family
        prefix = PrefixTuning(family, family.shape(checkpoint.config), 4, projection=True, dtype=dtype)
    model = TrainingModel(checkpoint.family, base, prefix=prefix, inputs_need_gradient=recompute)
    if recompute:
        base.enable_recompute = True
    if method == "sft":
        model.unused = Unused()
    model.train()
    return model


def optimizer_of(model: TrainingModel) -> Any:
    decayed = {p.name for n, p in model.named_parameters() if "norm" not in n}
    return paddle.optimizer.AdamW(
        3e-3,
        parameters=model.parameters(),
        weight_decay=0.1,
        apply_decay_param_fun=lambda name: name in decayed,
        multi_precision=True,
    )


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(step)
    ids = random.integers(3, 250, [ROWS, LENGTH])
    labels = np.full_like(ids, IGNORED)
    for row, count in enumerate(TARGETS):
        labels[row, -count:] = random.integers(3, 250, count)
    return ids, labels


class Single:
    """One process, whole gradients; the interface of `Share` that training needs."""

    def __init__(self, model: TrainingModel) -> None:
        self.model = model

    def exchange(self) -> None:
        pass

    def owned(self) -> list[Any]:
        return [(p, p.grad) for p in self.model.parameters() if p.grad is not None]


@paddle.no_grad()
def scale(share: Any, factor: float) -> None:
    for _, gradient in share.owned():
        gradient.scale_(factor)


def train(
    model: TrainingModel, optimizer: Any, share: Any, steps: range, reader: int, readers: int, overlapping: bool = False
) -> list[float]:
    """Losses and gradient norms of steps on this reader's rows in micro-batches; those of all readers."""
    found = []
    for step in steps:
        ids, labels = batch(step)
        mine = np.arange(ROWS)[reader::readers]
        total = 0.0
        waiting = []
        for part in np.array_split(mine, 2):  # accumulation
            loss = model(labels=paddle.to_tensor(labels[part]), input_ids=paddle.to_tensor(ids[part]))
            waiting.append(loss / 8.0)
            if not overlapping:
                waiting.pop().backward()
            total += float(loss)
        for loss in waiting:  # as in a pipeline
            loss.backward()
        share.exchange()
        if readers > 1 and DATA is not None:
            for _, gradient in share.owned():
                add_up(gradient, DATA)
        scale(share, 8.0 / sum(TARGETS))
        squares = sum(float((g.astype("float32") ** 2).sum()) for p, g in share.owned() if getattr(p, "counted", True))
        if readers > 1:
            total, _ = summed(total, None), squares
            squares = summed(squares, SHARDING)
        norm = squares**0.5
        if norm > CLIP:
            scale(share, CLIP / norm)
        optimizer.step()
        optimizer.clear_grad()
        found += [total / sum(TARGETS), norm]
    return found


@paddle.no_grad()
def add_up(tensor: paddle.Tensor, group: Any) -> None:
    dist.all_reduce(tensor, group=group)


def summed(value: float, group: Any) -> float:
    tensor = paddle.to_tensor([value], dtype="float64")
    dist.all_reduce(tensor, group=group)
    return float(tensor)


def weights(model: TrainingModel) -> dict[str, np.ndarray]:
    return {name: np.array(p.astype("float32").numpy()) for name, p in model.named_parameters()}


def states(share: Share) -> dict[str, np.ndarray]:
    return {
        f"{accumulator.parameter}|{accumulator.name}": share.read(accumulator) for accumulator in share.accumulators()
    }


def close(found: Any, wanted: Any, what: str, tolerance: float) -> None:
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance, err_msg=what)


def single(method: str, **options: Any) -> tuple[list[float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Figures, weights and optimizer state of one process."""
    model = build(method, **options)
    optimizer = optimizer_of(model)
    found = train(model, optimizer, Single(model), range(STEPS), 0, 1)
    names, state = {parameter.name: name for name, parameter in model.named_parameters()}, {}
    for key, value in optimizer.state_dict().items():
        entries = {f"{k}|master": v for k, v in value.items()} if key == "master_weights" else {key: value}
        for accumulator, tensor in entries.items():
            internal = max((n for n in names if accumulator.startswith((f"{n}_", f"{n}|"))), key=len)
            state[f"{names[internal]}|{accumulator[len(internal) + 1 :]}"] = np.array(tensor.numpy())
    return found, weights(model), state


def compare(stage: int, method: str, wanted: Any, tolerance: float = 1e-5, **options: Any) -> None:
    """Trains sharded, in two parts: the second with new objects that take the state of the first."""
    losses, last, state = wanted
    what = f"stage {stage} {method} {options}"
    reader, readers = LAYOUT.reader(RANK), LAYOUT.readers
    half = STEPS // 2
    model = build(method, **options)
    optimizer, share = wrap(model, optimizer_of(model), stage, SHARDING, borrowed={model.head: model.head.borrowed})
    found = train(model, optimizer, share, range(half), reader, readers)
    kept = states(share)
    with share.whole():
        between = weights(model)

    model = build(method, **options)
    optimizer, share = wrap(model, optimizer_of(model), stage, SHARDING, borrowed={model.head: model.head.borrowed})
    with share.whole():
        for name, parameter in model.named_parameters():
            parameter.set_value(paddle.to_tensor(between[name]).astype(parameter.dtype))
    share.take_weights()
    for accumulator in share.accumulators():
        share.write(accumulator, kept[f"{accumulator.parameter}|{accumulator.name}"])
    found += train(model, optimizer, share, range(half, STEPS), reader, readers, overlapping=True)
    close(found, losses, what, tolerance)

    model.eval()
    ids, labels = batch(99)
    one = {"labels": paddle.to_tensor(labels), "input_ids": paddle.to_tensor(ids)}
    parts = float(model.score(**one)[0])
    with share.whole():
        together = float(model.score(**one)[0])
        final = weights(model)
    close(parts, together, what, 1e-6)
    for name in last:
        close(final[name], last[name], f"{what}: {name}", 30 * tolerance)
    ours = states(share)
    assert set(state) <= set(ours), set(state) ^ set(ours)
    for name in state:
        close(ours[name], state[name], f"{what}: {name}", 30 * tolerance)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("sft", {"recompute": True}),
    ("lora", {"recompute": True}),
    ("prefix", {}),
    ("half", {"dtype": "float16"}),
]

if __name__ == "__main__":
    assert isinstance(PROCESSES, process_group.ConnectedGroup)
    for method, options in CASES:
        tolerance = 3e-2 if method == "half" else 1e-5
        try:
            wanted = single(method, **options)
            for stage in (1, 2, 3):
                compare(stage, method, wanted, tolerance, **options)
                print(f"ok {stage} {method}", flush=True)
        except BaseException as error:
            PROCESSES.crashed(error)
    PROCESSES.barrier("the last case")
    PROCESSES.leave(0)
