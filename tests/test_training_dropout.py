"""Dropout: what a model's configuration asks for, and the one argument that replaces it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from family_cases import FIXTURES, NAMES, case
from tiny_runs import Tiny, tiny  # noqa: F401
from tiny_text import pretrain, tokenize_text

from utils.arguments import FinetuneArguments
from utils.checkpoints.load import load_model
from utils.model.settings import Settings
from utils.training.start import model_settings

DROPPING = [name for name in NAMES if case(name).checkpoint.family.dropouts]
ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]


def batches() -> list[dict[str, Any]]:
    """Rows one behind the other as they are, and packed."""
    ids = paddle.to_tensor(np.concatenate(ROWS)[None])
    ends = np.concatenate([[sum(map(len, ROWS[: i + 1]))] * len(row) for i, row in enumerate(ROWS)])
    positions = np.concatenate([np.arange(len(row)) for row in ROWS])[None]
    segments = paddle.to_tensor(ends.astype(np.int32).reshape([1, 1, -1, 1]))
    return [
        {"input_ids": ids},
        {"input_ids": ids, "position_ids": paddle.to_tensor(positions), "segment_ends": segments},
    ]


def dropped(name: str, settings: Settings) -> list[bool]:
    """Whether training computes anything else than evaluation, for each of `batches`."""
    checkpoint, found = case(name).checkpoint, []
    model = load_model(checkpoint, "float32", settings=settings)
    paddle.seed(1)
    for batch in batches():
        with paddle.no_grad():
            model.eval()
            wanted = model.hidden(batch).numpy()
            model.train()
            found.append(not np.array_equal(model.hidden(batch).numpy(), wanted))
    return found


@pytest.mark.parametrize("name", DROPPING)
def test_every_dropout_of_a_family_drops(name: str) -> None:
    family = case(name).checkpoint.family
    for dropout in family.dropouts:
        assert dropped(name, Settings(dropouts={dropout.of: 0.5})) == [True, True], dropout


@pytest.mark.parametrize("name", DROPPING)
def test_one_argument_replaces_them_all(name: str) -> None:
    checkpoint = case(name).checkpoint
    for rate in (0.0, 0.5):
        settings = model_settings(FinetuneArguments(dropout=rate), checkpoint)
        assert dropped(name, settings) == [rate > 0] * 2
    asked = any(checkpoint.family.dropout_rates(checkpoint.config).values())
    assert dropped(name, model_settings(FinetuneArguments(), checkpoint)) == [asked] * 2


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        (
            "opt_tiny",
            [],
            "dropout: attention 0.0, hidden 0.1, embedding 0.1, by the model's config.json; --dropout replaces it",
        ),
        ("opt_tiny", ["--dropout", 0], "dropout: attention, hidden, embedding 0.0 (--dropout)"),
        ("chatglm_tiny", [], "dropout: none, a ChatGLM-6B model has no such layers"),
    ],
)
@pytest.mark.parametrize("script", ["finetune", "pretrain"])
def test_a_dry_run_tells_what_is_in_force(
    tiny: Tiny,  # noqa: F811
    tmp_path: Path,
    script: str,
    name: str,
    options: list[object],
    line: str,
) -> None:
    folder = FIXTURES / name
    if script == "finetune":
        run = tiny.run(tmp_path / "run", "--do_train", "--dry_run", "--model_name_or_path", folder, *options)
    else:
        data = tokenize_text(folder, tmp_path / "text")
        run = pretrain(folder, data, tmp_path / "run", "--do_train", "--dry_run", *options)
    assert line in run.out.splitlines()


def test_a_dropout_that_no_layer_has_is_refused(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    options = ["--do_train", "--model_name_or_path", FIXTURES / "chatglm_tiny", "--dropout", 0.1]
    run = tiny.run(tmp_path, *options, expect=2)
    assert "dropout 0.1 (--dropout): a ChatGLM-6B model has no dropout; leave it out" in run.err
