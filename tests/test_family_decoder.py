"""The trainable decoder: packing behind a prefix, recomputation, exports that transformers wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import paddle
import pytest
from family_cases import NAMES, random_prefix
from family_cases import case as family_case

from utils.checkpoints import Checkpoint, locate
from utils.checkpoints.load import load_model
from utils.checkpoints.save import save_model
from utils.checkpoints.tensors import cast, read_tensors
from utils.model import decoder
from utils.model.settings import Settings
from utils.training.model import TrainingModel

FIXTURES = Path(__file__).parent / "fixtures"


def is_plain(checkpoint: Checkpoint) -> bool:
    """Read from left to right, as `packed_row` is."""
    return checkpoint.family.architecture(checkpoint.config).prefix_reading is None


CASES = [name for name in NAMES if is_plain(family_case(name).checkpoint)]
ROWS = [[5, 9, 11, 8, 30, 7], [40, 41, 42], [12, 13, 14, 15]]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Checkpoint, Any]:
    checkpoint = locate(FIXTURES / request.param)
    return checkpoint, load_model(checkpoint, "float32")


def packed_row() -> dict[str, Any]:
    """ROWS one after the other, as the collator packs them."""
    ends = np.concatenate([[sum(map(len, ROWS[: i + 1]))] * len(row) for i, row in enumerate(ROWS)])
    return {
        "input_ids": paddle.to_tensor(np.concatenate(ROWS)[None]),
        "position_ids": paddle.to_tensor(np.concatenate([np.arange(len(row)) for row in ROWS])[None]),
        "segment_ends": paddle.to_tensor(ends.astype(np.int32).reshape([1, 1, -1, 1])),
    }


@pytest.mark.parametrize("with_prefix", [False, True])
def test_packed_rows_are_computed_as_if_alone(case: tuple[Checkpoint, Any], with_prefix: bool) -> None:
    checkpoint, model = case
    prefix = random_prefix(checkpoint) if with_prefix else None
    trained = TrainingModel(checkpoint.family, model, prefix=prefix)
    trained.eval()
    with paddle.no_grad():
        packed = trained.hidden(packed_row())[0].numpy()
        alone = [trained.hidden({"input_ids": paddle.to_tensor([row], dtype="int64")})[0].numpy() for row in ROWS]
    assert np.abs(packed - np.concatenate(alone)).max() < 1e-5


@pytest.mark.parametrize("with_prefix", [False, True])
def test_recomputation_changes_no_gradient(
    case: tuple[Checkpoint, Any], with_prefix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _ = case
    recomputed = mock.Mock(side_effect=decoder.recompute)
    monkeypatch.setattr(decoder, "recompute", recomputed)
    found = []
    for recompute in (False, True):
        model = load_model(checkpoint, "float32", settings=Settings())
        prefix = random_prefix(checkpoint) if with_prefix else None
        trained = TrainingModel(checkpoint.family, model, prefix=prefix, inputs_need_gradient=recompute)
        model.enable_recompute = recompute
        trained.train()
        labels = paddle.to_tensor([[*ROWS[0][1:], 3]])
        trained(labels, input_ids=paddle.to_tensor([ROWS[0]])).backward()
        found.append({n: p.grad.numpy() for n, p in trained.named_parameters() if p.grad is not None})
    assert recomputed.call_count == checkpoint.family.shape(checkpoint.config).layers
    plain, again = found
    assert plain.keys() == again.keys() and plain
    for name, gradient in plain.items():
        assert np.allclose(gradient, again[name], atol=1e-6 + 1e-5 * np.abs(gradient).max()), name


def test_hf_export_has_published_names_and_values(case: tuple[Checkpoint, Any], tmp_path: Path) -> None:
    checkpoint, model = case
    save_model(tmp_path, model, checkpoint.family, checkpoint.config, export_format="hf")
    ours = dict(read_tensors(tmp_path / "model.safetensors"))
    theirs = {name: cast(tensor.read(), "float32") for name, tensor in checkpoint.tensors().items()}
    root = checkpoint.family.weights(checkpoint.config)[0].published.split(".")[0] + "."
    for name, values in ours.items():
        stored = theirs[name] if name in theirs else theirs[name.removeprefix(root)]
        assert np.array_equal(values, stored), name
    written = json.loads((tmp_path / "config.json").read_text())
    assert checkpoint.family.shape(written) == checkpoint.family.shape(checkpoint.config)
    assert locate(tmp_path).family is checkpoint.family
