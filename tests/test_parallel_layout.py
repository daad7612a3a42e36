"""What `--dry_run` says of a layout: the picture of its ranks, and the memory of a device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from utils.model.architecture import ModelShape
from utils.parallel.topology import Layout
from utils.partition.picture import picture
from utils.training.memory import memory_bytes

ARGS = SimpleNamespace(per_device_train_batch_size=4, gradient_accumulation_steps=2, recompute=False)
SHAPE = ModelShape(
    layers=30, hidden=512, heads=8, kv_heads=8, head_dim=64, intermediate=1408, vocabulary=32000, positions=1, tied=True
)


def test_picture_of_ranks() -> None:
    assert picture(Layout(), ARGS, 30) == ["layout: 1 process"]
    lines = picture(Layout(world=8, local_size=4, tensor=2, pipeline=2), ARGS, 30)
    assert lines == [
        "layout: 8 processes on 2 machines = data 2 x pipeline 2 x tensor 2; a step has 16 rows: 4 a device x 2 "
        "micro-batches x 2",
        "  part 1 of 2 of every batch",
        "    layers 0-14, embedding, 1/2 each [rank 0] [rank 1]  machine 0",
        "    layers 15-29, head, 1/2 each     [rank 2] [rank 3]  machine 0",
        "  part 2 of 2 of every batch",
        "    layers 0-14, embedding, 1/2 each [rank 4] [rank 5]  machine 1",
        "    layers 15-29, head, 1/2 each     [rank 6] [rank 7]  machine 1",
        "  rank 0 speaks; logs, curves and results are written once",
    ]


def test_picture_of_virtual_stages_and_sharding() -> None:
    lines = picture(Layout(world=4, local_size=4, pipeline=2, virtual=2, sharding=2, stage=1), ARGS, 8)
    assert lines[1] == "  sharding stage 1: 2 ranks divide the optimizer's state"
    assert "layers 0-1, 4-5, embedding" in lines[3] and "[rank 0]" in lines[3]
    assert "layers 2-3, 6-7, head" in lines[4] and "[rank 2]" in lines[4]
    many = picture(Layout(world=64, local_size=8), ARGS, 8)
    assert many[-2] == "  and 60 more parts with ranks like these" and len(many) == 11


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_divided(dtype: str) -> None:
    def memory(**layout: int) -> dict[str, float]:
        return memory_bytes(ARGS, Layout(world=4, local_size=4, **layout), SHAPE, 128, 10**8, 10**8, dtype)

    whole, state = memory(), 8 if dtype == "float32" else 12
    assert whole["optimizer"] == state * 10**8 and whole["weights"] == whole["gradients"]
    for name in ("weights", "gradients", "optimizer"):
        assert memory(tensor=2, pipeline=2)[name] == whole[name] / 4
    divided = [[memory(sharding=4, stage=s)[name] == whole[name] / 4 for name in whole] for s in (1, 2, 3)]
    assert divided == [[False, False, True, False], [False, True, True, False], [True, True, True, False]]
    assert whole["activations"] / 2 < memory(tensor=2)["activations"] < whole["activations"]
