"""The sample datasets that come with the project."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from utils.data.rows import check_dataset, read_rows


@pytest.mark.parametrize(("place", "rows"), [("data", (2000, 200)), ("data/zh", (1000, 100))])
def test_samples_are_sound(place: str, rows: tuple[int, int], root: Path) -> None:
    folder = root / place
    check_dataset(folder, ["train", "dev"])
    train, dev = (list(read_rows(folder / f"{split}.json")) for split in ("train", "dev"))
    assert len(train) >= rows[0] and len(dev) >= rows[1]
    assert all(set(row.raw) == {"src", "tgt"} for row in train + dev)
    asked = {row.raw["src"] for row in train}
    assert len(asked) == len(train)
    assert not asked & {row.raw["src"] for row in dev}
    assert all(len(row.raw["tgt"].strip()) > 1 or not row.raw["tgt"].isascii() for row in train + dev)
    assert (folder / "train.json").stat().st_size < 700_000


def test_definitions_of_dev_are_not_in_train(root: Path) -> None:
    answers = {json.loads(line)["tgt"] for line in (root / "data/train.json").read_text("utf-8").splitlines()}
    dev = [json.loads(line) for line in (root / "data/dev.json").read_text("utf-8").splitlines()]
    defined = [row for row in dev if row["src"].startswith("Define")]
    assert len(defined) > 200
    assert not answers & {row["tgt"] for row in defined}


def test_every_source_is_named(root: Path) -> None:
    notice = (root / "data/NOTICE").read_text("utf-8")
    for source in ("WordNet 3.0", "chatterbot-corpus", "Django", "chinese-poetry"):
        assert source in notice
