"""Chat templates in PaddleNLP's form, chat_template.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.data.jinja import compile_jinja, render_jinja
from utils.data.lines import half_of_pair
from utils.data.marks import Marks
from utils.data.template import PADDLENLP_FILE, ChatTemplate, Message, Round, Tools
from utils.data.turns import end_turn, own_text_end
from utils.errors import UserError

if TYPE_CHECKING:
    from utils.families.tokenizers import Tokenizer


class PaddleNLPTemplate(ChatTemplate):
    """PaddleNLP's chat_template.json: `system`, `conversation` (the parts of a round) and `query`.

    A round's prompt is always the leading parts of `conversation`; `query` is used only by files
    without one. So a file whose `query` differs from its `conversation` cannot split training from use.
    """

    source = "paddlenlp"

    def __init__(self, content: Mapping[str, Any], origin: str) -> None:
        self.content = dict(content)
        self.origin = origin
        parts = content.get("conversation")
        query, system = content.get("query"), content.get("system")
        if parts is not None and not (
            isinstance(parts, list) and len(parts) > 1 and all(isinstance(part, str) for part in parts)
        ):
            raise UserError(f'{origin}: "conversation" must be a list of two or more strings')
        if parts is None and not isinstance(query, str):
            raise UserError(f'{origin}: expected "conversation" (a list of strings) or "query" (a string)')
        if not isinstance(system, str | None):
            raise UserError(f'{origin}: "system" must be a string or null')
        for key, value in content.items():
            if half_of_pair(key + json.dumps(value, ensure_ascii=False)) is not None:
                raise UserError(f"{origin}: {json.dumps(key)} holds half of a surrogate pair")
        written: list[str] = parts if parts else [str(query), "{{bot}}"]
        *asking, answering = written
        self._ask = [compile_jinja(text, origin, keep_trailing_newline=True) for text in asking]
        self._answer = compile_jinja(answering, origin, keep_trailing_newline=True)
        self._system = compile_jinja(system, origin, keep_trailing_newline=True) if system else None

    def _identity(self) -> str:
        return f"paddlenlp\0{json.dumps(self.content, ensure_ascii=False, sort_keys=True)}"

    def save(self, folder: Path) -> None:
        text = json.dumps(self.content, ensure_ascii=False, indent=2)
        (folder / PADDLENLP_FILE).write_text(text + "\n", encoding="utf-8")

    def rounds(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools | None = None
    ) -> tuple[list[Round], list[int]]:
        contents = [message["content"] for message in messages]
        marks = Marks(tokenizer, contents, special_in_text=self.special_tokens_in_text)
        roles = [message["role"] for message in messages]
        system = "\n".join(text for text, role in zip(marks.ready, roles, strict=True) if role == "system")
        before = marks.take(self._system_text(system)).encode(tokenizer)
        rounds: list[Round] = []
        prompt = list[int]()
        asked = False
        for text, content, role in zip(marks.ready, contents, roles, strict=True):
            index = len(rounds)
            if role == "user":
                for part in self._ask:
                    prompt += marks.take(self._part(part, tokenizer, text, "", index)).encode(tokenizer)
                asked = True
            elif role == "assistant":
                added = marks.take(self._part(self._answer, tokenizer, "", text, index))
                answer, rest = end_turn(tokenizer, added, own_text_end(added.text, content))
                rounds.append(Round(before + prompt, answer))
                before, prompt, asked = rest, [], False
        return rounds, before + prompt if asked else before

    def _system_text(self, content: str) -> str:
        if self._system is None:
            return content + "\n" if content else ""
        text = render_jinja(self._system, self.origin, {"system": content, "is_training": False})
        return text if content in text else content + "\n"

    def _part(self, part: Any, tokenizer: Tokenizer, user: str, bot: str, index: int) -> str:
        values = {"user": user, "query": user, "bot": bot, "index": index, "is_first": index == 0, "is_training": False}
        ends = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token}
        return render_jinja(part, self.origin, {**values, **ends})
