"""A conversation while a Jinja template writes it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from utils.data.calls import with_arguments
from utils.data.marks import Marks, Rendered

if TYPE_CHECKING:
    from utils.data.template import JinjaTemplate, Message, Tools
    from utils.families.tokenizers import Tokenizer


class Talk:
    """A conversation and a template: what it writes of the leading messages."""

    def __init__(
        self,
        template: JinjaTemplate,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Tools | None,
        own: Collection[str],
    ) -> None:
        self.tokenizer, self.messages = tokenizer, messages
        self._template = template
        names = ["role", "content", "name", "tool_call_id", *template.written_keys]
        shown = [{name: message[name] for name in names if name in message} for message in messages]  # type: ignore[literal-required]
        for message in shown:
            if "tool_calls" in message:
                message["tool_calls"] = with_arguments(message["tool_calls"], as_text=template.calls_as_text)
        shown_tools = tools if tools and "tools" in template.written_keys else None
        special = template.special_tokens_in_text
        values = [shown, shown_tools, dict(template.values)]
        self._marks = Marks(tokenizer, values, own=own, special_in_text=special)
        self._own = own

    def _write(self, messages: list[Any], *, ask: bool) -> str:
        from utils.data.jinja import render_jinja

        tokenizer = self.tokenizer
        values = {
            **self._marks.ready[2],
            "messages": messages,
            "add_generation_prompt": ask,
            "bos_token": tokenizer.bos_token or "",
            "eos_token": tokenizer.eos_token,
            "pad_token": tokenizer.token(tokenizer.pad_id) or "",
            "tools": self._marks.ready[1],
            "documents": None,
        }
        return render_jinja(self._template.compiled, self._template.origin, values)

    def render(self, count: int, *, ask: bool = False) -> Rendered:
        """The text of the first `count` messages; `ask` for the next answer."""
        return self._marks.take(self._write(self._marks.ready[0][:count], ask=ask))

    def of_user(self, text: str) -> Rendered:
        """A text of a user as it is."""
        if self._template.special_tokens_in_text:
            return Rendered(text)
        return Rendered.of_user(text, self.tokenizer, self._own)

    def end_of(self, place: int, answered: Rendered) -> int | None:
        """Where the text of the message at `place` ends in `answered`, which ends with that message."""
        *before, message = self._marks.ready[0][: place + 1]
        if not message["content"].strip():
            return None
        written = self._write([*before, {**message, "content": self._marks.ended(message["content"])}], ask=False)
        return self._marks.end(written) if self._marks.take(written) == answered else None
