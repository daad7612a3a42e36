"""Token files and what is made of them: reader, splits, order, blends, evaluation text."""

from __future__ import annotations

import itertools
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tiny_text import by_hand, write_tokens

from utils.data.collate import Collator
from utils.data.pretrain_dataset import (
    Documents,
    EvaluationText,
    PretrainData,
    PretrainDataset,
    TokenStream,
    blend,
    split_ranges,
)
from utils.data.pretrain_files import CODES, find_files, index_bytes, open_tokens
from utils.errors import UserError


def contents(prefix: str) -> list[list[int]]:
    file = open_tokens(prefix)
    return [file.tokens[first:end].tolist() for first, end in itertools.pairwise(file.starts)]


# --- files -----------------------------------------------------------------------------------------


def test_reads_what_was_written_byte_by_byte(tmp_path: Path) -> None:
    assert contents(by_hand(tmp_path / "a")) == [[5, 6, 7], [8, 9, 10], [300]]


def test_writes_the_same_bytes(tmp_path: Path) -> None:
    by_hand(tmp_path / "a")
    parts = index_bytes("uint16", np.array([2, 1, 3, 1], np.int32), np.array([0, 2, 3, 4], np.int64))
    assert b"".join(parts) == (tmp_path / "a.idx").read_bytes()


@pytest.mark.parametrize("kind", CODES.values())
def test_every_type_of_ids(tmp_path: Path, kind: str) -> None:
    documents = [[1, 2, 100], [3], [4, 5]]
    assert contents(write_tokens(tmp_path / "a", documents, kind)) == documents


def test_the_library_reads_our_files_alike(tmp_path: Path) -> None:
    from paddlenlp.data.indexed_dataset import MMapIndexedDataset

    prefix = write_tokens(tmp_path / "a", [[7, 8, 9], [10, 11]])
    theirs = MMapIndexedDataset(prefix)
    assert [np.asarray(theirs[i]).tolist() for i in range(len(theirs))] == [[7, 8, 9], [10, 11]]
    assert theirs.doc_idx.tolist() == [0, 1, 2]


@pytest.mark.parametrize("docs", [[0, 2, 3], [2, 3], None])
def test_older_files(tmp_path: Path, docs: list[int] | None) -> None:
    np.save(tmp_path / "a_ids.npy", np.array([5, 6, 7, 8, 9], dtype=np.uint16))
    marks = {} if docs is None else {"docs": np.array(docs)}
    np.savez(tmp_path / "a_idx.npz", lens=np.array([2, 1, 2], dtype=np.int32), **marks)
    assert contents(str(tmp_path / "a")) == ([[5, 6, 7], [8, 9]] if docs else [[5, 6], [7], [8, 9]])
    assert find_files(str(tmp_path)) == [str(tmp_path / "a")]


def change(path: Path, place: int, content: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[place : place + len(content)] = content
    path.write_bytes(whole)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: change(p / "a.idx", 0, b"XX"), "does not begin with MMIDIDX"),
        (lambda p: change(p / "a.idx", 9, b"\x02"), "is of version 2"),
        (lambda p: change(p / "a.idx", 17, b"\x06"), "type code 6 is numbers with fractions"),
        (lambda p: change(p / "a.idx", 17, b"\x63"), "type code 99 is not known"),
        (lambda p: change(p / "a.idx", 18, b"\x05"), "bytes where its index says"),
        (lambda p: (p / "a.idx").write_bytes((p / "a.idx").read_bytes()[:-1]), "a.idx: has 113 bytes where"),
        (lambda p: (p / "a.idx").write_bytes((p / "a.idx").read_bytes()[:12]), "a.idx: is cut short"),
        (lambda p: (p / "a.bin").write_bytes(b"\0" * 13), "a.bin: has 13 bytes where its index says 14"),
        (lambda p: (p / "a.bin").unlink(), "a.bin: is missing beside a.idx"),
        (lambda p: change(p / "a.idx", 50, struct.pack("<q", 99)), "do not follow one another"),
        (lambda p: change(p / "a.idx", 34, struct.pack("<i", -2)), "do not follow one another"),
        (lambda p: change(p / "a.idx", 106, struct.pack("<q", 3)), "do not cover its 4 sequences"),
    ],
)
def test_damaged_files(tmp_path: Path, damage, message: str) -> None:
    by_hand(tmp_path / "a")
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        open_tokens(str(tmp_path / "a"))


@pytest.mark.parametrize(
    ("ids", "sizes", "message"),
    [
        (np.array([1, 2, 3]), [2], "has 3 ids where its index says 2"),
        (np.array([1.5]), [1], "expected one row of token ids, found float64"),
        (np.array(["a"], dtype=object), [1], "cannot be read as token files"),  # a pickle, which is not opened
    ],
)
def test_damaged_older_files(tmp_path: Path, ids: np.ndarray, sizes: list[int], message: str) -> None:
    np.save(tmp_path / "a_ids.npy", ids)
    np.savez(tmp_path / "a_idx.npz", lens=np.array(sizes))
    with pytest.raises(UserError, match=message):
        open_tokens(str(tmp_path / "a"))


def test_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    prefix = by_hand(tmp_path / "a")
    PretrainData([(None, prefix)], (1, 0, 0), vocabulary=301).check_ids()
    with pytest.raises(UserError, match="holds the token id 300, the model has ids from 0 to 299"):
        PretrainData([(None, prefix)], (1, 0, 0), vocabulary=300).check_ids()
    negative = write_tokens(tmp_path / "b", [[1, -2]], "int32")
    with pytest.raises(UserError, match="holds the token id -2"):
        PretrainData([(None, negative)], (1, 0, 0), vocabulary=300).check_ids()


def test_an_id_that_was_not_looked_at_is_refused_when_it_is_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("utils.data.pretrain_files.CHECKED_BLOCK", 1)
    monkeypatch.setattr("utils.data.pretrain_files.CHECKED_BLOCKS", 2)
    prefix = write_tokens(tmp_path / "a", [[1] * 5, [900] * 5, [1] * 5])
    text = PretrainData([(None, prefix)], (1, 0, 0), vocabulary=300)
    text.check_ids()
    stream = TokenStream(text.documents("train")[0], 4, seed=1)
    with pytest.raises(UserError, match="holds the token id 900"):
        [stream.sample(number) for number in range(3)]


# --- splits ----------------------------------------------------------------------------------------


def test_splits_are_of_documents_and_cover_them() -> None:
    assert split_ranges(1000, (949, 50, 1)) == [(0, 949), (949, 999), (999, 1000)]
    assert split_ranges(10, (8, 1, 1)) == [(0, 8), (8, 9), (9, 10)]
    assert split_ranges(3, (1, 0, 0)) == [(0, 3), (3, 3), (3, 3)]


def test_every_file_of_a_folder_is_split(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a", [[1, 1]] * 4)
    write_tokens(tmp_path / "b", [[2, 2]] * 4)
    text = PretrainData([(None, str(tmp_path))], (1, 1, 0), vocabulary=10)
    for split in ("train", "dev"):
        [documents] = text.documents(split)
        assert [documents.read(i, 0, 2).tolist() for i in range(4)] == [[1, 1]] * 2 + [[2, 2]] * 2
    with pytest.raises(UserError, match=r"8 documents leave no text for the test part of split 1,1,0"):
        text.documents("test")


# --- order -----------------------------------------------------------------------------------------


def stream_of(tmp_path: Path, documents: list[list[int]], length: int, seed: int = 3) -> TokenStream:
    file = open_tokens(write_tokens(tmp_path / "a", documents))
    return TokenStream(Documents("a", [file], [(0, len(documents))], 1 << 16), length, seed)


def test_an_epoch_has_every_token_once_in_whole_documents(tmp_path: Path) -> None:
    documents = [[100 * d + i for i in range(2 + d % 5)] for d in range(40)]
    documents[7] = []
    stream = stream_of(tmp_path, documents, length=12)
    total = sum(map(len, documents))
    assert total % 12 == 0  # so that an epoch is a whole number of samples
    orders = []
    for epoch in range(3):
        first = stream.first_sample(epoch)
        samples = [stream.sample(first + number) for number in range(total // 12)]
        learned = Counter(int(i) for sample in samples for i in sample[1:])
        seen = Counter(int(i) for sample in samples for i in sample[:-1])
        assert seen == Counter(i for document in documents for i in document)
        assert sum(learned.values()) == total
        orders.append([sample.tolist() for sample in samples])
        for sample in samples:  # within a sample a document goes on, or another one begins
            for before, after in itertools.pairwise(sample.tolist()):
                assert after == before + 1 or (after % 100 == 0 and before + 1 not in documents[before // 100])
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_a_long_document_is_not_read_from_beginning_to_end(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, [list(range(400))], 10)
    begins = [int(stream.sample(number)[0]) for number in range(40)]
    assert sorted(begins) == list(range(0, 400, 10)) and begins != sorted(begins)


def test_a_sample_is_a_function_of_seed_and_number(tmp_path: Path) -> None:
    documents = [[d] * (1 + d % 7) for d in range(50)]
    forward = stream_of(tmp_path, documents, 11)
    samples = [forward.sample(number).tolist() for number in range(120)]
    again = stream_of(tmp_path, documents, 11)
    assert [again.sample(number).tolist() for number in reversed(range(120))] == samples[::-1]
    other = stream_of(tmp_path, documents, 11, seed=4)
    assert [other.sample(number).tolist() for number in range(120)] != samples
    assert all(len(sample) == 12 for sample in samples)


def test_text_shorter_than_a_sample_is_repeated(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, [[1, 2], [3]], 10)
    for number in range(5):
        sample = stream.sample(number).tolist()
        assert len(sample) == 11 and set(sample) == {1, 2, 3}


def test_items_are_what_the_collator_takes(tmp_path: Path) -> None:
    dataset = PretrainDataset([stream_of(tmp_path, [list(range(30))], 6)], [1.0], samples=4)
    item = dataset[0]
    assert item["labels"][:-1].tolist() == item["input_ids"][1:].tolist() and len(item["input_ids"]) == 6
    batch = Collator(0)([dataset[0], dataset[1]])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 6) and (batch["labels"] >= 0).all()
    with pytest.raises(IndexError):
        dataset[4]
    assert dataset.epochs(10) == 2.0


# --- blends ----------------------------------------------------------------------------------------


def test_a_blend_has_its_shares_at_every_length() -> None:
    shares = np.array([0.7, 0.2, 0.1])
    pattern = blend(shares, 1000)
    for length in (10, 37, 500, 1000):
        counts = np.bincount(pattern[:length], minlength=3)
        assert (abs(counts - shares * length) <= 1.0).all()


def test_blended_samples_come_from_their_sources_in_order(tmp_path: Path) -> None:
    first, second = write_tokens(tmp_path / "a", [[1] * 50] * 4), write_tokens(tmp_path / "b", [[2] * 30] * 4)
    text = PretrainData([(3.0, first), (1.0, second)], (1, 0, 0), vocabulary=10)
    streams = [TokenStream(one, 5, 0) for one in text.documents("train")]
    dataset = PretrainDataset(streams, text.weights, samples=50_000)
    sources = [int(dataset[number]["input_ids"][0]) for number in range(400)]
    assert Counter(sources) == {1: 300, 2: 100}
    taken: dict[int, list[int]] = {0: [], 1: []}
    for place, stream in enumerate(streams):
        stream.sample = lambda number, place=place: (taken[place].append(number), np.zeros(6, np.int32))[1]
    for number in range(45_000):  # more than two periods
        dataset[number]
    assert taken[0] == list(range(33_750)) and taken[1] == list(range(11_250))
    with pytest.raises(UserError, match=r"is too little for .*b"):
        PretrainDataset(streams, [1.0, 1e-9])


def test_fingerprint_tells_files_splits_and_weights_apart(tmp_path: Path) -> None:
    one, other = write_tokens(tmp_path / "a", [[1] * 9] * 9), write_tokens(tmp_path / "b", [[2] * 9] * 9)

    def mark(sources: list, shares: tuple = (1, 0, 0)) -> str:
        text = PretrainData(sources, shares, vocabulary=10)
        return PretrainDataset([TokenStream(d, 4, 0) for d in text.documents("train")], text.weights).fingerprint()

    marks = [
        mark([(None, one)]),
        mark([(None, other)]),
        mark([(None, one)], (2, 1, 0)),
        mark([(1, one), (1, other)]),
        mark([(1, one), (2, other)]),
    ]
    assert len(set(marks)) == 5
    assert mark([(2, one), (4, other)]) == marks[4]
    write_tokens(tmp_path / "a", [[1] * 8 + [3]] * 9)
    assert mark([(None, one)]) != marks[0]


# --- evaluation ------------------------------------------------------------------------------------


def test_evaluation_predicts_every_token_but_the_first_once(tmp_path: Path) -> None:
    ids = list(range(1, 24))
    prefix = write_tokens(tmp_path / "a", [ids[:5], ids[5:6], ids[6:]])
    documents = PretrainData([(None, prefix)], (0, 1, 0), vocabulary=100).documents("dev")
    text = EvaluationText(documents, length=4)
    assert len(text) == 6
    assert [i for number in range(6) for i in text[number]["labels"].tolist()] == ids[1:]
    assert [i for number in range(6) for i in text[number]["input_ids"].tolist()] == ids[:-1]
    assert len(text[5]["input_ids"]) == 2


def test_a_limited_evaluation_is_spread(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "a", [list(range(101))])
    documents = PretrainData([(None, prefix)], (0, 1, 0), vocabulary=200).documents("dev")
    text = EvaluationText(documents * 2, length=10, limit=3)
    assert [int(text[number]["input_ids"][0]) for number in range(3)] == [0, 0, 90]
    assert "20 samples of up to 10, of which 3 are evaluated" in text.summary()
