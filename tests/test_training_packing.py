"""Packed rows train exactly as the same rows one by one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import paddle
import pytest
from family_cases import NAMES, case
from tiny_runs import Tiny, tiny, write_rows  # noqa: F401

from utils.kernels.attention import packed_attention, segments_of
from utils.kernels.masks import packed

METHODS = {
    "sft": ["--learning_rate", 3e-3],
    "lora": ["--lora"],
    "prefix": ["--prefix_tuning", "--num_prefix_tokens", 8],
    "projection": ["--prefix_tuning", "--num_prefix_tokens", 8, "--prefix_projection", "--recompute"],
}


@pytest.mark.parametrize("method", METHODS)
def test_a_packed_run_has_the_losses_of_the_unpacked_one(tiny: Tiny, tmp_path: Path, method: str) -> None:  # noqa: F811
    """All rows are in every step of both runs; one of them is so long that it is alone in its pack."""
    data = tmp_path / "data"
    write_rows(data / "dev.json", 11, seed=5)
    train = write_rows(data / "train.json", 13, seed=4)
    with open(train, "a", encoding="utf-8") as file:
        file.write(json.dumps({"src": "Say much", "tgt": "much " * 50}) + "\n")
    options = ["--do_train", "--do_eval", "--max_steps", 3, "--max_length", 160, "--dataset_name_or_path", data]
    options += [*METHODS[method], "--per_device_train_batch_size", 14, "--lr_scheduler_type", "constant"]
    plain = tiny.run(tmp_path / "plain", *options)
    packed = tiny.run(tmp_path / "packed", *options, "--intokens")
    np.testing.assert_allclose(packed.losses, plain.losses, atol=1e-5, rtol=0)
    assert plain.losses[0] - plain.losses[2] > 1e-3
    wanted = plain.json("eval_results.json")
    for name, value in packed.json("eval_results.json").items():
        assert value == pytest.approx(wanted[name], rel=1e-5), name
    assert packed.json("all_results.json")["train_tokens"] == plain.json("all_results.json")["train_tokens"]
    shares = [float(re.findall(r"effective ([\d.]+)%", run.out)[0]) for run in (plain, packed)]
    assert shares[0] < 50 < 80 < shares[1]


def ends_of(rows: list[list[int]]) -> np.ndarray:
    """int32 [batch, 1, length, 1] from the segment lengths of each row."""
    return np.array([np.repeat(np.cumsum(row), row) for row in rows], dtype=np.int32)[:, None, :, None]


def dense(query: Any, key: Any, value: Any, ends: np.ndarray) -> Any:
    """Attention by its definition, with a mask of every pair of places."""
    _, length, _, width = query.shape
    places = np.arange(length)
    begins = np.array([[[e for e in row[:, 0] if e <= p][-1] if (row[:, 0] <= p).any() else 0 for p in places]
                       for row in ends[:, 0]])  # fmt: skip
    seen = (places[None, None] <= places[None, :, None]) & (places[None, None] >= begins[:, :, None])
    q, k, v = (x.transpose([0, 2, 1, 3]) for x in (query, key, value))
    scores = paddle.matmul(q, k, transpose_y=True) / width**0.5
    scores = scores + paddle.to_tensor(np.where(seen[:, None], 0.0, -1e9).astype("float32"))
    return paddle.matmul(paddle.nn.functional.softmax(scores, -1), v).transpose([0, 2, 1, 3]).flatten(2)


@pytest.mark.parametrize("rows", [[[5, 1, 6], [12], [4, 4, 4]], [[1] * 12, [11, 1], [7, 5]]])
def test_packed_attention_is_attention_under_a_dense_mask(rows: list[list[int]]) -> None:
    random = np.random.default_rng(0)
    values = [random.normal(size=(3, 12, 4, 8)).astype("float32") for _ in range(3)]
    weights = paddle.to_tensor(random.normal(size=(3, 12, 32)).astype("float32"))
    found = []
    for function in (packed_attention, dense):
        inputs = [paddle.to_tensor(value, stop_gradient=False) for value in values]
        ends = ends_of(rows)
        output = function(*inputs, segments_of(paddle.to_tensor(ends)) if function is packed_attention else ends)
        (output * weights).sum().backward()
        found.append([output.numpy(), *(x.grad.numpy() for x in inputs)])
    for ours, wanted in zip(*found, strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_no_layer_of_packed_rows_waits_for_the_device(name: str) -> None:
    """What segments there are is the same in all layers, and read once a batch."""
    ends = paddle.to_tensor(ends_of([[4, 3], [2, 5]]))
    positions = paddle.to_tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4]])
    batch = {"input_ids": positions + 5, "position_ids": positions, "segment_ends": ends}
    model = case(name).model
    read = mock.Mock(side_effect=paddle.Tensor.numpy)
    with paddle.no_grad(), mock.patch.object(paddle.Tensor, "numpy", lambda tensor: read(tensor)):
        context = model.context(batch)
        read.reset_mock()
        model.run(range(len(model.layers)), model.embed(context), context)
        assert read.call_count == 0


def test_mask_of_packed_rows_behind_a_prefix() -> None:
    mask = packed(paddle.to_tensor(ends_of([[2, 1, 1], [4]])), 2).numpy().astype(int)
    assert mask.shape == (2, 1, 4, 6)
    assert mask[0, 0].tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert (mask[1, 0, :, 2:] == np.tril(np.ones((4, 4)))).all() and mask[1, 0, :, :2].all()
