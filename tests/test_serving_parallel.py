"""A server whose model and adapter two processes share, against one process; what becomes of all when one has died."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from saved import write_lora
from serving_processes import ServerProcess, processes, server, until
from tiny_models import write_tiny_llama

from utils.checkpoints.locate import locate

pytestmark = pytest.mark.slow

OPTIONS = ("--max_length", 600, "--src_length", 100, "--dtype", "float32", "--max_batch_size", 4)
CHAT = {"context": "Hello", "max_length": 600, "stream": True}
# greedy, sampled with a seed that all processes have to know, and more than there are places
ASKED: list[dict[str, Any]] = [
    *({"context": f"Say {number}", "max_length": 90 + number} for number in range(6)),
    {"context": "Draw", "top_k": 0, "temperature": 1.5, "max_length": 200},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = write_tiny_llama(tmp_path_factory.mktemp("shared") / "tiny", max_position_embeddings=4096)
    write_lora(model.parent / "adapter", locate(model), spread=0.3)
    return model


def named(model: Path) -> tuple[object, ...]:
    """Options that name the model and its adapter."""
    adapter = f"adapted={model.parent / 'adapter'}"
    return ("--model_name_or_path", model, "--served_model_name", "plain", "--lora_modules", adapter, *OPTIONS)


def launched(folder: Path, model: Path) -> Any:
    launcher = ("-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", str(folder / "log"))
    return server(folder, *named(model), launcher=launcher, environment={"OMP_NUM_THREADS": "1"})


def answers(running: ServerProcess) -> list[str]:
    """Of the model, of its adapter, and then to all that is asked, at the same time."""
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        status, said = running.json("POST", "/api/chat", ASKED[number])
        assert status == 200, said
        found[number] = said["result"]["response"]["utterance"]

    def ask_of(number: int, name: str) -> None:
        body = {"model": name, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 90}
        status, said = running.json("POST", "/v1/chat/completions", body)
        assert status == 200, said
        found[number] = said["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(ASKED))]
    threads += [threading.Thread(target=ask_of, args=pair) for pair in ((-2, "plain"), (-1, "adapted"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[number] for number in range(-2, len(ASKED))]


def rank_of(running: ServerProcess, rank: int) -> int:
    """The number of the process of a rank that the launcher has started."""
    numbers = processes(f"PADDLE_TRAINER_ID={rank}")
    (found,) = [n for n, line in processes(running.mark).items() if n in numbers and "worker" not in line]
    return found


def test_two_processes_answer_as_one(model: Path, tmp_path: Path) -> None:
    with server(tmp_path, *named(model)) as alone:
        wanted = answers(alone)
        assert wanted[0] != wanted[1]
    with launched(tmp_path, model) as running:
        found = answers(running)
        assert found[:-1] == wanted[:-1] and found[-1]
        with running.open("/api/chat", CHAT) as stream:  # a client that goes
            stream.readline()
        time.sleep(7)  # longer than the pause of processes that have nothing to do
        assert answers(running)[:-1] == wanted[:-1]
        with running.open("/api/chat", {**CHAT, "max_length": 200}) as stream:
            stream.readline()
            running.process.send_signal(signal.SIGTERM)  # to the launcher, which tells all, several times
            assert b'"error_code": 0' in stream.readlines()[-1]
        running.process.wait(40)
        assert "Traceback" not in running.said + (tmp_path / "log" / "workerlog.1").read_text()


@pytest.mark.parametrize("victim", ["rank 1", "model of rank 0"])
def test_a_rank_that_dies_ends_all(model: Path, tmp_path: Path, victim: str) -> None:
    with launched(tmp_path, model) as running, running.open("/api/chat", CHAT) as stream:
        stream.readline()
        os.kill(rank_of(running, 1) if victim == "rank 1" else running.worker(), signal.SIGKILL)
        last = stream.readlines()[-1:]
        assert not last or b"has ended" in last[0]
        assert running.process.wait(60) != 0
        said = running.said
        assert "rank" in said or "the process of the model" in said
        assert "Traceback" not in said


def test_idle_ranks_end_too(model: Path, tmp_path: Path) -> None:
    with launched(tmp_path, model) as running:
        os.kill(rank_of(running, 1), signal.SIGKILL)
        assert running.process.wait(60) != 0
        until(lambda: "Container failed" in running.said)
