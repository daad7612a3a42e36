"""The cached engine's memory, on the host and on the device, and calls that fail half-way."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import paddle
import pytest
from engine_walk import TOLERANCE, Walk
from family_cases import cached, case, hidden_logits, random_prefix

from utils.inference.cached import CachedEngine
from utils.model.cache import Cache, DeviceCache, HostCache

CASE = case("mistral")  # has a window and grouped heads
LAYERS, HEADS, WIDTH = 2, 3, 4
CACHES: list[type[Cache]] = [HostCache, DeviceCache]


def test_who_keeps_the_tensors_of_a_step_does_not_keep_their_memory() -> None:
    """A static program holds what its last step read."""
    cache = HostCache(1, 2, 4, "float32")
    cache.reserve(1, 10)
    read = cache.tensors(1)
    memory = weakref.ref(cache._memory[0])
    cache.clear()
    gc.collect()
    assert memory() is None and not read


def write(cache: Cache, new: np.ndarray, starts: list[int], first: int = 0) -> None:
    """As a program does: new keys and values [2 * layers, rows, heads, length, width] of rows from `first` on."""
    for tensor, rows in zip(cache.tensors(new.shape[1], first), new, strict=True):
        for row, (values, start) in enumerate(zip(rows, starts, strict=True)):
            places = slice(start, start + new.shape[3])
            if cache.heads_first:
                tensor[row, :, places] = paddle.to_tensor(values)
            else:
                tensor[row, places] = paddle.to_tensor(values.swapaxes(0, 1))


def contents(cache: Cache, rows: int) -> np.ndarray:
    """[2 * layers, rows, heads, capacity, width]."""
    held = np.stack([tensor.numpy() for tensor in cache.tensors(rows)])
    return held if cache.heads_first else held.swapaxes(2, 3)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("heads_first", [True, False])
def test_what_is_written_stays_whatever_grows_around_it(kind: type[Cache], heads_first: bool) -> None:
    random = np.random.default_rng(0)
    cache = kind(LAYERS, HEADS, WIDTH, "float32", heads_first=heads_first)
    held: dict[int, np.ndarray] = {}  # [2 * layers, heads, places, width] of each row
    for _ in range(60):
        rows = int(random.integers(1, 6))
        first = int(random.integers(0, 6 - rows + 1))
        counts = random.integers(1, 2 if random.integers(2) else 70, rows).tolist()
        starts = [held[first + n].shape[2] if first + n in held else 0 for n in range(rows)]
        cache.reserve(first + rows, max(starts) + max(counts))
        new = random.normal(size=(2 * LAYERS, rows, HEADS, max(counts), WIDTH)).astype(np.float32)
        write(cache, new, starts, first)
        for n, count in enumerate(counts):
            before = held.get(first + n, new[:, n, :, :0])
            held[first + n] = np.concatenate([before, new[:, n, :, :count]], axis=2)
        source, target = (int(row) for row in random.choice(sorted(held), 2))
        cache.copy_row(source, target)
        held[target] = held[source]
        for number, values in held.items():
            found = contents(cache, number + 1)[:, number, :, : values.shape[2]]
            assert np.array_equal(found, values)
    assert cache.rows == 6 and cache.capacity % 32 == 0
    cache.clear()
    assert (cache.rows, cache.capacity) == (0, 0)
    cache.reserve(2, 3)
    assert contents(cache, 1).shape == (2 * LAYERS, 1, HEADS, 32, WIDTH) and not contents(cache, 2).any()
    begin = random.normal(size=(2 * LAYERS, HEADS, 3, WIDTH)).astype(np.float32)
    cache.put(1, 0, [begin])
    assert np.array_equal(contents(cache, 2)[:, 1, :, :3], begin) and not contents(cache, 1).any()


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_that_cannot_grow_keeps_its_size(kind: type[Cache]) -> None:
    cache = kind(LAYERS, HEADS, WIDTH, "float32")
    cache.reserve(2, 10)
    new = np.random.default_rng(1).normal(size=(2 * LAYERS, 2, HEADS, 10, WIDTH)).astype(np.float32)
    write(cache, new, [0, 0])
    name = "numpy.zeros" if kind is HostCache else "paddle.zeros"
    real, calls = (np.zeros if kind is HostCache else paddle.zeros), iter([True, False])

    def zeros(*arguments: Any, **options: Any) -> Any:
        if next(calls, True):
            return real(*arguments, **options)
        raise MemoryError

    with mock.patch(name, zeros), pytest.raises(MemoryError):  # the first layer has grown by then
        cache.reserve(3, 500)
    assert (cache.rows, cache.capacity) == (2, 32)
    assert np.array_equal(contents(cache, 2)[:, :, :, :10], new)


@pytest.mark.parametrize("kind", CACHES)
def test_rows_that_are_free_go_when_asked(kind: type[Cache]) -> None:
    cache = kind(LAYERS, HEADS, WIDTH, "float32")
    cache.reserve(3, 10)
    new = np.random.default_rng(1).normal(size=(2 * LAYERS, 3, HEADS, 10, WIDTH)).astype(np.float32)
    write(cache, new, [0] * 3)
    cache.reserve(2, 40)
    assert (cache.rows, cache.capacity) == (3, 64)
    cache.reserve(2, 70, only=True)
    assert (cache.rows, cache.capacity) == (2, 96)
    assert np.array_equal(contents(cache, 2)[:, :, :, :10], new[:, :2])


def test_an_answer_that_outgrows_the_cache_leaves_only_rows_in_use() -> None:
    """A head that prompts shared is free once they are read; its row would be computed and masked to the end."""
    engine = cached(CASE)
    slots, _ = engine.open([[5, 6, 7], [8, 9], [5, 6]])
    engine.free(slots[:1])
    assert engine.cache.rows == 3
    with mock.patch("utils.runtime.give_back_freed_memory") as tidied:
        for _ in range(31):
            engine.advance(slots[1:], [[5], [6]])
        assert (engine.cache.rows, engine.cache.capacity) == (2, 64)
    assert tidied.call_count == 1


def test_copies_of_a_slot_make_room_once() -> None:
    """For each copy anew, all rows would be copied as often as there are copies."""
    engine = cached(CASE)
    (slot, other), _ = engine.open([[5, 6, 7], [8, 9]])
    with mock.patch.object(engine.cache, "_resize", wraps=engine.cache._resize) as resized:
        copies = engine.fork(slot, 4)
    assert resized.call_count == 1 and engine.cache.rows == 6
    logits = engine.advance([*copies, slot, other], [[4]] * 6).numpy()
    assert np.abs(logits[:4] - logits[4]).max() < 1e-5 < np.abs(logits[5] - logits[4]).max()


@pytest.fixture(params=[False, True], ids=["copies", "views"])
def views(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both of what Paddle makes of slices and transposes: copies, as on CPUs here, or views, as on GPUs."""
    flag = "FLAGS_use_stride_kernel"
    before = paddle.get_flags([flag])
    paddle.set_flags({flag: request.param})
    yield
    paddle.set_flags(before)


def on_device(engine: CachedEngine) -> CachedEngine:
    """The same with the cache that other devices have."""
    shape = CASE.checkpoint.family.shape(CASE.checkpoint.config)
    engine.cache = DeviceCache(shape.layers, shape.kv_heads, shape.head_dim, "float32")
    return engine


@pytest.mark.usefixtures("views")
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("with_prefix", [False, True])
def test_slots_are_independent_in_a_cache_on_the_device(static: bool, with_prefix: bool) -> None:
    prefix = random_prefix(CASE.checkpoint) if with_prefix else None
    engine = on_device(cached(CASE, prefix, static=static, inference_model=True))
    Walk(CASE, engine, 7, prefix=prefix).run(40)


@pytest.mark.usefixtures("views")
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("call", ["program", "tensors", "copy_row", "reserve"])
@pytest.mark.parametrize("done", [False, True])
def test_an_interrupted_call_changes_nothing(kind: type[Cache], call: str, done: bool) -> None:
    """Ctrl-C before or after anything that takes time, at every place where it is called."""
    engine = cached(CASE, inference_model=True)
    if kind is DeviceCache:
        on_device(engine)
    owner, name = (engine, "_program") if call == "program" else (engine.cache, call)
    texts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    slots, _ = engine.open(texts)
    interrupted = 0
    for place in range(4):
        attempts = (
            lambda: engine.advance([slots[2], slots[1]], [[4], [5, 6]]),  # rows change places
            lambda: in_pieces(engine, [slots[1], slots[2]], [[5, 6], [4]]),
            lambda: engine.open([[1] * 30, [2] * 5, [3] * 90]),  # read one after another; the cache grows
        )
        for attempt in attempts:
            real, count = getattr(owner, name), iter(range(100))

            def broken(*given: Any, real: Any = real, count: Any = count, place: int = place, **more: Any) -> Any:
                if next(count) != place:
                    return real(*given, **more)
                if done:
                    real(*given, **more)
                raise KeyboardInterrupt

            before = set(engine_slots(engine))
            try:
                with mock.patch.object(owner, name, broken):
                    attempt()
            except KeyboardInterrupt:
                interrupted += 1
            else:  # it did not come to that call
                added = set(engine_slots(engine)) - before
                engine.free(sorted(added))
                if not added:
                    engine.rewind(slots[1], 2)
                    engine.rewind(slots[2], 1)
            assert set(engine_slots(engine)) == before
            found = engine.advance(slots, [[20]] * 3).numpy()
            for slot, text, logits in zip(slots, texts, found, strict=True):
                wanted = hidden_logits(CASE.checkpoint.family, CASE.model, np.array([[*text, 20]]))[0, -1]
                assert np.abs(logits - wanted).max() < TOLERANCE
                engine.rewind(slot, 1)
    assert interrupted >= 2


def in_pieces(engine: CachedEngine, slots: list[int], tokens: list[list[int]]) -> None:
    with mock.patch("utils.inference.cached.CHUNK", 1):
        engine.advance(slots, tokens, last=True)


def engine_slots(engine: CachedEngine) -> list[int]:
    return [row.slot for row in engine._rows]


def test_slots_of_an_interrupted_open_are_used_again() -> None:
    engine = cached(CASE, inference_model=True)
    engine.open([[5, 6]])
    with mock.patch.object(engine, "_program", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        engine.open([[1, 2, 3], [4]])
    assert engine.open([[1]])[0] == [1]
