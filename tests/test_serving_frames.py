"""The line between the HTTP side and the process of the model: everything arrives as it was sent."""

from __future__ import annotations

import json
import socket
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.inference.commands import Cancel, Command, EmbedJob, Job, Stop, Submit, from_json, to_json
from utils.inference.grammar import KINDS, Grammar
from utils.inference.sampling import SamplingOptions
from utils.serving.frames import Link, LinkError, pack, unpack
from utils.serving.protocol import Ending, Update

ids = st.integers(0, 2**31)
keys = st.integers(0, 2**62)
numbers = st.floats(allow_nan=False)
# also halves of surrogate pairs, which JSON from a client may hold
texts = st.text(st.characters(exclude_categories=()), max_size=8)
ranks = st.lists(st.lists(st.tuples(ids, numbers), max_size=3).map(tuple), max_size=3).map(tuple)
options = st.builds(
    SamplingOptions,
    max_new_tokens=st.integers(1, 10**6),
    temperature=st.floats(0, 10),
    top_k=st.integers(0, 10**6),
    seed=st.none() | st.integers(0, 2**64 - 1),
    logit_bias=st.lists(st.tuples(ids, st.floats(-100, 100)), max_size=3, unique_by=lambda pair: pair[0]).map(tuple),
    stop=st.lists(texts.filter(bool), max_size=3).map(tuple),
    stop_ids=st.lists(ids, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    grammar=st.none() | st.builds(Grammar, st.sampled_from(KINDS), texts),
    logprobs=st.just(True),
    top_logprobs=st.integers(0, 20),
)
prompts = st.lists(ids, max_size=5)
answers = st.builds(Job, texts, prompts, options, st.integers(0, 100), st.booleans())
vectors = st.builds(EmbedJob, texts, st.lists(prompts, max_size=3))
commands = st.builds(Submit, keys, answers | vectors) | st.builds(Cancel, keys) | st.just(Stop())
endings = st.builds(
    Ending,
    finish_reason=st.sampled_from(["stop", "length", "error"]),
    prompt_tokens=ids,
    completion_tokens=ids,
    cached_tokens=ids,
    error=st.none() | texts,
    retry_after=st.none() | st.integers(0, 600),
    prompt_logprobs=st.none() | st.lists(numbers, max_size=3).map(tuple),
    prompt_top_logprobs=st.none() | ranks,
)
updates = st.builds(
    Update,
    opened=st.booleans(),
    text=texts,
    tokens=st.lists(ids, max_size=3).map(tuple),
    logprobs=st.lists(numbers, max_size=3).map(tuple),
    top_logprobs=ranks,
    ending=st.none() | endings,
)


@given(commands)
def test_commands_arrive_as_they_were_sent(command: Command) -> None:
    assert from_json(json.loads(json.dumps(to_json(command)))) == command


@given(updates)
def test_updates_arrive_as_they_were_sent(update: Update) -> None:
    assert unpack(json.loads(json.dumps(pack(update)))) == update


def test_a_new_token_takes_few_bytes() -> None:
    assert json.dumps(pack(Update(text=" the", tokens=(345,)))) == '[[345], " the"]'


def test_vectors_arrive_as_they_were_sent() -> None:
    vectors = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    found = unpack(json.loads(json.dumps(pack(Update(ending=Ending("stop", 7, 0), vectors=vectors)))))
    assert found.ending == Ending("stop", 7, 0) and found.vectors is not None
    assert found.vectors.tolist() == vectors.tolist()


@pytest.fixture
def ends() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def test_values_of_any_size_in_order(ends: tuple[socket.socket, socket.socket]) -> None:
    one, other = map(Link, ends)
    values = [[], {"a": "\ud800é漢"}, list(range(300_000)), "x" * 3_000_000, None, 0.1]
    sender = threading.Thread(target=lambda: [one.send(value) for value in (*values[:4], *values[5:])])
    sender.start()
    assert [other.receive() for _ in range(5)] == [*values[:4], *values[5:]]
    sender.join()
    one.close()
    assert other.receive() is None
    other.close()


def test_many_threads_send(ends: tuple[socket.socket, socket.socket]) -> None:
    one, other = map(Link, ends)
    threads = [threading.Thread(target=lambda n=n: [one.send([n] * 5000) for _ in range(20)]) for n in range(8)]
    for thread in threads:
        thread.start()
    found = [other.receive() for _ in range(160)]
    assert sorted(found) == sorted([n] * 5000 for n in range(8) for _ in range(20))
    for thread in threads:
        thread.join()
    one.close()
    other.close()


def test_a_partner_that_reads_nothing_blocks_nobody_for_ever(ends: tuple[socket.socket, socket.socket]) -> None:
    one, other = Link(ends[0], patience=0.2), ends[1]
    started = time.monotonic()
    with pytest.raises(LinkError, match="does not listen"):
        one.send("x" * 50_000_000)
    assert time.monotonic() - started < 20
    assert one.receive() is None  # it is not used again
    with pytest.raises(LinkError):
        one.send(1)
    one.close()
    other.close()


@pytest.mark.parametrize("cut", [b"", b"\0\0", b"\0\0\0\x05[1,2"])
def test_a_partner_that_dies_in_a_value(ends: tuple[socket.socket, socket.socket], cut: bytes) -> None:
    one, other = Link(ends[0]), ends[1]
    other.sendall(cut)
    other.close()
    assert one.receive() is None
    with pytest.raises(LinkError):
        one.send("x" * 10_000_000)
    one.close()


@pytest.mark.parametrize("wrong", [b"\0\0\0\x02]]", b"GET / HTTP/1.1\r\n"])
def test_what_is_no_value(ends: tuple[socket.socket, socket.socket], wrong: bytes) -> None:
    one, other = Link(ends[0]), ends[1]
    other.sendall(wrong)
    with pytest.raises(LinkError):
        one.receive()
    one.close()
    other.close()
