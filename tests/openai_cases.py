"""The official client and what its answers say, for tests of OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import openai
from serving_processes import Asked

SECONDS = 300.0
CUT = "\ufffd"  # stands for a character that the last token has begun
HELLO = "one two three"
TEXTS = ["我喜欢喝茶，你好！", "🙂👩‍👩‍👧 e\u0301 ñ", "日本語テキスト", "emoji 🏳️‍🌈 flags 🇫🇷", "नमस्ते दुनिया", "a\tb\nc"]
ENDLESS = {"ignore_eos": True}


@dataclass(frozen=True)
class Client:
    """The official client of one served model. Answers are greedy and short, unless the fields say something else."""

    server: Asked
    model: str
    key: str = "none"

    @property
    def official(self) -> openai.OpenAI:
        """It asks once."""
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=self.key, max_retries=0, timeout=SECONDS)

    def chat(self, messages: Any, **fields: Any) -> Any:
        """A text is what the user says."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        chosen = {"model": self.model, "temperature": 0, "max_tokens": 16, **fields}
        return self.official.chat.completions.create(messages=messages, **chosen)

    def complete(self, prompt: Any, **fields: Any) -> Any:
        """Goes on with a prompt."""
        chosen = {"model": self.model, "temperature": 0, "max_tokens": 8, **fields}
        return self.official.completions.create(prompt=prompt, **chosen)

    def ids(self, text: str, **fields: Any) -> list[int]:
        """The tokens of a text."""
        status, found = self.server.json(
            "POST", "/tokenize", {"content": text, **fields}, Authorization=f"Bearer {self.key}"
        )
        assert status == 200, found
        return list(found["tokens"])

    def fault(self, call: Callable[..., Any], *args: Any, **fields: Any) -> openai.APIStatusError:
        """The error with which a request is refused."""
        try:
            call(*args, **fields)
        except openai.APIStatusError as error:
            return error
        raise AssertionError("the request was answered")


def said(answer: Any, index: int = 0) -> str:
    """The text of a plain answer."""
    choice = answer.choices[index]
    return str(choice.message.content if hasattr(choice, "message") else choice.text)


def streamed(chunks: Any, index: int = 0) -> str:
    """The text of a stream."""
    found = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join((choice.delta.content or "") if hasattr(choice, "delta") else choice.text for choice in found)
