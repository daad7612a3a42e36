"""The endless stream: every row in every epoch, and exact resume at any item."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import write_bpe

from utils.data import stream as stream_module
from utils.data.collate import Collator
from utils.data.dataset import load_dataset
from utils.data.encode import Example, encode_row
from utils.data.rows import read_rows
from utils.data.sources import FileSource
from utils.data.stream import StreamDataset
from utils.data.template import ChatTemplate, JinjaTemplate
from utils.errors import UserError
from utils.families.tokenizers import Tokenizer, load_tokenizer
from utils.parallel.process_group import ProcessGroup
from utils.parallel.topology import Layout

Kit = tuple[Tokenizer, ChatTemplate]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    folder = tmp_path_factory.mktemp("tokenizer")
    config = write_bpe(folder)
    return load_tokenizer(folder, config), ChatTemplate.load(folder, default=None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files of 40 and 25 rows, with blank lines."""
    folder = tmp_path_factory.mktemp("data") / "train"
    folder.mkdir()
    for name, numbers in (("a.json", range(40)), ("b.json", range(40, 65))):
        rows = [json.dumps({"src": f"Define {i}", "tgt": "one two " * (1 + i * 5 % 9)}) for i in numbers]
        (folder / name).write_text("\n\n".join(rows) + "\n\n")
    return sorted(folder.iterdir())


def stream(files: list[Path], kit: Kit, *, limit: int | None = None, **options: Any) -> StreamDataset:
    chosen = {"src_length": 64, "max_length": 128, "seed": 3, "block_packs": 4, **options}
    return StreamDataset(FileSource(files, limit), *kit, **chosen)


def plain(items: Any) -> list[tuple[list[int], ...]]:
    return [tuple(np.asarray(item[name]).tolist() for name in sorted(item)) for item in items]


def segments(items: Any) -> list[tuple[list[int], list[int]]]:
    found = []
    for item in items:
        start = 0
        for length in item.get("lengths", [len(item["input_ids"])]):
            part = slice(start, start + length)
            found.append((item["input_ids"][part].tolist(), item["labels"][part].tolist()))
            start += length
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_every_epoch_gives_every_row_once(files: list[Path], kit: Kit, packed: bool) -> None:
    examples = [encode_row(row, *kit, 64, 128) for row in read_rows(files)]
    expected = sorted((e.input_ids.tolist(), e.labels.tolist()) for e in examples if isinstance(e, Example))
    dataset = stream(files, kit, packed=packed)
    iterator = iter(dataset)
    orders = []
    for _ in range(3):
        epoch: list[Any] = []
        while len(epoch) < len(expected):
            epoch += segments([next(iterator)])
        assert sorted(epoch) == expected
        orders.append(epoch)
    assert orders[0] != orders[1] != orders[2]  # the shuffle differs from epoch to epoch


def test_packs_keep_the_limit_and_are_full(files: list[Path], kit: Kit) -> None:
    items = list(islice(stream(files, kit, packed=True, block_packs=16), 40))
    assert all(sum(item["lengths"]) == len(item["input_ids"]) <= 128 for item in items)
    assert np.mean([len(item["input_ids"]) for item in items]) > 0.8 * 128


@settings(deadline=None, max_examples=40)
@given(
    after=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    packed=st.booleans(),
    shuffle=st.booleans(),
    read_ahead=st.integers(0, 30),
    limit=st.sampled_from([None, 1, 33, 50]),
)
def test_resume_goes_on_exactly(
    after: list[int],
    packed: bool,
    shuffle: bool,
    read_ahead: int,
    limit: int | None,
    files: list[Path],
    kit: Kit,
) -> None:
    """Several resumes in a row, each after a loader has read further than what was used."""
    options = {"packed": packed, "shuffle": shuffle, "limit": limit}
    expected = plain(islice(stream(files, kit, **options), sum(after) + 40))
    done = 0
    state: dict[str, Any] | None = None
    for count in after:
        dataset = stream(files, kit, **options)
        iterator = iter(dataset) if state is None else dataset.iter_from(state)
        assert plain(islice(iterator, count + read_ahead)) == expected[done : done + count + read_ahead]
        done += count
        state = json.loads(json.dumps(dataset.state_after(done)))
    assert state is not None
    rest = stream(files, kit, **options).iter_from(state)
    assert plain(islice(rest, 40)) == expected[done : done + 40]


def test_state_of_items_read_by_someone_else(files: list[Path], kit: Kit) -> None:
    used = stream(files, kit)
    list(islice(used, 30))
    assert stream(files, kit).state_after(30) == used.state_after(30)
    resumed = stream(files, kit)
    resumed.restore(used.state_after(60))
    with pytest.raises(ValueError, match="was resumed after item"):
        resumed.state_after(3)


def test_changed_files_or_seed_cannot_resume(files: list[Path], kit: Kit) -> None:
    state = stream(files, kit).state_after(5)
    for other in (stream(files[:1], kit), stream(files, kit, seed=4)):
        with pytest.raises(UserError, match="have changed since the checkpoint"):
            other.restore(state)


def test_a_broken_row_late_in_the_stream_is_left_out_and_said(
    tmp_path: Path, kit: Kit, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.json"
    file.write_text('{"src": "one", "tgt": "two"}\n{"src": "one"\n{"src": "one", "tgt": "three"}\n')
    dataset = stream([file], kit, shuffle=False)
    answers = [[int(label) for label in item["labels"] if label != -100] for item in islice(dataset, 4)]
    assert [kit[0].decode(answer) for answer in answers] == ["two", "three"] * 2
    assert f"row left out: {file} line 2: not valid JSON" in capsys.readouterr().err
    assert dataset.report.counts == {"dropped, broken": 1}


def test_a_row_that_the_template_refuses_is_left_out(tmp_path: Path, kit: Kit) -> None:
    file = tmp_path / "train.json"
    refused = {"messages": [{"role": role, "content": "one"} for role in ("system", "user", "assistant")]}
    file.write_text(json.dumps(refused) + '\n{"src": "one", "tgt": "two"}\n')
    picky = JinjaTemplate(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.content }}{% endfor %}",
        "test",
    )
    dataset = stream([file], (kit[0], picky))
    assert len(segments(islice(dataset, 2))) == 2
    assert dataset.report.places == {"dropped, broken": [f"{file} line 1"]}


@pytest.mark.parametrize("content", ["", "\n\n", "?\n"])
def test_no_usable_row_does_not_hang(content: str, tmp_path: Path, kit: Kit) -> None:
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(UserError, match="no row could be used"):
        next(iter(stream([tmp_path / "train.json"], kit)))


def test_json_array_is_refused(tmp_path: Path, kit: Kit) -> None:
    (tmp_path / "train.json").write_text('[{"src": "one", "tgt": "two"}]')
    with pytest.raises(UserError, match="cannot be streamed with lazy"):
        stream([tmp_path / "train.json"], kit)


class Stuck(BaseException):
    """What a library in Rust raises when it panics: no `Exception`."""


def test_rows_that_cannot_be_read_or_encoded_are_left_out_and_counted(
    tmp_path: Path, kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, encode = tmp_path / "train.json", kit[0].encode

    def raising(text: str, **options: Any) -> list[int]:
        if "boom" in text:
            raise Stuck("max stack size exceeded")
        return encode(text, **options)

    good = '{"src": "one", "tgt": "two"}'
    broken = ['{"src": "one", "tgt": "two", "n": ' + "1" * 5000 + "}", '{"src": "boom", "tgt": "two"}', "[" * 100_000]
    broken += ['{"src": "a\\ud83d", "tgt": "b"}', "\ufeff?"]
    file.write_text("\n".join([good, *broken, good]), "utf-8")
    monkeypatch.setattr(kit[0], "encode", raising)
    dataset = stream([file], kit)
    assert len(list(islice(dataset, 2))) == 2
    assert dataset.report.counts == {"dropped, broken": 5} and dataset.report.kept == 2
    assert dataset.report.places == {"dropped, broken": [f"{file} line {line}" for line in range(2, 7)]}


def test_files_that_change_or_go_while_they_are_read_are_an_error(tmp_path: Path, kit: Kit) -> None:
    file = tmp_path / "train.json"
    rows = '{"src": "one", "tgt": "two"}\n' * 2000
    for change, said in (
        (file.unlink, "cannot be read any more"),
        (lambda: file.write_text(rows + "?"), "has changed"),
        (lambda: file.write_text(""), "has changed"),
    ):
        file.write_text(rows)
        items = iter(stream([file], kit))
        next(items)
        change()
        with pytest.raises(UserError, match=f"train.json: {said}.*give the same command again"):
            list(islice(items, 5000))


class Neighbour(ProcessGroup):
    """One of several processes, here a thread, that exchanges values with the others."""

    def __init__(self, rank: int, world: int, shared: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(Layout(world=world, rank=rank))
        self.shared, self.meeting = shared, barrier

    def gather(self, value: Any) -> list[Any]:
        self.shared[self.layout.rank] = json.loads(json.dumps(value))
        self.meeting.wait(60)
        found = list(self.shared)
        self.meeting.wait(60)
        return found


@pytest.mark.parametrize("packed", [False, True])
def test_processes_make_each_row_into_tokens_once_and_have_the_same_stream(
    files: list[Path], kit: Kit, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plain(islice(stream(files, kit, packed=packed), 100))
    made: list[str] = []

    def noting(row: Any, *rest: Any) -> Any:
        made.append(row.place)
        return encode_row(row, *rest)

    monkeypatch.setattr(stream_module, "CHUNK_ROWS", 4)
    monkeypatch.setattr(stream_module, "encode_row", noting)
    world = 3
    shared, barrier = [None] * world, threading.Barrier(world)
    datasets = [
        stream(files, kit, packed=packed, processes=Neighbour(rank, world, shared, barrier)) for rank in range(world)
    ]
    with ThreadPoolExecutor(world) as threads:
        found = list(threads.map(lambda dataset: plain(islice(dataset, 12)), datasets))
        assert found == [expected[:12]] * world
        assert len(made) == len(set(made)) > 12
        states = list(threads.map(lambda dataset: dataset.state_after(9), datasets))
        assert states == [stream(files, kit, packed=packed).state_after(9)] * world
        found = list(threads.map(lambda dataset: plain(islice(dataset.iter_from(states[0]), 90)), datasets))
        assert found == [expected[9:99]] * world


def test_loaders_of_a_stream_have_its_batches(files: list[Path], kit: Kit) -> None:
    from utils.training.loader import StreamLoader

    args: Any = SimpleNamespace(
        dataset_name_or_path=str(files[0].parent.parent),
        task_name=None,
        intokens=True,
        lazy=True,
        src_length=64,
        max_length=128,
        max_train_samples=None,
        max_eval_samples=None,
        eval_with_do_generation=False,
        seed=3,
        disable_tqdm=True,
    )
    expected = list(islice(stream(files, kit, packed=True, block_packs=128), 12))
    collate = Collator(kit[0].pad_id)
    for reader in (0, 1):
        dataset = load_dataset(args, *kit, "train")
        assert isinstance(dataset, StreamDataset) and "0 examples" in dataset.summary()
        loader = StreamLoader(dataset, 2, collate, readers=2, reader=reader)
        for number, batch in enumerate(islice(loader, 3)):
            first = 4 * number + 2 * reader
            made = collate(expected[first : first + 2])
            assert set(batch) == set(made)
            assert all((batch[name].numpy() == made[name]).all() for name in made)
