"""Chat templates: the one path from a conversation to token ids.

Training, evaluation, the predictor and everything that serves a model call `ChatTemplate`, so the ids
that a model is trained on and the ids that it is asked with are the same. Each conversation is cut
into prompt and answer segments, and every segment is tokenized by itself: the ids of a prompt do not
depend on what follows it.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

from utils.errors import UserError

if TYPE_CHECKING:
    from utils.families.tokenizers import Tokenizer

JINJA_FILE = "chat_template.jinja"
PADDLENLP_FILE = "chat_template.json"
SETTINGS_FILE = "tokenizer_config.json"


class Message(TypedDict):
    """One turn; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


class Round(NamedTuple):
    """The ids of one answer and of everything between it and the answer before.

    Attributes:
        prompt: what the model is asked with; for a later round it begins with what follows the end of
            the answer before.
        answer: what it has to say, its end-of-turn token included.
    """

    prompt: list[int]
    answer: list[int]


class ChatTemplate(ABC):
    """How a conversation becomes text and ids. Get one from `ChatTemplate.load`."""

    source: Literal["jinja", "plain", "paddlenlp"]

    @classmethod
    def load(cls, folder: Path | None, *, default: str | None, override: Path | None = None) -> ChatTemplate:
        """The template of a checkpoint.

        Looked for in this order: `override`, chat_template.jinja, `chat_template` in
        tokenizer_config.json, chat_template.json (PaddleNLP) in `folder`, the family's `default`; if
        none exists, prompt and answer are joined as they are (right for base models).

        Args:
            folder: the checkpoint, or None.
            default: Jinja text of the model's family, or None.
            override: a .jinja or .json file of the user's.

        Raises:
            UserError: a template that cannot be read.
        """
        if override is not None:
            return _read_template(Path(override))
        if folder is not None:
            folder = Path(folder)
            if (folder / JINJA_FILE).is_file():
                return _read_template(folder / JINJA_FILE)
            text = _template_in_settings(folder / SETTINGS_FILE)
            if text is not None:
                return JinjaTemplate(text, str(folder / SETTINGS_FILE))
            if (folder / PADDLENLP_FILE).is_file():
                return _read_template(folder / PADDLENLP_FILE)
        return PlainTemplate() if default is None else JinjaTemplate(default, "the family's chat template")

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 (hexadecimal) of all that decides the ids, the tokenizer aside."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the template into a checkpoint folder, so that `load` finds this very one."""

    @abstractmethod
    def rounds(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[Round], list[int]]:
        """The ids of a conversation.

        Returns:
            One `Round` for each assistant message (only for the last one if the template writes history
            in another way than the turn at hand, as ChatGLM's does); and the ids of what follows the last answer, up to
            where the next answer would begin (for messages that end with an answer, only what the
            template writes after it).

        Raises:
            UserError: the template refuses the conversation.
        """

    def encode_prompt(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """The ids that a model is asked with; `messages` ends with a turn of the user."""
        if not messages or messages[-1]["role"] == "assistant":
            raise ValueError("a prompt must end with a turn of the user")
        rounds, rest = self.rounds(tokenizer, messages)
        return [i for one in rounds for part in one for i in part] + rest

    def encode_conversation(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The ids of a conversation that ends with an answer, and which of them are supervised.

        Supervised are the assistant's texts of `rounds` and the token that ends each of them. What a template
        writes after the last one is left out.
        """
        ids: list[int] = []
        supervised: list[bool] = []
        for one in self.rounds(tokenizer, messages)[0]:
            ids += one.prompt + one.answer
            supervised += [False] * len(one.prompt) + [True] * len(one.answer)
        return ids, supervised

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Every id that ends an answer: the tokenizer's, and the one that this template writes."""
        example: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        end = self.rounds(tokenizer, example)[0][0].answer[-1]
        return tuple(dict.fromkeys([*tokenizer.eos_ids, end]))


def end_turn(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[int], list[int]]:
    """Splits the ids of an answer behind the special token that ends the turn.

    A template that writes none gives a model no way to stop: then the tokenizer's end token is added.
    """
    special = tokenizer.special_ids
    for place in range(len(ids), 0, -1):
        if ids[place - 1] in special:
            return ids[:place], ids[place:]
    return [*ids, tokenizer.eos_id], []


class PlainTemplate(ChatTemplate):
    """No template: begin token, prompt, answer, end token; rounds one after another."""

    source = "plain"

    def fingerprint(self) -> str:
        return hashlib.sha256(b"plain").hexdigest()

    def save(self, folder: Path) -> None:
        """Nothing to write: no template is this template."""

    def rounds(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[Round], list[int]]:
        begin = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
        rounds: list[Round] = []
        asked: list[str] = []
        for message in messages:
            if message["role"] == "assistant":
                prompt = begin + tokenizer.encode("\n".join(asked))
                rounds.append(Round(prompt, [*tokenizer.encode(message["content"]), tokenizer.eos_id]))
                asked = []
            else:
                asked.append(message["content"])
        return rounds, begin + tokenizer.encode("\n".join(asked)) if asked else []


class JinjaTemplate(ChatTemplate):
    """A Jinja chat template as Hugging Face checkpoints carry it, run in a sandbox."""

    source = "jinja"

    def __init__(self, text: str, origin: str) -> None:
        self.text = text
        self.origin = origin
        _ = self._compiled  # a broken template must be reported now

    def fingerprint(self) -> str:
        return hashlib.sha256(f"jinja\0{self.text}".encode()).hexdigest()

    def save(self, folder: Path) -> None:
        (folder / JINJA_FILE).write_text(self.text, encoding="utf-8")
        settings_file = folder / SETTINGS_FILE
        if settings_file.is_file():  # libraries that do not know the separate file read it there
            settings = json.loads(settings_file.read_text(encoding="utf-8"))
            if settings.get("chat_template") != self.text:
                settings["chat_template"] = self.text
                settings_file.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    @cached_property
    def _compiled(self) -> Any:
        return compile_jinja(self.text, self.origin)

    def _render(self, tokenizer: Tokenizer, messages: Sequence[Message], *, ask: bool) -> str:
        return render_jinja(
            self._compiled,
            self.origin,
            messages=list(messages),
            add_generation_prompt=ask,
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.eos_token,
            pad_token=tokenizer.token(tokenizer.pad_id) or "",
            tools=None,
            documents=None,
        )

    def rounds(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[Round], list[int]]:
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        # what is asked before each answer, and that with the answer
        texts = [
            (
                self._render(tokenizer, messages[:place], ask=True),
                self._render(tokenizer, messages[: place + 1], ask=False),
            )
            for place in answers
        ]
        open_end = bool(messages) and messages[-1]["role"] != "assistant"
        last = self._render(tokenizer, messages, ask=True) if open_end else None
        asked = [text for text, _ in texts[1:]] + ([] if last is None else [last])
        if not all(text.startswith(done) for text, (_, done) in zip(asked, texts, strict=False)):
            # the template writes history in another way than the turn at hand, so only the last answer
            # can be learned as it will be asked for
            texts = [] if open_end else texts[-1:]
        done, rounds, before = "", list[Round](), list[int]()
        for question, answered in texts:
            prompt = before + self._encode(tokenizer, done, question)
            answer, before = end_turn(tokenizer, self._encode(tokenizer, question, answered))
            rounds.append(Round(prompt, answer))
            done = answered
        if last is not None:
            before = before + self._encode(tokenizer, done, last)
        return rounds, before

    def _encode(self, tokenizer: Tokenizer, before: str, text: str) -> list[int]:
        """The ids of what `text` adds to `before`."""
        if not text.startswith(before):
            raise UserError(
                f"{self.origin}: this template rewrites earlier turns, so what a model is trained on would "
                "differ from what it is asked with; give a template that only appends with --chat_template"
            )
        return tokenizer.encode(text[len(before) :], continuation=bool(before))


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
        written: list[str] = parts if parts else [str(query), "{{bot}}"]
        *asking, answering = written
        self._ask = [compile_jinja(text, origin, keep_trailing_newline=True) for text in asking]
        self._answer = compile_jinja(answering, origin, keep_trailing_newline=True)
        self._system = compile_jinja(system, origin, keep_trailing_newline=True) if system else None

    def fingerprint(self) -> str:
        content = json.dumps(self.content, ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(f"paddlenlp\0{content}".encode()).hexdigest()

    def save(self, folder: Path) -> None:
        text = json.dumps(self.content, ensure_ascii=False, indent=2)
        (folder / PADDLENLP_FILE).write_text(text + "\n", encoding="utf-8")

    def rounds(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[Round], list[int]]:
        system = "\n".join(message["content"] for message in messages if message["role"] == "system")
        before = tokenizer.encode(self._system_text(system))
        rounds: list[Round] = []
        prompt = list[int]()
        asked = False
        for message in messages:
            index = len(rounds)
            if message["role"] == "user":
                for part in self._ask:
                    prompt += tokenizer.encode(self._part(part, tokenizer, message["content"], "", index))
                asked = True
            elif message["role"] == "assistant":
                text = self._part(self._answer, tokenizer, "", message["content"], index)
                answer, rest = end_turn(tokenizer, tokenizer.encode(text))
                rounds.append(Round(before + prompt, answer))
                before, prompt, asked = rest, [], False
        return rounds, before + prompt if asked else before

    def _system_text(self, content: str) -> str:
        if self._system is None:
            return content + "\n" if content else ""
        text = render_jinja(self._system, self.origin, system=content, is_training=False)
        return text if content in text else content + "\n"

    def _part(self, part: Any, tokenizer: Tokenizer, user: str, bot: str, index: int) -> str:
        return render_jinja(
            part,
            self.origin,
            user=user,
            query=user,
            bot=bot,
            index=index,
            is_first=index == 0,
            is_training=False,
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.eos_token,
        )


def compile_jinja(text: str, origin: str, *, keep_trailing_newline: bool = False) -> Any:
    """Compiles a template for the sandbox, with the functions that published chat templates use.

    A newline that ends the text of a Hugging Face template is not part of it; in PaddleNLP's it is.

    Raises:
        UserError: a syntax error, with the template's line.
    """
    import jinja2

    from utils.data.jinja import environment

    try:
        return environment(keep_trailing_newline).from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{origin}: chat template, line {error.lineno}: {error.message}") from None


def render_jinja(template: Any, origin: str, **values: Any) -> str:
    """The text of a compiled template.

    Raises:
        UserError: what the template itself says is wrong, or a fault in it.
    """
    import jinja2

    try:
        return template.render(**values)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{origin}: the chat template refuses this conversation: {error}") from None


def _read_template(file: Path) -> ChatTemplate:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix != ".json":
            return JinjaTemplate(text, str(file))
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: the chat template cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object")
    if isinstance(content.get("chat_template"), str):  # processors' files hold Jinja text in JSON
        return JinjaTemplate(content["chat_template"], str(file))
    return PaddleNLPTemplate(content, str(file))


def _template_in_settings(file: Path) -> str | None:
    """`chat_template` of a tokenizer_config.json: a text, or a list of named ones."""
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: not readable as a JSON object ({error})") from None
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
