"""Samples of pretraining text: pieces of fixed length of shuffled documents, by number, without end.

Every order is a function of (seed, epoch), and every sample one of its number, so that a run continued
from a checkpoint sees what it would have seen. In memory are index arrays only: for every document
of a source its place and, for the epochs in use, its turn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from utils.data.pretrain_files import TokenFile, check_range, find_files, open_tokens
from utils.errors import UserError

SPLITS = ("train", "dev", "test")
PERIOD = 20_000  # samples after which a blend of sources repeats its pattern
KEPT_EPOCHS = 3


class Documents:
    """The documents of one split of one source, which may be several files.

    Attributes:
        name: for messages.
        count, tokens: how many there are.
    """

    def __init__(self, name: str, files: Sequence[TokenFile], ranges: Sequence[tuple[int, int]], vocabulary: int):
        """
        Args:
            ranges: of each file, the first of its documents and the one behind the last.
            vocabulary: ids from there on are refused when they are read.
        """
        self.name, self.files, self.ranges, self.vocabulary = name, list(files), list(ranges), vocabulary
        spans = [np.arange(first, end, dtype=np.int64) for first, end in ranges]
        self._file = np.repeat(np.arange(len(self.files), dtype=np.int32), [len(span) for span in spans])
        self._start = np.concatenate([file.starts[span] for file, span in zip(self.files, spans, strict=True)])
        ends = np.concatenate([file.starts[span + 1] for file, span in zip(self.files, spans, strict=True)])
        self.sizes = ends - self._start
        self.count, self.tokens = len(self.sizes), int(self.sizes.sum())

    def read(self, document: int, first: int, end: int) -> np.ndarray:
        """Tokens `first` to `end` of a document, int32 [end - first].

        Raises:
            UserError: an id that the model does not have.
        """
        file, start = self.files[self._file[document]], int(self._start[document])
        ids = np.asarray(file.tokens[start + first : start + end])
        check_range(ids, self.vocabulary, file.prefix)
        return ids.astype(np.int32)


class _Epoch:
    """The order of an epoch: of its documents, and of the samples that begin in it."""

    def __init__(self, documents: Documents, seed: int, epoch: int, samples: int) -> None:
        self.order = np.arange(documents.count, dtype=np.uint32)
        np.random.Generator(np.random.PCG64([seed, epoch, 0])).shuffle(self.order)
        self.ends = np.cumsum(documents.sizes[self.order])
        self.samples = np.arange(samples, dtype=np.uint32)
        np.random.Generator(np.random.PCG64([seed, epoch, 1])).shuffle(self.samples)


class TokenStream:
    """The documents of a source epoch after epoch, each time in another order, cut into samples.

    Sample k is `length + 1` tokens that begin at token k * length of the endless text, so every token of an
    epoch is learned once; the samples that begin in one epoch are shuffled among themselves.
    """

    def __init__(self, documents: Documents, length: int, seed: int) -> None:
        self.documents, self.length, self.seed = documents, length, seed
        self._epochs: dict[int, _Epoch] = {}

    def first_sample(self, epoch: int) -> int:
        """The number of the first sample that begins in an epoch."""
        return -(-epoch * self.documents.tokens // self.length)

    def sample(self, number: int) -> np.ndarray:
        """Sample `number` (from 0, without end), int32 [length + 1]."""
        epoch = number * self.length // self.documents.tokens
        first = self.first_sample(epoch)
        place = (first + int(self._epoch(epoch).samples[number - first])) * self.length
        return self._text(place, self.length + 1)

    def _epoch(self, epoch: int) -> _Epoch:
        found = self._epochs.get(epoch)
        if found is None:
            samples = self.first_sample(epoch + 1) - self.first_sample(epoch)
            found = self._epochs[epoch] = _Epoch(self.documents, self.seed, epoch, samples)
            while len(self._epochs) > KEPT_EPOCHS:
                del self._epochs[next(iter(self._epochs))]
        return found

    def _text(self, place: int, count: int) -> np.ndarray:
        """`count` tokens of the endless text from `place` on."""
        parts = []
        while count:
            epoch, within = divmod(place, self.documents.tokens)
            order = self._epoch(epoch)
            turn = int(np.searchsorted(order.ends, within, side="right"))
            left = int(order.ends[turn]) - within  # of this document
            document = int(order.order[turn])
            first = int(self.documents.sizes[document]) - left
            taken = min(left, count)
            parts.append(self.documents.read(document, first, first + taken))
            place, count = place + taken, count - taken
        return np.concatenate(parts)


def as_item(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """`input_ids` and `labels` (shifted: labels[t] follows input_ids[t]), int32 [n], of n + 1 tokens."""
    return {"input_ids": tokens[:-1], "labels": tokens[1:]}


class PretrainDataset:
    """The samples of a training run by number; with several sources, in a fixed pattern of their weights.

    Attributes:
        ordered: tells the trainer that the samples are in their order already.
        samples: its length, what the steps of the run take.
    """

    ordered = True

    def __init__(self, streams: Sequence[TokenStream], weights: Sequence[float], samples: int = 0) -> None:
        """
        Args:
            weights: shares of the samples, one per stream.

        Raises:
            UserError: a weight so small that its source would never come.
        """
        self.streams, self.samples, self.length = list(streams), samples, streams[0].length
        shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        self._pattern = blend(shares, PERIOD if len(streams) > 1 else 1)
        self._counts = np.bincount(self._pattern, minlength=len(streams))
        for stream, share, count in zip(streams, shares, self._counts, strict=True):
            if not count:
                raise UserError(f"input_dir: {share:.1e} of all samples is too little for {stream.documents.name}")
        self._rank = np.zeros(len(self._pattern), dtype=np.int64)  # how often the source came in the pattern before
        for source in range(len(streams)):
            places = self._pattern == source
            self._rank[places] = np.arange(places.sum())
        self.shares = shares

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(stream.documents.tokens for stream in self.streams)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, number: int) -> dict[str, Any]:
        """See `as_item`; n is the length of the samples.

        Raises:
            IndexError: behind the last sample.
            UserError: an id that the model does not have.
        """
        if not 0 <= number < self.samples:
            raise IndexError(number)
        rounds, place = divmod(number, len(self._pattern))
        source = int(self._pattern[place])
        return as_item(self.streams[source].sample(rounds * int(self._counts[source]) + int(self._rank[place])))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(self.samples))

    def epochs(self, samples: int) -> float:
        """How often all tokens have been seen after so many samples (on average over the sources)."""
        return samples * self.length / self.tokens

    def fingerprint(self) -> str:
        """sha256 (hexadecimal) of files, split and weights, so that a continued run is known to see the same data."""
        parts = [[[file.fingerprint for file in one.documents.files], one.documents.ranges] for one in self.streams]
        return hashlib.sha256(json.dumps([parts, self.shares.tolist()]).encode()).hexdigest()

    def summary(self) -> str:
        """What there is, one line per source, and how often the run sees it."""
        lines = [
            f"{one.documents.name}: {one.documents.count:,} documents, {one.documents.tokens:,} tokens"
            + (f", {share:.1%} of the samples" if len(self.streams) > 1 else "")
            for one, share in zip(self.streams, self.shares, strict=True)
        ]
        lines.append(f"{self.samples:,} samples of {self.length:,} tokens, {self.epochs(self.samples):.2f} epochs")
        return "\n".join(lines)


def blend(shares: np.ndarray, period: int) -> np.ndarray:
    """A pattern of sources, int32 [period], in which each comes as often as its share says, evenly spread."""
    pattern = np.zeros(period, dtype=np.int32)
    if len(shares) > 1:
        given = np.zeros(len(shares))
        for place in range(period):
            source = int(np.argmax(shares * (place + 1) - given))  # the one most behind its share
            pattern[place] = source
            given[source] += 1
    return pattern


class EvaluationText:
    """The documents of a split in their order, cut into samples of which every token is predicted once."""

    def __init__(self, sources: Sequence[Documents], length: int, limit: int | None = None) -> None:
        """
        Args:
            limit: no more samples than this, evenly spread.
        """
        self.sources, self.length = list(sources), length
        self._ends = [np.cumsum(one.sizes) for one in self.sources]
        counts = [max(0, -(-(one.tokens - 1) // length)) for one in self.sources]
        self._firsts = np.append(0, np.cumsum(counts))
        self.whole = int(self._firsts[-1])
        kept = self.whole if limit is None else min(limit, self.whole)
        self._chosen = np.linspace(0, max(self.whole - 1, 0), kept).round().astype(np.int64)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """See `as_item`; n is the length of the samples, less in the last one of a source."""
        chosen = int(self._chosen[number])
        source = int(np.searchsorted(self._firsts, chosen, side="right")) - 1
        documents, ends = self.sources[source], self._ends[source]
        place = (chosen - int(self._firsts[source])) * self.length
        count = min(self.length + 1, documents.tokens - place)
        parts = []
        while count:
            document = int(np.searchsorted(ends, place, side="right"))
            left = int(ends[document]) - place
            first, taken = int(documents.sizes[document]) - left, min(left, count)
            parts.append(documents.read(document, first, first + taken))
            place, count = place + taken, count - taken
        return as_item(np.concatenate(parts))

    def fingerprint(self) -> str:
        """sha256 (hexadecimal) of files, split and samples, as of `PretrainDataset`."""
        parts = [[[file.fingerprint for file in one.files], one.ranges] for one in self.sources]
        return hashlib.sha256(json.dumps([parts, self.length, len(self)]).encode()).hexdigest()

    def summary(self) -> str:
        """What there is, and how much of it is evaluated."""
        documents, tokens = sum(one.count for one in self.sources), sum(one.tokens for one in self.sources)
        used = "" if len(self) == self.whole else f", of which {len(self):,} are evaluated"
        return f"{documents:,} documents, {tokens:,} tokens: {self.whole:,} samples of up to {self.length:,}{used}"


def split_ranges(documents: int, shares: Sequence[float]) -> list[tuple[int, int]]:
    """First and end of the documents of each split: consecutive, as large as the shares say."""
    bounds = np.round(np.append(0.0, np.cumsum(shares)) / sum(shares) * documents).astype(int).tolist()
    return list(pairwise(bounds))


class PretrainData:
    """All sources of a run, opened."""

    def __init__(self, sources: Sequence[tuple[float | None, str]], shares: Sequence[float], vocabulary: int) -> None:
        """
        Args:
            sources: (weight, folder or prefix); the weight of a single source does not matter.
            shares: of the documents for training, validation and test.

        Raises:
            UserError: a broken file.
        """
        self.weights = [1.0 if weight is None else weight for weight, _ in sources]
        self.names = [name for _, name in sources]
        self.files = [[open_tokens(prefix) for prefix in find_files(name)] for name in self.names]
        self.shares, self.vocabulary = list(shares), vocabulary

    def check_ids(self) -> None:
        """Raises `UserError` for ids beyond the vocabulary, see `TokenFile.check_ids`."""
        for file in self.all_files:
            file.check_ids(self.vocabulary)

    @property
    def all_files(self) -> list[TokenFile]:
        return [file for files in self.files for file in files]

    def documents(self, split: str) -> list[Documents]:
        """The documents of one split ("train", "dev" or "test"), for each source.

        Raises:
            UserError: there is not enough text to predict one token.
        """
        found, which = [], SPLITS.index(split)
        for name, files in zip(self.names, self.files, strict=True):
            ranges = [split_ranges(file.documents, self.shares)[which] for file in files]
            one = Documents(name, files, ranges, self.vocabulary)
            if one.tokens < 2:
                every = sum(file.documents for file in files)
                kind = ("training", "validation", "test")[which]
                split_text = ",".join(f"{share:g}" for share in self.shares)
                raise UserError(
                    f"{name}: its {every:,} documents leave no text for the {kind} part of split {split_text}; "
                    "give that part a larger share, or more documents"
                )
            found.append(one)
        return found
