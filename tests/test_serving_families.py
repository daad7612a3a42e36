"""Every family through the server: each engine, with an adapter and with a prefix, whole and streamed, as one process
and as two that share the model. The texts are those that the plain model gives in this process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from family_cases import WITH_TOKENIZER, case, random_prefix
from launching import start_launched
from saved import save_prefix, write_lora
from serving_processes import ServerProcess, server
from tiny_runs import Tiny, run_main

from utils.families import FAMILIES
from utils.inference.loading import Prepared, load, prepare
from utils.inference.sampling import SamplingOptions

TOKENS = 12  # of an answer
REPETITION = 1.5  # a penalty without which some tiny models say the same to everything
QUESTIONS = ("Say red", "河 🌊?", "blue house")
TEXT = "one two"
FLOAT32 = ("--dtype", "float32")
CHUNKS = ("--prefill_chunk", "5")  # every prompt is read in parts
INFERENCE, STATIC = ("--inference_model",), ("--mode", "static")


@dataclass(frozen=True)
class Way:
    """How a model is served.

    Attributes:
        engine: options that choose it.
        adapter: "" without one, "beside" as a model of its own beside the base, "lora", "prefix".
    """

    engine: tuple[str, ...]
    adapter: str

    def __str__(self) -> str:
        words = [option.lstrip("-").split("_")[0] for option in self.engine if option != "--mode"]
        return " ".join([*(words or ["dynamic"]), self.adapter]).strip()

    @property
    def static(self) -> bool:
        return self.engine[: len(STATIC)] == STATIC


DYNAMIC_WAYS = [Way(engine, adapter) for engine in ((), INFERENCE) for adapter in ("beside", "lora", "prefix")]
STATIC_WAYS = [Way((*STATIC, *more), adapter) for more in ((), INFERENCE) for adapter in ("", "lora", "prefix")]
WAYS = [way for pair in zip(DYNAMIC_WAYS, STATIC_WAYS, strict=True) for way in pair]
# every family once, and every way
CHOSEN = {
    (WITH_TOKENIZER[number % len(WITH_TOKENIZER)], WAYS[number % len(WAYS)])
    for number in range(max(len(WITH_TOKENIZER), len(WAYS)))
}
# of two processes: every engine, and every way to have an adapter
SHARED_WAYS = [Way((), "beside"), Way(INFERENCE, "prefix"), Way((*STATIC, *INFERENCE), "lora")]


def every_way() -> Iterator[Any]:
    """All families in all ways; a few of them run more often."""
    for name in WITH_TOKENIZER:
        for way in WAYS:
            marks = [pytest.mark.matrix, *([pytest.mark.slow] if (name, way) in CHOSEN else [])]
            yield pytest.param(name, way, marks=marks, id=f"{name}-{way}")


class Model:
    """The tiny model of a family, with an adapter, a prefix and exports that are made when they are asked for."""

    def __init__(self, name: str, home: Path) -> None:
        self.checkpoint = case(name).checkpoint
        self.folder, self.home = case(name).folder, home

    @cached_property
    def lora(self) -> Path:
        return write_lora(self.home / "lora", self.checkpoint, spread=0.3)

    @cached_property
    def prefix(self) -> Path:
        save_prefix(self.home / "prefix", random_prefix(self.checkpoint), self.checkpoint)
        return self.home / "prefix"

    def adapter(self, way: Way) -> tuple[str, ...]:
        """The options that name it."""
        known: dict[str, Callable[[], tuple[str, ...]]] = {
            "": lambda: (),
            "beside": lambda: ("--lora_modules", f"adapted={self.lora}"),
            "lora": lambda: ("--lora_path", str(self.lora)),
            "prefix": lambda: ("--prefix_path", str(self.prefix)),
        }
        return known[way.adapter]()

    def options(self, way: Way, processes: int = 1) -> tuple[str, ...]:
        """The options of a server."""
        folder, adapter = (self.exported(way, processes), ()) if way.static else (self.folder, self.adapter(way))
        names = ("--model_name_or_path", str(folder), "--served_model_name", "plain")
        return (*names, *way.engine, *adapter, *FLOAT32, *CHUNKS)

    def exported(self, way: Way, processes: int) -> Path:
        """An export, by the script that makes them."""
        output = self.home / f"for {processes}" / str(way)
        words = ["--model_name_or_path", str(self.folder), "--output_path", str(output), "--device", "cpu", *FLOAT32]
        words += [*way.engine[len(STATIC) :], *self.adapter(way)]
        if processes == 1:
            with mock.patch("export_model.verify_export"):  # as the answers are compared here
                run_main("export_model", words, {}, self.home, 0)
        else:
            result = start_launched(Tiny(self.home), output, script="export_model.py", words=words).wait()
            assert result.code == 0, result.out + result.err
        return output

    @cache  # noqa: B019 - as long as the module
    def wanted(self, adapter: str) -> Wanted:
        """What the plain model answers in this process.

        Args:
            adapter: "", "lora" or "prefix".
        """
        chosen = {"lora": "lora_path", "prefix": "prefix_path"}.get(adapter)
        paths = {} if chosen is None else {chosen: str(getattr(self, adapter))}
        prepared = prepare(str(self.folder), device="cpu", dtype="float32", **paths)
        prompts = [prepared.encode([{"role": "user", "content": question}], 200)[0] for question in QUESTIONS]
        prompts.append(plain_ids(prepared))
        found = load(prepared, "cpu").generate(
            prompts, SamplingOptions(max_new_tokens=TOKENS, repetition_penalty=REPETITION)
        )
        assert not any(one.error for one in found)
        return Wanted(prompts, [one.text for one in found])


@dataclass(frozen=True)
class Wanted:
    """Prompts, those of the questions and then that of the text, and the answers to them."""

    prompts: list[list[int]]
    texts: list[str]


def plain_ids(prepared: Prepared) -> list[int]:
    """The ids of the text without a template."""
    tokenizer = prepared.tokenizer
    begin = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    return [*begin, *tokenizer.encode_text(TEXT)]


def told(running: ServerProcess, path: str, body: dict[str, Any]) -> str:
    """The text of an answer, of a stream that of all its pieces."""
    with running.open(path, body) as response:
        content = response.read().decode()
    assert response.status == 200, content
    if path == "/api/chat":
        return "".join(json.loads(line)["result"]["response"]["utterance"] for line in content.splitlines())
    key = "delta" if body["stream"] else "message"
    events = [content]
    if body["stream"]:
        *events, end = [line.removeprefix("data: ") for line in content.splitlines() if line]
        assert end == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    return "".join(one["text"] if "text" in one else one[key].get("content") or "" for one in choices)


def requests(model: str, wanted: Wanted, *, first: bool) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(path, body, text) of every form to ask in.

    Args:
        first: whether it is the model that a request without a name gets.
    """
    greedy = {"model": model, "temperature": 0, "repetition_penalty": REPETITION, "max_tokens": TOKENS}
    for stream in (False, True):
        for question, ids, text in zip(QUESTIONS, wanted.prompts, wanted.texts, strict=False):
            messages = [{"role": "user", "content": question}]
            yield "/v1/chat/completions", {**greedy, "messages": messages, "stream": stream}, text
            yield "/v1/completions", {**greedy, "prompt": ids, "stream": stream}, text
            if first:
                limits = {"src_length": len(ids), "max_length": len(ids) + TOKENS}
                body = {"context": question, "repetition_penalty": REPETITION, **limits, "stream": stream}
                yield "/api/chat", body, text
        yield "/v1/completions", {**greedy, "prompt": TEXT, "stream": stream}, wanted.texts[-1]


def check(running: ServerProcess, model: Model, way: Way) -> None:
    """Asks for everything at the same time."""
    adapter = "" if way.adapter == "beside" else way.adapter
    asked = list(requests("plain", model.wanted(adapter), first=True))
    if way.adapter == "beside":
        asked += requests("adapted", model.wanted("lora"), first=False)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: told(running, one[0], one[1]), asked))
    differ = [(*one, text) for one, text in zip(asked, found, strict=True) if text != one[2]]
    assert not differ


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Model]]:
    yield cache(lambda name: Model(name, tmp_path_factory.mktemp(name)))
    Model.wanted.cache_clear()


def test_every_family_is_here() -> None:
    assert {case(name).checkpoint.family.name for name, _ in CHOSEN} == set(FAMILIES)
    assert {way for _, way in CHOSEN} == set(WAYS)


@pytest.mark.matrix
@pytest.mark.parametrize("name", WITH_TOKENIZER)
def test_adapters_change_the_answers(models: Callable[[str], Model], name: str) -> None:
    """Else a server that leaves them out would pass."""
    texts = [models(name).wanted(adapter).texts for adapter in ("", "lora", "prefix")]
    assert texts[0] != texts[1] and texts[0] != texts[2] and texts[1] != texts[2]


@pytest.mark.parametrize(("name", "way"), every_way())
def test_the_server_answers_as_the_model(models: Callable[[str], Model], tmp_path: Path, name: str, way: Way) -> None:
    with server(tmp_path, *models(name).options(way)) as running:
        check(running, models(name), way)


@pytest.mark.matrix
@pytest.mark.parametrize("way", SHARED_WAYS, ids=str)
@pytest.mark.parametrize("name", [*WITH_TOKENIZER, "chatglm2_wide"])  # that one's two processes read the same keys
def test_two_processes_answer_as_one(models: Callable[[str], Model], tmp_path: Path, name: str, way: Way) -> None:
    launcher = ("-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", str(tmp_path / "log"))
    options = models(name).options(way, processes=2)
    with server(tmp_path, *options, launcher=launcher, environment={"OMP_NUM_THREADS": "1"}) as running:
        check(running, models(name), way)
