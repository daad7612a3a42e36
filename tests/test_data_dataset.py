"""Datasets with a length: cache, packing, collating, limits, built-in names."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_tokenizers import write_bpe
from tqdm import TMonitor, tqdm

from utils.data import dataset as dataset_module
from utils.data.collate import Collator
from utils.data.dataset import SupervisedDataset, load_dataset, load_rows
from utils.data.sources import resolve_built_in
from utils.data.template import ChatTemplate, JinjaTemplate
from utils.errors import UserError
from utils.families.tokenizers import Tokenizer, load_tokenizer

Kit = tuple[Tokenizer, ChatTemplate]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    folder = tmp_path_factory.mktemp("tokenizer")
    config = write_bpe(folder)
    return load_tokenizer(folder, config), ChatTemplate.load(folder, default=None)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PADDLE_LLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def options(folder: Path | str, **changed: Any) -> Any:
    return SimpleNamespace(
        **{
            "dataset_name_or_path": str(folder),
            "task_name": None,
            "intokens": False,
            "lazy": False,
            "src_length": 128,
            "max_length": 256,
            "max_train_samples": None,
            "max_eval_samples": None,
            "eval_with_do_generation": False,
            "seed": 42,
            "disable_tqdm": True,
            **changed,
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "data"
    made.mkdir()
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    for split, count in (("train", 60), ("dev", 9)):
        rows = [
            {"src": f"Define the noun {i}", "tgt": " ".join(words[(i * k) % 10] for k in range(1 + i * 7 % 23))}
            for i in range(count)
        ]
        (made / f"{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def supervised(args: Any, kit: Kit, split: str = "train") -> SupervisedDataset:
    loaded = load_dataset(args, *kit, split)
    assert isinstance(loaded, SupervisedDataset)
    return loaded


def plain(items: Any) -> list[tuple[list[int], list[int]]]:
    return [(item["input_ids"].tolist(), item["labels"].tolist()) for item in items]


def test_second_load_reads_the_cache(folder: Path, kit: Kit, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = supervised(options(folder), kit)
    assert len(first) == 60 and first.report.kept == 60

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(dataset_module, "tokenize", fail)
    again = supervised(options(folder, intokens=True), kit)  # packing happens after the cache
    assert again.report == first.report
    assert isinstance(again._tokenized.input_ids, np.memmap)
    monkeypatch.undo()


def test_rows_that_the_tokenizer_cannot_take_are_all_named(
    folder: Path, kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, encode = folder / "train.json", kit[0].encode

    def raising(text: str, **options: Any) -> list[int]:
        if "boom" in text:
            raise ValueError("no stack left")
        return encode(text, **options)

    lines = file.read_text().splitlines()
    for line in (5, 44):
        lines[line - 1] = json.dumps({"src": "boom", "tgt": "x"})
    file.write_text("\n".join(lines))
    monkeypatch.setattr(kit[0], "encode", raising)
    with pytest.raises(UserError) as caught:
        supervised(options(folder), kit)
    [fault] = caught.value.faults
    assert fault.startswith(f"{file} line 5, 44: ") and "ValueError: no stack left" in fault


def test_whatever_decides_the_ids_decides_the_cache_entry(folder: Path, kit: Kit, cache: Path) -> None:
    def entries() -> int:
        return len(list((cache / "datasets").iterdir()))

    tokenizer = kit[0]
    supervised(options(folder), kit)
    assert entries() == 1
    changes: list[tuple[Any, Kit]] = [
        (options(folder, max_length=255), kit),
        (options(folder, src_length=127), kit),
        (options(folder, max_train_samples=5), kit),
        (options(folder), (tokenizer, JinjaTemplate("{{ messages[0].content }}{% if messages[1] %}!{% endif %}", ""))),
    ]
    for number, (args, changed) in enumerate(changes, 2):
        supervised(args, changed)
        assert entries() == number
    with (folder / "train.json").open("a") as file:
        file.write('{"src": "more", "tgt": "rows"}\n')
    assert len(supervised(options(folder), kit)) == 61
    assert entries() == len(changes) + 2


def test_damaged_cache_entry_is_made_again(folder: Path, kit: Kit, cache: Path) -> None:
    before = plain(supervised(options(folder), kit))
    (entry,) = (cache / "datasets").iterdir()
    (entry / "labels.npy").write_bytes(b"half")
    assert plain(supervised(options(folder), kit)) == before


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    folder: Path, kit: Kit, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.write_text("a file, not a folder")
    assert len(supervised(options(folder), kit)) == 60
    assert "could not be cached" in capsys.readouterr().err


def test_packs_hold_every_example_once(folder: Path, kit: Kit) -> None:
    singles = supervised(options(folder), kit)
    packed = supervised(options(folder, intokens=True), kit)
    assert len(packed) < len(singles) / 2
    assert packed.efficiency is not None and packed.efficiency > 0.9
    found = []
    for item in packed:
        assert len(item["input_ids"]) == sum(item["lengths"]) <= 256
        start = 0
        for length in item["lengths"]:
            part = slice(start, start + length)
            found.append((item["input_ids"][part].tolist(), item["labels"][part].tolist()))
            start += length
    assert sorted(found) == sorted(plain(singles))
    assert f"packed into {len(packed)} rows" in packed.summary()


def test_fingerprint_is_that_of_the_tokens(folder: Path, kit: Kit, tmp_path: Path) -> None:
    first = supervised(options(folder), kit).fingerprint()
    moved = folder.rename(tmp_path / "moved")
    assert supervised(options(moved, src_length=127), kit).fingerprint() == first
    assert supervised(options(moved, max_train_samples=59), kit).fingerprint() != first
    text = (moved / "train.json").read_text()
    (moved / "train.json").write_text(text.replace("one", "two", 1))
    assert supervised(options(moved), kit).fingerprint() != first


def test_evaluation_by_generation_is_never_packed(folder: Path, kit: Kit) -> None:
    args = options(folder, intokens=True, eval_with_do_generation=True)
    assert supervised(args, kit, "dev").efficiency is None
    assert supervised(args, kit, "train").efficiency is not None
    assert supervised(options(folder, intokens=True), kit, "dev").efficiency is not None


def test_limits_on_rows(folder: Path, kit: Kit) -> None:
    args = options(folder, max_train_samples=7, max_eval_samples=4)
    assert (len(supervised(args, kit)), len(supervised(args, kit, "dev"))) == (7, 4)
    assert [row.line for row in load_rows(args, "dev")] == [1, 2, 3, 4]


def test_calibration_rows_are_those_of_training_unless_given(folder: Path, kit: Kit) -> None:
    assert len(supervised(options(folder), kit, "quant")) == 60
    (folder / "quant.json").write_text('{"src": "one", "tgt": "two"}\n')
    assert len(supervised(options(folder), kit, "quant")) == 1
    with pytest.raises(UserError, match=r"test\.json"):
        load_dataset(options(folder), *kit, "test")


def test_items_by_number(folder: Path, kit: Kit) -> None:
    loaded = supervised(options(folder), kit)
    with pytest.raises(IndexError):
        loaded[60]
    assert loaded.lengths.tolist() == [len(item["input_ids"]) for item in loaded]
    loaded[0]["input_ids"][0] = 3  # a loader may change what it got
    assert loaded[0]["input_ids"][0] == 1


def test_padded_batch() -> None:
    items = [
        {"input_ids": np.array([5, 6, 7], np.int32), "labels": np.array([-100, 7, 2], np.int32)},
        {"input_ids": np.array([8], np.int32), "labels": np.array([2], np.int32)},
    ]
    batch = Collator(pad_id=9, pad_to_multiple=4)(items)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 7, 2, -100], [2, -100, -100, -100]]
    assert {name: value.dtype for name, value in batch.items()} == {"input_ids": np.int64, "labels": np.int64}


def test_packed_batch_says_who_may_see_whom() -> None:
    items = [
        {"input_ids": np.arange(5), "labels": np.arange(5), "lengths": [2, 3]},
        {"input_ids": np.arange(2), "labels": np.arange(2), "lengths": [2]},
    ]
    batch = Collator(pad_id=0)(items)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 0, 0]]
    assert batch["segment_ends"][:, 0, :, 0].tolist() == [[2, 2, 5, 5, 5], [2, 2, 5, 5, 5]]
    assert batch["segment_ends"].shape == (2, 1, 5, 1)
    assert batch["segment_ends"].dtype == np.int32
    # The mask that a causal model makes of it: query q sees key k if k <= q < end of k's segment.
    query, key = np.mgrid[0:5, 0:5]
    visible = (key <= query) & (query < batch["segment_ends"][0, 0, :, 0][key])
    segment = np.array([0, 0, 1, 1, 1])
    assert (visible == ((key <= query) & (segment[query] == segment[key]))).all()


def test_no_usable_row_is_a_user_error(folder: Path, kit: Kit) -> None:
    (folder / "train.json").write_text("\n")
    with pytest.raises(UserError, match=r"train\.json: no row could be used"):
        load_dataset(options(folder), *kit, "train")


def test_spellings_of_built_in_names() -> None:
    assert {resolve_built_in(name) for name in ("advertise_gen", "AdvertiseGen", "advertisegen")} == {"advertisegen"}


def test_built_in_dataset(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but PaddleNLP's download, which tests must not ask for."""
    import paddlenlp.datasets

    asked: list[Any] = []

    def load(name: str, /, **given: Any) -> list[dict[str, Any]]:
        asked.append((name, given))
        return [{"source": "one", "target": "two", "id": 0}, {"source": "three", "target": "four", "id": 1}]

    monkeypatch.setattr(paddlenlp.datasets, "load_dataset", load)
    args = options("dureader_qg", task_name="part")
    assert [row.answer for row in load_rows(args, "dev")] == ["two", "four"]
    assert len(supervised(args, kit, "quant")) == 2
    assert asked[0] == ("dureader_qg", {"name": "part", "splits": "dev", "lazy": False})
    assert asked[1][1]["splits"] == "train"

    def fail(name: str, /, **_: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(paddlenlp.datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="built-in dataset dureader_qg, split train: could not be loaded"):
        load_dataset(options("dureader_qg"), *kit, "train")
    monkeypatch.setattr(paddlenlp.datasets, "load_dataset", lambda _, /, **given: [{"tokens": ["a"], "labels": [1]}])
    with pytest.raises(UserError, match=r"built-in dataset msra_ner/train, row 1: no \"src\""):
        load_dataset(options("msra_ner"), *kit, "train")
    with pytest.raises(UserError, match="lazy reads files"):
        load_dataset(options("dureader_qg", lazy=True), *kit, "train")


def test_the_thread_of_the_bar_leaves_sigterm_to_the_main_one(
    folder: Path, kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is still there while Paddle loads and may replace the handler."""
    masks: list[set[int]] = []
    monkeypatch.setattr(tqdm, "monitor", None)
    monkeypatch.setattr(TMonitor, "run", lambda self: masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
    supervised(options(folder, disable_tqdm=False), kit)
    tqdm.monitor.join()
    assert masks and all(signal.SIGTERM in mask for mask in masks)
