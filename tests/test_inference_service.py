"""Several schedulers behind one inbox: who has a turn, what cancelling and failing do, and that ranks do the same."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from letters import VOCABULARY, Letters
from reference_engine import FunctionEngine, random_logits

from utils.errors import UserError
from utils.inference.commands import Cancel, Command, EmbedJob, Job, Stop, Submit, from_json, to_json
from utils.inference.engine import Vectors
from utils.inference.generator import Generator
from utils.inference.sampling import SamplingOptions
from utils.inference.scheduler import Scheduler
from utils.inference.service import MOST_FAILURES, News, Service
from utils.parallel.process_group import ProcessGroup
from utils.parallel.topology import Layout

GREEDY = SamplingOptions(max_new_tokens=6)
SAMPLED = SamplingOptions(max_new_tokens=20, top_k=0, min_new_tokens=20)


class Engine(FunctionEngine):
    """Fails when it is told to; embeds a prompt as its length and its sum."""

    embeds = True
    fault: BaseException | None = None

    def __init__(self, seed: int = 1) -> None:
        super().__init__(random_logits(VOCABULARY, seed), VOCABULARY)
        self.embedded: list[int] = []

    def advance(self, *arguments: Any, **more: Any) -> Any:
        if self.fault is not None:
            raise self.fault
        return super().advance(*arguments, **more)

    def _embed(self, prompts: Sequence[Sequence[int]]) -> Vectors:
        for prompt in prompts:
            if self.fault is not None:
                raise self.fault
            self.embedded.append(prompt[0])
            yield
        return np.array([[len(prompt), sum(prompt)] for prompt in prompts], dtype=np.float32)


def maker(engine: Engine, batch_size: int = 4) -> Callable[[], Scheduler]:
    return lambda: Scheduler(engine, Letters(), (0,), batch_size)


def ask(key: int, model: str = "one", options: SamplingOptions = GREEDY, prompt: Sequence[int] = (3, 4, 5)) -> Submit:
    return Submit(key, Job(model, list(prompt), options, stream=True))


def drive(service: Service) -> list[News]:
    news = []
    while service.busy:
        news += service.turn()
    return news


def texts(news: Sequence[News]) -> dict[int, str]:
    """The whole answers; the pieces join to them."""
    found: dict[int, str] = {}
    whole = {}
    for one in news:
        assert one.event is not None and one.key not in whole
        found[one.key] = found.get(one.key, "") + one.event.text
        if one.event.completion is not None:
            whole[one.key] = one.event.completion.text
    assert whole == found
    return whole


def test_each_model_answers_as_alone() -> None:
    engines = {"one": Engine(1), "two": Engine(2)}
    service = Service({name: maker(engine) for name, engine in engines.items()})
    wanted = {}
    for key in range(12):
        name, prompt = ("one", "two")[key % 2], [1 + key, 2, 3]
        service.post(ask(key, name, replace(SAMPLED, seed=key), prompt))
        alone = Generator(Engine(1 + key % 2), Letters(), (0,))
        wanted[key] = alone.generate([prompt], replace(SAMPLED, seed=key), numbers=[0])[0].text
    assert texts(drive(service)) == wanted
    assert not any(engine.texts for engine in engines.values())


def test_models_take_turns() -> None:
    service = Service({name: maker(Engine()) for name in ("one", "two", "idle")})
    service.post(ask(1, "one", SAMPLED), ask(2, "two", SAMPLED))
    order = []
    while service.busy:
        order += [{news.key for news in service.turn()}]
    assert order == [{1}, {2}] * (len(order) // 2) and service.steps == len(order)


def test_commands_from_many_threads() -> None:
    service = Service({"one": maker(Engine())})
    threads = [
        threading.Thread(target=lambda n=n: [service.post(ask(10 * n + k)) for k in range(10)]) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    found: list[News] = []
    while any(thread.is_alive() for thread in threads) or service.busy:
        found += service.turn(0.01)
    assert set(texts(found)) == set(range(80))


def test_a_cancelled_request_is_gone_at_once() -> None:
    engine = Engine()
    service = Service({"one": maker(engine, 2)})
    service.post(*(ask(key, options=replace(SAMPLED, seed=key)) for key in range(4)))
    service.turn()  # gives places
    service.turn()
    assert len(engine.texts) == 2
    service.post(Cancel(0), Cancel(3), Cancel(0), Cancel(99))  # one that runs, one that waits, again, unknown
    news = drive(service)
    alone = Service({"one": maker(Engine())})
    alone.post(*(ask(key, options=replace(SAMPLED, seed=key)) for key in range(4)))
    wanted = texts(drive(alone))
    assert {news.key for news in news} == {1, 2}
    ended = {one.key: one.event.completion.text for one in news if one.event and one.event.completion}
    assert ended == {1: wanted[1], 2: wanted[2]}
    assert not engine.texts


def test_stop_forgets_all() -> None:
    engine = Engine()
    service = Service({"one": maker(engine)})
    service.post(ask(1, options=SAMPLED), Submit(2, EmbedJob("one", [[1]])))
    service.turn()
    service.post(ask(3), Stop())
    assert service.turn() == [] and service.stopped and not service.busy and not engine.texts


# --- embeddings --------------------------------------------------------------------------------------


def test_vectors_come_between_steps() -> None:
    engine = Engine()
    service = Service({"one": maker(engine)})
    prompts = [[1] * 3, [2] * 4, [3] * 9]
    service.post(ask(1, options=SAMPLED), Submit(2, EmbedJob("one", prompts)))
    first = service.turn()
    assert [(news.key, news.opened) for news in first] == [(2, True), (1, False)] and engine.embedded == []
    for number in (1, 2):
        steps = service.steps
        assert [news.key for news in service.turn()] == [1] and engine.embedded[-1] == number
        assert service.steps == steps + 2  # a part of vectors is one, as a token is
    (vectors,) = [news.vectors for news in drive(service) if news.vectors is not None]
    assert vectors.tolist() == [[3, 3], [4, 8], [9, 27]] and engine.embedded == [1, 2, 3]


def test_vectors_that_nobody_wants_are_given_up() -> None:
    engine = Engine()
    service = Service({"one": maker(engine)})
    service.post(Submit(1, EmbedJob("one", [[1], [2], [3]])), Submit(2, EmbedJob("one", [[4]])))
    service.turn()
    service.turn()
    service.post(Cancel(1))
    (vectors,) = [news.vectors for news in drive(service) if news.vectors is not None]
    assert vectors.tolist() == [[1, 4]] and engine.embedded == [1, 4]


# --- failing ------------------------------------------------------------------------------------------


def test_a_step_that_fails_ends_its_requests_only(capsys: pytest.CaptureFixture[str]) -> None:
    broken, whole = Engine(), Engine()
    service = Service({"one": maker(broken), "two": maker(whole)}, recovers=True)
    service.post(*(ask(key, options=SAMPLED) for key in range(6)), ask(6, "two", SAMPLED))
    service.turn()
    service.turn()
    broken.fault = RuntimeError("secret /path/of/a/file")
    failed = []
    while not failed:
        failed = [news for news in service.turn() if news.error is not None]
    broken.fault = None
    assert {news.key: news.error for news in failed} == dict.fromkeys(range(6), "the model failed while it answered")
    assert "secret" in capsys.readouterr().err  # for the log
    assert not broken.texts
    service.post(ask(7))
    news = drive(service)
    assert texts([one for one in news if one.key == 7]) and {one.key for one in news} == {6, 7}
    assert not broken.texts and not whole.texts


def test_too_little_memory_is_said() -> None:
    engine = Engine()
    service = Service({"one": maker(engine)}, recovers=True)
    service.post(ask(1), Submit(2, EmbedJob("one", [[1]])))
    engine.fault = MemoryError()
    errors = {news.key: news.error for news in drive(service) if news.error}
    assert errors == dict.fromkeys((1, 2), "there was too little memory for this answer")


def test_an_engine_that_fails_again_and_again_is_given_up() -> None:
    engine = Engine()
    engine.fault = RuntimeError("dead")
    service = Service({"one": maker(engine)}, recovers=True)
    with pytest.raises(RuntimeError, match="dead"):
        for key in range(MOST_FAILURES):
            service.post(ask(key))
            drive(service)
    assert key == MOST_FAILURES - 1


def test_without_recovery_the_exception_comes_out() -> None:
    engine = Engine()
    engine.fault = RuntimeError("as it was")
    service = Service({"one": maker(engine)})
    service.post(ask(1))
    with pytest.raises(RuntimeError, match="as it was"):
        drive(service)
    service.close()
    assert not engine.texts


def test_what_a_scheduler_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service({"one": maker(Engine())}, recovers=True)
    service.post(ask(1, prompt=[]), ask(2, prompt=[99]))
    errors = {news.key: news.event.completion.error for news in drive(service) if news.event and news.event.completion}
    assert errors[1] == "the prompt is empty" and "vocabulary" in errors[2]

    def refuse(*_: Any, **__: Any) -> Any:
        raise UserError("no such form")

    monkeypatch.setattr(Scheduler, "submit", refuse)
    service.post(ask(3))
    assert [(news.key, news.error) for news in drive(service)] == [(3, "no such form")]


# --- several processes ---------------------------------------------------------------------------------


class Both(ProcessGroup):
    """Two ranks in one process; what the first makes is what the second gets."""

    def __init__(self, rank: int, made: list[Any]) -> None:
        super().__init__(replace(Layout(), world=2, tensor=2, rank=rank))
        self.made = made

    def from_first(self, make: Callable[[], Any], what: str) -> Any:
        if self.first:
            self.made.append(make())
        return self.made[-1]


def test_ranks_take_the_same_steps() -> None:
    made: list[Any] = []
    first, second = (Service({"one": maker(Engine())}, processes=Both(rank, made), recovers=True) for rank in (0, 1))
    commands: list[Command] = [ask(1, options=SAMPLED), ask(2, options=SAMPLED), Cancel(2), ask(3, options=SAMPLED)]
    for command in commands:
        first.post(command)
        ours, theirs = first.turn(), second.turn()
        assert [(one.key, one.event and one.event.tokens) for one in ours] == [
            (one.key, one.event and one.event.tokens) for one in theirs
        ]
    while first.busy:
        ours, theirs = first.turn(), second.turn()
        assert [one.event and one.event.text for one in ours] == [one.event and one.event.text for one in theirs]
    assert not second.busy
    first.post(Stop())
    assert first.turn() == second.turn() == [] and second.stopped


def test_commands_as_json_are_complete() -> None:
    """Every field that a command has now, or will have, goes through."""
    for command in (
        ask(1, options=replace(SAMPLED, seed=5, stop=("a",))),
        Cancel(3),
        Submit(4, EmbedJob("one", [[1], [2]])),
        Stop(),
    ):
        assert from_json(to_json(command)) == command
