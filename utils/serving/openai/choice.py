"""One answer of a chat on its way to the client: reasoning, text and calls of functions, as they become certain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.families.tokenizers import Tokenizer
from utils.inference.sampling import Alternatives
from utils.serving.openai.calling import Calling, joined
from utils.serving.openai.logprobs import chat_entries, scored
from utils.serving.openai.thoughts import Thoughts
from utils.serving.protocol import Update
from utils.serving.tools import CallReader, Visible


@dataclass(frozen=True)
class Plan:
    """What is known of a chat before its answers come.

    Attributes:
        end_ids: tokens that end an answer, which are no part of it.
        stop: texts that end it.
        logprobs: whether they are told.
        thinks: whether an answer may begin with a reasoning.
        opened_tag: the tag that the prompt has opened for it.
        calling: the functions that it may call.
        stream: whether it is told piece by piece; else a call that turns out to be broken can still be text.
    """

    tokenizer: Tokenizer
    end_ids: frozenset[int]
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    thinks: bool = False
    opened_tag: str | None = None
    calling: Calling | None = None
    stream: bool = False


class Choice:
    """One answer. It takes updates; what is certain of them are deltas of a message."""

    def __init__(self, plan: Plan) -> None:
        self._plan, calling = plan, plan.calling
        self._thoughts = Thoughts(plan.opened_tag) if plan.thinks else None
        self._calls: CallReader | None = None
        self._visible: Visible | None = None
        if calling is not None:
            self._calls = CallReader(calling.form, calling.tools, parallel=calling.parallel, patient=not plan.stream)
            if calling.form.special:  # marks of calls that decoded texts do not show
                self._visible = Visible(calling.form, plan.tokenizer, plan.stop, plan.end_ids)
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._tops: list[Alternatives] = []

    def push(self, update: Update) -> dict[str, Any]:
        """What an update adds to the message; nothing if nothing is certain yet."""
        self._note(update.tokens, update.logprobs, update.top_logprobs)
        last = update.ending is not None
        text = update.text if self._visible is None else self._visible.push(update.tokens, last=last)
        delta: dict[str, Any] = {"content": text}
        if self._thoughts is not None:
            said = self._thoughts.push(text, last=last)
            delta = {"reasoning_content": said.reasoning, "content": said.content}
        if self._calls is not None:
            found = self._calls.push(delta["content"], last=last)
            delta |= {"content": found.content, "tool_calls": joined(found.calls)}
        return {name: part for name, part in delta.items() if part}

    def logprobs(self) -> dict[str, Any] | None:
        """Those of the tokens since the last call."""
        if not self._plan.logprobs:
            return None
        content = chat_entries(self._plan.tokenizer, self._tokens, self._logprobs, self._tops)
        self._tokens, self._logprobs, self._tops = [], [], []
        return {"content": content, "refusal": None}

    def finish_reason(self, reason: str) -> str:
        """How it ended, in the words of this API."""
        return "tool_calls" if reason == "stop" and self._calls is not None and self._calls.called else reason

    def _note(self, tokens: Sequence[int], logprobs: Sequence[float], tops: Sequence[Alternatives]) -> None:
        """Remembers new tokens until `logprobs` tells of them."""
        for token, logprob, top in scored(tokens, logprobs, tops) if self._plan.logprobs else ():
            if token not in self._plan.end_ids:
                self._tokens.append(token)
                self._logprobs.append(logprob)
                self._tops.append(top)
