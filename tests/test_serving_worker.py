"""The process of the model: what it says, and what becomes of its jobs when it dies, hangs, or is cancelled."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from serving_processes import READY_SECONDS, ServerProcess, free_port, memory, processes, server, until
from tiny_models import write_tiny_llama

from utils.inference.commands import EmbedJob, Job
from utils.inference.sampling import SamplingOptions
from utils.serving import supervisor
from utils.serving.client import Answering, ModelClient
from utils.serving.errors import ApiError
from utils.serving.protocol import Update
from utils.serving.settings import ModelSettings
from utils.serving.supervisor import GOOD_WHILE, MOST_FAILURES, MOST_FAILURES_TO_START, Failures

LONG = SamplingOptions(max_new_tokens=3000, min_new_tokens=3000)
SHORT = SamplingOptions(max_new_tokens=12, min_new_tokens=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("served") / "tiny", max_position_embeddings=4096)


def settings(model: Path) -> ModelSettings:
    return ModelSettings("tiny", str(model), dtype="float32", batch_size=4)


@contextmanager
def running(client: ModelClient) -> Iterator[ModelClient]:
    client.start()
    try:
        until(lambda: client.state.name == "ready", READY_SECONDS)
        yield client
    finally:
        client.stop()


@pytest.fixture(scope="module")
def client(model: Path) -> Iterator[ModelClient]:
    """A model that is there; tests may kill its process."""
    with running(ModelClient(settings(model), max_queue=4, stall_timeout=1.0)) as client:
        yield client


@pytest.fixture(autouse=True)
def at_rest(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test has begun it has also ended."""
    yield
    if "client" in request.fixturenames:
        client: ModelClient = request.getfixturevalue("client")
        until(lambda: client.state.name == "ready", READY_SECONDS)
        assert (client.state.running, client.state.waiting) == (0, 0)


def job(options: SamplingOptions = SHORT, *, stream: bool = True, prompt: tuple[int, ...] = (5, 6, 7)) -> Job:
    return Job("tiny", list(prompt), options, stream=stream)


def all_of(answering: Answering, seconds: float = 60) -> list[Update]:
    """Every update until the ending."""
    updates: list[Update] = []
    while not updates or updates[-1].ending is None:
        update = answering.next(seconds)
        assert update is not None, f"nothing new for {seconds} s"
        updates.append(update)
    return updates


def text(updates: list[Update]) -> str:
    return "".join(update.text for update in updates)


def first(answering: Answering) -> Update:
    update = answering.next(60)
    assert update is not None and update.opened and update.ending is None
    return update


# --- answers ------------------------------------------------------------------------------------------


def test_streams_and_whole_answers_are_the_same(client: ModelClient) -> None:
    options = replace(SHORT, logprobs=True, top_logprobs=2, prompt_logprobs=True)
    stream, whole = all_of(client.submit(job(options))), all_of(client.submit(job(options, stream=False)))
    assert len(stream) > 6 and len(whole) <= 3  # that it is opened, the first token, and all the rest
    assert text(stream) == text(whole) == whole[-1].text
    for updates in (stream, whole):
        assert [update.opened for update in updates] == [True] + [False] * (len(updates) - 1)
        tokens = [token for update in updates for token in update.tokens]
        logprobs = [value for update in updates for value in update.logprobs]
        tops = [top for update in updates for top in update.top_logprobs]
        ending = updates[-1].ending
        assert ending is not None and ending.prompt_logprobs is not None
        assert len(tokens) == len(logprobs) == len(tops) == ending.completion_tokens == 12
        assert [top[0][0] for top in tops] == tokens  # greedy
        assert (ending.finish_reason, ending.prompt_tokens, len(ending.prompt_logprobs)) == ("length", 3, 2)


def test_what_the_http_side_knows(client: ModelClient) -> None:
    assert client.facts.max_positions == 4096 and client.facts.models == ("tiny",) and client.facts.vocabulary > 300
    before = client.state.steps
    all_of(client.submit(job()))
    assert client.state.steps >= before + 12


def test_vectors(client: ModelClient) -> None:
    assert client.facts.embeds

    def vectors(prompts: list[list[int]]) -> list[list[float]]:
        opened, last = all_of(client.submit(EmbedJob("tiny", prompts)))
        assert opened.opened and last.ending is not None and last.ending.prompt_tokens == sum(map(len, prompts))
        assert last.vectors is not None
        found: list[list[float]] = last.vectors.tolist()
        return found

    one, two = vectors([[5, 6, 7], [8]])
    assert len(one) == len(two) == 32 and one != two
    assert vectors([[8]]) == [two]


def test_vectors_are_work_as_answers_are(client: ModelClient) -> None:
    """They have their place in the queue, get on as steps do, and end within a portion when nobody waits for them."""
    jobs = [client.submit(EmbedJob("tiny", [[5] * 500] * 1000)) for _ in range(8)]
    with pytest.raises(ApiError) as fault:
        client.submit(EmbedJob("tiny", [[5]]))
    assert fault.value.status == 429
    first(jobs[0])
    steps = client.state.steps
    until(lambda: client.state.steps >= steps + 10, READY_SECONDS)
    assert (client.state.name, client.state.running, client.state.waiting) == ("ready", 1, 7)
    for answering in jobs:
        answering.cancel()
    assert all_of(client.submit(job()))
    steps = client.state.steps
    all_of(client.submit(job()))
    assert client.state.steps <= steps + 12 + 2  # of this answer alone


def test_a_prompt_that_cannot_be_answered(client: ModelClient) -> None:
    (update,) = all_of(client.submit(job(prompt=(5, 10**6))))
    assert update.ending is not None and "vocabulary" in str(update.ending.error)


# --- the queue ----------------------------------------------------------------------------------------


def test_a_full_queue_refuses(client: ModelClient) -> None:
    answers = client.submit_all([job(LONG) for _ in range(8)])  # four run, four wait
    with pytest.raises(ApiError) as fault:
        client.submit_all([job()])
    assert (fault.value.status, fault.value.kind) == (429, "rate_limit_error") and fault.value.retry_after
    for answering in answers[:4]:
        first(answering)
    assert (client.state.running, client.state.waiting) == (4, 4)
    answers[0].cancel()
    first(answers[4])
    answers += client.submit_all([job(SHORT)])  # one place is free again
    for answering in answers:
        answering.cancel()
        answering.cancel()


def test_all_jobs_or_none(client: ModelClient) -> None:
    with pytest.raises(ApiError):
        client.submit_all([job(LONG) for _ in range(9)])
    assert client.state.running + client.state.waiting == 0


def test_without_a_queue_only_what_can_begin_is_taken(model: Path) -> None:
    with running(ModelClient(settings(model), max_queue=0)) as client:
        answers = [client.submit(job()) for _ in range(4)]
        with pytest.raises(ApiError):
            client.submit(job())
        assert len({text(all_of(answering)) for answering in answers}) == 1
        assert all_of(client.submit(job()))


# --- cancelling ---------------------------------------------------------------------------------------


def cancel(client: ModelClient, count: int) -> None:
    """Some in the queue or while their prompt is read, others while they run."""
    for number in range(count):
        answering = client.submit(job(LONG, stream=number % 2 == 0, prompt=(5, 6, number % 300)))
        if number % 3:
            first(answering)
        answering.cancel()


def test_a_thousand_cancels_leave_nothing(client: ModelClient) -> None:
    cancel(client, 100)
    assert client.pid is not None
    before = memory(client.pid)
    cancel(client, 1000)
    assert memory(client.pid) <= 1.02 * before
    assert (client.state.running, client.state.waiting) == (0, 0)


def test_others_do_not_notice_a_cancel(client: ModelClient) -> None:
    options = replace(SHORT, max_new_tokens=400, min_new_tokens=400)
    alone = text(all_of(client.submit(job(options))))
    beside = client.submit(job(options))
    cancel(client, 40)
    assert text(all_of(beside)) == alone


# --- death --------------------------------------------------------------------------------------------


def test_a_killed_process(client: ModelClient) -> None:
    """Answers under way fail at once, those that wait are given after the restart, and the state is true."""
    whole = text(all_of(client.submit(job())))
    running_ones = client.submit_all([job(LONG) for _ in range(4)])
    for answering in running_ones:
        first(answering)
    waiting = client.submit_all([job(), job()])
    killed = client.pid
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    started = time.monotonic()
    for answering in running_ones:
        last = all_of(answering, 1)[-1]
        assert last.ending is not None and last.ending.finish_reason == "error"
        assert last.ending.error == "the process of the model has ended; send the request again"
    assert time.monotonic() - started < 1
    assert client.state.name == "restarting" and (client.state.running, client.state.waiting) == (0, 2)
    with pytest.raises(ApiError) as fault:
        client.submit(job())
    assert fault.value.status == 503 and fault.value.retry_after
    for answering in waiting:
        assert text(all_of(answering, READY_SECONDS)) == whole
    assert client.state.name == "ready" and client.pid != killed
    assert text(all_of(client.submit(job()))) == whole


def test_a_process_that_hangs_is_told_of(client: ModelClient) -> None:
    answering = client.submit(job(LONG))
    first(answering)
    assert client.state.name == "ready" and client.pid is not None
    os.kill(client.pid, signal.SIGSTOP)
    try:
        until(lambda: client.state.name == "stalled", 20)
        time.sleep(0.5)
        assert client.state.name == "stalled"
    finally:
        os.kill(client.pid, signal.SIGCONT)
    until(lambda: client.state.name == "ready", 20)
    answering.cancel()
    time.sleep(1.5)  # longer than stall_timeout
    assert client.state.name == "ready"  # without work nothing has to move


def test_weights_that_cannot_be_read_end_the_server(model: Path, tmp_path: Path) -> None:
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with server(tmp_path, "--model_name_or_path", tmp_path, wait=False) as running:
        assert running.process.wait(READY_SECONDS) == 2
        assert running.said.count("error: ") == 1 and "Traceback" not in running.said


# --- the server around it -------------------------------------------------------------------------------

CHAT = {"context": "Hello", "max_length": 3000, "stream": True}


def serving(model: Path, folder: Path, *options: object) -> AbstractContextManager[ServerProcess]:
    words = ("--model_name_or_path", model, "--max_length", 3000, "--src_length", 100, "--dtype", "float32")
    return server(folder, *words, *options)


def test_a_server_from_start_to_end(model: Path, tmp_path: Path) -> None:
    """A signal lets what runs finish, refuses what comes, and leaves nothing behind. The process of the model does not
    heed signals: Ctrl-C goes to all processes of a terminal, and a service manager's SIGTERM to all of a service.
    """
    with serving(model, tmp_path) as running:
        assert "try it: curl " in running.said
        status, found = running.json("POST", "/api/chat", {"context": "Hello", "max_length": 60})
        assert status == 200 and found["result"]["response"]["utterance"]
        before = sorted(path.name for path in tmp_path.iterdir())
        with running.open("/api/chat", {**CHAT, "max_length": 600}) as stream:
            lines = [stream.readline()]
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(running.worker(), number)
            running.process.send_signal(signal.SIGTERM)
            until(lambda: running.health() in ("stopping", ""))
            assert running.json("POST", "/api/chat", {"context": "Hello"})[0] == 503
            lines += stream.readlines()
        assert b'"error_code": 0' in lines[-1] and len(lines) > 100
        assert running.process.wait(30) == 0
        running.gone()
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        assert "Traceback" not in running.said


@pytest.mark.parametrize("how", ["time is over", "second signal"])
def test_an_end_that_does_not_wait(model: Path, tmp_path: Path, how: str) -> None:
    limit = 1 if how == "time is over" else 60
    with serving(model, tmp_path, "--shutdown_timeout", limit) as running, running.open("/api/chat", CHAT) as stream:
        stream.readline()
        started = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        if how == "time is over":
            assert b"the server is stopping" in stream.readlines()[-1]
            assert running.process.wait(30) == 0 and time.monotonic() - started >= 1
        else:
            until(lambda: running.health() == "stopping" and time.monotonic() - started > 1.5)
            assert running.end(signal.SIGINT, 10) == 128 + signal.SIGINT


def test_a_signal_while_the_model_is_loaded(model: Path, tmp_path: Path) -> None:
    with server(tmp_path, "--model_name_or_path", model, wait=False) as running:
        until(lambda: running.health() == "loading", READY_SECONDS)
        assert running.end(signal.SIGTERM, 20) == 0


def test_killed_processes(model: Path, tmp_path: Path) -> None:
    """Clients hear at once that the process of the model has gone; that of the server leaves none behind."""
    with serving(model, tmp_path, "--max_batch_size", 4) as running, ThreadPoolExecutor(3) as pool:
        streams = [running.open("/api/chat", CHAT) for _ in range(2)]
        for stream in streams:
            stream.readline()
        whole = {"messages": [{"role": "user", "content": "Hello"}], "min_tokens": 2000, "max_tokens": 2000}
        asked = [("/api/chat", {**CHAT, "stream": False}), ("/v1/chat/completions", whole)]
        asked.append(("/v1/embeddings", {"input": [[5] * 2500] * 256}))
        plain = [pool.submit(running.open, *one) for one in asked]
        until(lambda: running.answering() == 5)
        killed = running.worker()
        os.kill(killed, signal.SIGKILL)
        started = time.monotonic()
        until(lambda: running.health() == "restarting", 1)
        for stream in streams:
            assert b"the process of the model has ended" in stream.readlines()[-1]
        for response in [one.result(1) for one in plain]:
            assert response.status == 503 and response.headers["Retry-After"] == "5"
            error = json.loads(response.read())
            assert "the process of the model has ended" in error.get("error_msg", "") + str(error.get("error", ""))
        assert time.monotonic() - started < 1
        running.ready()
        assert running.json("POST", "/api/chat", {"context": "Hello", "max_length": 60})[0] == 200
        assert running.worker() != killed
        with running.open("/api/chat", CHAT) as stream:
            stream.readline()
            assert len(processes(running.mark)) == 2
            running.process.kill()
            running.process.wait()


def test_a_model_that_cannot_be_kept_alive(model: Path, tmp_path: Path) -> None:
    with server(tmp_path, "--model_name_or_path", model, wait=False) as running:
        killed: set[int] = set()

        def kill_the_next() -> bool:
            found = set(running.workers()) - killed
            for number in found:
                os.kill(number, signal.SIGKILL)
            killed.update(found)
            return running.process.poll() is not None

        until(kill_the_next, READY_SECONDS)
        assert running.process.wait() == 1 and len(killed) == MOST_FAILURES_TO_START
        assert running.said.count("starting it again in") == MOST_FAILURES_TO_START - 1
        assert "was killed, perhaps because memory was short, 3 times in a row; the server ends" in running.said
        assert "Traceback" not in running.said


def test_pauses_grow_and_failures_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now)
    failures = Failures()
    pauses = []
    for _ in range(MOST_FAILURES):
        failures.ready()
        now += 10
        assert not failures.enough
        failures.add(-signal.SIGKILL)
        pauses.append(failures.pause)
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30] and failures.enough
    failures.ready()
    now += GOOD_WHILE + 1
    failures.add(1)
    assert (failures.count, failures.pause, failures.how) == (1, 0.5, "ended with exit code 1")
    assert not failures.enough


@pytest.mark.slow
def test_the_page_is_kept_alive_and_ends_with_the_server(model: Path, tmp_path: Path) -> None:
    port = free_port()
    with serving(model, tmp_path, "--port", port, "--title", "A test") as running:

        def page() -> list[int]:
            return [n for n, line in processes(running.mark).items() if "utils.serving.page" in line]

        def answers() -> bool:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as response:
                    return b"A test" in response.read()
            except OSError:
                return False

        assert f"page: http://127.0.0.1:{port} " in running.said
        until(answers, READY_SECONDS)
        (first_page,) = page()
        os.kill(first_page, signal.SIGKILL)
        until(lambda: page() not in ([], [first_page]) and answers(), READY_SECONDS)
        running.process.kill()
        running.process.wait()
