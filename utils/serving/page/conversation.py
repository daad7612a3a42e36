"""What happens on the page: a question is asked, an answer streams in, a round is taken back."""

from __future__ import annotations

import asyncio
import html
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import gradio as gr
import httpx

from utils.serving.errors import ApiError
from utils.serving.page.api import Api, Piece
from utils.serving.page.texts import language_of, say

SHOW_SECONDS = 0.1  # the page is drawn anew at most this often
NOT_READY = 503
RETRY_SECONDS = 2  # between two tries while the server is not ready, at most

T = TypeVar("T")
Message = dict[str, Any]  # as the conversation component has it
Outputs = tuple[Any, ...]  # conversation, status, input box


class Sampling(NamedTuple):
    """How to answer, as the settings of the page say; in the order in which the page lists them."""

    temperature: float
    top_p: float
    top_k: float
    max_tokens: float
    repetition_penalty: float
    seed: float | None  # below 0, or nothing in its field: another one each time

    def fields(self) -> dict[str, Any]:
        """Fields of a request."""
        fields: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": int(self.top_k),
            "max_tokens": int(self.max_tokens),
            "repetition_penalty": self.repetition_penalty,
        }
        return fields if self.seed is None or self.seed < 0 else {**fields, "seed": int(self.seed)}


def said(role: str, text: str) -> Message:
    """A message; in this form the component takes its text as it is, spaces at the ends too."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def text_of(message: Message) -> str:
    return "".join(part["text"] for part in message["content"])


def before_question(history: Sequence[Message], index: int) -> tuple[list[Message], str]:
    """The question that a message at `index` is or answers, and what was said before it."""
    while index > 0 and history[index]["role"] != "user":
        index -= 1
    return list(history[:index]), text_of(history[index])


def take_back(history: Sequence[Message], draft: str) -> tuple[list[Message], str]:
    """A question that has no answer goes back into the input box, before what stands there."""
    if not history or history[-1]["role"] != "user":
        return list(history), draft
    kept, question = before_question(history, len(history) - 1)
    return kept, "\n".join(filter(None, (question, draft)))


def body_of(model: str, system: str, history: Sequence[Message], sampling: Sampling) -> dict[str, Any]:
    """The request for the next answer."""
    messages = [{"role": message["role"], "content": text_of(message)} for message in history]
    if system.strip():
        messages.insert(0, {"role": "system", "content": system})
    return {"model": model, "messages": messages, **sampling.fields()}


class Progress:
    """How far an answer has come, and the line that says so."""

    def __init__(self, language: str) -> None:
        self.language = language
        self.text = ""
        self._started = time.monotonic()
        self._first: float | None = None
        self._counted = 0.0  # when the counts came
        self._not_ready = ""
        self._finish_reason: str | None = None
        self._counts: tuple[int, int] | None = None

    def take(self, news: Piece | ApiError | None) -> None:
        """Takes in what has come; None: nothing."""
        if isinstance(news, ApiError):
            self._not_ready = str(news)
        elif news is not None:
            self._not_ready = ""
            if self._first is None and news.text:
                self._first = time.monotonic()
            self.text += news.text
            self._finish_reason = news.finish_reason or self._finish_reason
            if news.prompt_tokens is not None and news.completion_tokens is not None:
                self._counts = (news.prompt_tokens, news.completion_tokens)
                self._counted = time.monotonic()

    def line(self) -> str:
        """While the answer is under way."""
        seconds = time.monotonic() - self._started
        if self._not_ready:
            return status(say(self.language, "loading", seconds=seconds, message=self._not_ready))
        if not self.text:
            return status(say(self.language, "waiting", seconds=seconds))
        return status(self._with_speed(say(self.language, "writing", seconds=seconds)))

    def stopped_line(self) -> str:
        """Once the user has stopped it."""
        return status(self._with_speed(say(self.language, "stopped")))

    def last_line(self) -> str:
        """Once it is complete."""
        now = time.monotonic()
        if self._counts is None:
            line = say(self.language, "done_uncounted", seconds=now - self._started)
        else:
            prompt, _ = self._counts
            wait = (now if self._first is None else self._first) - self._started
            line = f"{self._speed()} · {say(self.language, 'done', first=wait, prompt=prompt)}"
        if self._finish_reason == "length":
            line += " · " + say(self.language, "cut")
        return status(line)

    def _with_speed(self, line: str) -> str:
        return f"{line} · {self._speed()}" if self._counts and self._counts[1] else line

    def _speed(self) -> str:
        """The tokens that have come, and how fast they do from the first one on."""
        assert self._counts is not None
        completion = self._counts[1]
        seconds = self._counted - self._first if self._first is not None else 0.0
        rate = (completion - 1) / seconds if completion > 1 and seconds > 0 else 0.0
        return say(self.language, "speed", completion=completion, rate=rate)


@dataclass(frozen=True)
class Running:
    """An answer under way."""

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Conversation:
    """The handlers of the page's events. Each brings what was said so far along; nothing of it is kept here."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._running: dict[str | None, Running] = {}  # by session: an open page

    def opened(self, history: list[Message], draft: str, *others: Any) -> Outputs:
        """The page has been opened, with what the browser has kept of the last time."""
        history, draft = take_back(history, draft)
        return history, "", draft, *others

    async def models(self, request: gr.Request, model: str | None) -> AsyncGenerator[Outputs, None]:
        """Which models there are, for the status and the choice; tries again until the API says so."""
        language = language_of(request.headers, request.cookies)
        while True:
            try:
                names = await self._api.models()
            except Exception as error:  # another server's answer, for one: the page tries on
                yield failure(language, error), gr.skip()
                await asyncio.sleep(RETRY_SECONDS)
            else:
                chosen = model if model in names else next(iter(names), None)
                yield "", gr.update(choices=names, value=chosen)
                return

    async def answer(
        self,
        event: gr.EventData,
        request: gr.Request,
        history: list[Message],
        draft: str,
        model: str | None,
        system: str,
        *settings: Any,
    ) -> AsyncGenerator[Outputs, None]:
        """Answers what has been written, or anew: a question that was edited, or one whose answer does not please."""
        language = language_of(request.headers, request.cookies)
        of_message = event._data or {}  # None: the input box has nothing to add
        if "index" not in of_message:
            before, question, draft = history, draft, ""
        else:
            before, question = before_question(history, of_message["index"])
            if "previous_value" in of_message:
                question = str(of_message["value"])
        question = question.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be sent back
        if not question.strip():
            yield gr.skip(), gr.skip(), gr.skip()
            return
        asked = [*before, said("user", question)]
        progress = Progress(language)
        running = self._running[request.session_hash] = Running()
        yield asked, progress.line(), gr.update(value=draft, submit_btn=False, stop_btn=True)
        try:
            models = [model] if model else await self._api.models()
            body = body_of(models[0], system, asked, Sampling(*settings))
            async for _ in every(SHOW_SECONDS, self._patiently(body), progress.take, running.stop):
                yield with_answer(asked, progress.text), progress.line(), gr.skip()
            line = progress.stopped_line() if running.stop.is_set() else progress.last_line()
        except Exception as error:  # whatever it is: the page would show a waiting answer for ever
            line = failure(language, error)
        finally:
            running.ended.set()
            self._running.pop(request.session_hash, None)
        history, returned = take_back(with_answer(asked, progress.text), "")
        ready = gr.update(submit_btn=True, stop_btn=False)
        yield history, line, {**ready, "value": returned} if returned else ready

    async def _patiently(self, body: dict[str, Any]) -> AsyncIterator[Piece | ApiError]:
        """The answer; before it, what the server says as long as it is not ready."""
        while True:
            try:
                async for piece in self._api.chat(body):
                    yield piece
                return
            except ApiError as error:
                if error.status != NOT_READY:
                    raise
                yield error
                pause = min(error.retry_after or RETRY_SECONDS, RETRY_SECONDS)
            await asyncio.sleep(pause)

    async def stop(self, request: gr.Request) -> None:
        """The user has had enough of the answer; returns once its connection is closed. What has come of it stays."""
        running = self._running.get(request.session_hash)
        if running is not None:
            running.stop.set()
            await running.ended.wait()

    def undone(self, history: list[Message]) -> Outputs:
        """The last round goes; its question stands in the input box again."""
        history, question = before_question(history, len(history) - 1) if history else ([], "")
        return history, "", gr.update(value=question, submit_btn=True, stop_btn=False)

    def cleared(self) -> Outputs:
        """A new conversation."""
        return [], "", gr.update(submit_btn=True, stop_btn=False)


def with_answer(asked: list[Message], text: str) -> list[Message]:
    return [*asked, said("assistant", text)] if text else asked


async def every(
    seconds: float, source: AsyncIterator[T], take: Callable[[T], None], stop: asyncio.Event
) -> AsyncIterator[None]:
    """Gives all that `source` has to `take` at once, and yields every so often meanwhile, also if nothing comes.

    A page that has been closed is noticed only when this yields. It ends with the source, or early by `stop`; either
    way, and when it is closed, the source is closed too.
    """
    stopping = asyncio.ensure_future(stop.wait())
    coming: asyncio.Task[T] | None = None
    shown = time.monotonic()
    try:
        while not stop.is_set():
            coming = coming or asyncio.ensure_future(_next(source))
            left = max(0.0, shown + seconds - time.monotonic())
            await asyncio.wait({coming, stopping}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                try:
                    take(coming.result())
                except StopAsyncIteration:
                    return
                coming = None
            if time.monotonic() >= shown + seconds:
                yield
                shown = time.monotonic()
    finally:
        for task in filter(None, (coming, stopping)):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _next(source: AsyncIterator[T]) -> T:
    return await anext(source)


def failure(language: str, error: Exception) -> str:
    """One line on why there is no answer."""
    if isinstance(error, ApiError):
        return status(say(language, "refused", message=str(error)), wrong=True)
    if isinstance(error, httpx.HTTPError) and not isinstance(error, httpx.RemoteProtocolError | httpx.ReadError):
        return status(say(language, "unreachable"), wrong=True)
    return status(say(language, "ended_early"), wrong=True)


def status(line: str, wrong: bool = False) -> str:
    """The status line as HTML; `line` is plain text."""
    attributes = ' class="wrong" role="alert"' if wrong else ""
    return f"<p{attributes}>{html.escape(line)}</p>"
