"""Chat templates: the one path from a conversation to token ids.

Training, evaluation, the predictor and everything that serves a model call `ChatTemplate`, so the ids
that a model is trained on and the ids that it is asked with are the same. Each conversation is cut
into prompt and answer segments, and every segment is tokenized by itself: the ids of a prompt do not
depend on what follows it.
"""

from __future__ import annotations

import copy
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NotRequired, TypedDict

from utils.data.calls import takes_text
from utils.data.history import History, Told
from utils.data.lines import half_of_pair
from utils.data.marks import Rendered
from utils.data.talk import Talk
from utils.data.turns import end_turn, opened_thought, own_text_end
from utils.errors import UserError
from utils.settings import read_json, read_text, shown

if TYPE_CHECKING:
    from utils.families.tokenizers import Tokenizer

JINJA_FILE = "chat_template.jinja"
PADDLENLP_FILE = "chat_template.json"
SETTINGS_FILE = "tokenizer_config.json"
OPENED = re.compile(r"<(think|thinking|thought|reasoning)>\s*\Z")  # what some templates ask with
Tools = list[Any]  # descriptions of functions, as OpenAI's rows have them


class Message(TypedDict):
    """One turn.

    Keys:
        role: "system", "user" or "assistant".
        content: the text.
        train: whether an answer is learned; it is, if nothing else is said.
        reasoning_content: what an answer's author thought before.
        tool_calls: the functions that an answer calls, as OpenAI's messages have them; their arguments are JSON text
            or objects, whatever the template takes.
        name, tool_call_id: of who speaks, and of the call that a "tool" answers; for templates that write them.
    """

    role: str
    content: str
    train: NotRequired[bool]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[Any]]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]


EXAMPLE: list[Message] = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "a", "reasoning_content": "a"},
]


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
    """How a conversation becomes text and ids. Get one from `ChatTemplate.load`.

    Attributes:
        special_tokens_in_text: whether special tokens that a message holds are special tokens. By default they are
            text like any other; those of the template itself are always special.
        values: more that a Jinja template may look for, by name, such as enable_thinking.
    """

    source: Literal["jinja", "plain", "paddlenlp"]
    special_tokens_in_text = False
    values: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def load(
        cls,
        folder: Path | None,
        *,
        default: str | None,
        override: Path | None = None,
        special_tokens_in_text: bool = False,
    ) -> ChatTemplate:
        """The template of a checkpoint.

        Looked for in this order: `override`, chat_template.jinja, `chat_template` in
        tokenizer_config.json, chat_template.json (PaddleNLP) in `folder`, the family's `default`; if
        none exists, prompt and answer are joined as they are (right for base models).

        Args:
            folder: the checkpoint, or None.
            default: Jinja text of the model's family, or None.
            override: a .jinja or .json file of the user's.
            special_tokens_in_text: see the class.

        Raises:
            UserError: a template that cannot be read.
        """
        template = cls._find(folder, default, override)
        template.special_tokens_in_text = special_tokens_in_text
        return template

    @staticmethod
    def _find(folder: Path | None, default: str | None, override: Path | None) -> ChatTemplate:
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

    def fingerprint(self) -> str:
        """sha256 (hexadecimal) of all that decides the ids, the tokenizer aside."""
        option = "\0special tokens in text" if self.special_tokens_in_text else ""
        return hashlib.sha256(f"{self._identity()}{option}".encode()).hexdigest()

    @abstractmethod
    def _identity(self) -> str:
        """The kind of template and all of its text."""

    def known_keys(self, tokenizer: Tokenizer) -> frozenset[str]:
        """Which of the keys "tools", "tool_calls" and "reasoning_content" reach the model."""
        return frozenset()

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the template into a checkpoint folder, so that `load` finds this very one."""

    @abstractmethod
    def rounds(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools | None = None
    ) -> tuple[list[Round], list[int]]:
        """The ids of a conversation.

        Returns:
            One `Round` for each assistant message (only for the last one if the template writes history
            in another way than the turn at hand, as ChatGLM's does); and the ids of what follows the last answer, up to
            where the next answer would begin (for messages that end with an answer, only what the
            template writes after it).

        Raises:
            UserError: the template refuses the conversation.
        """

    def encode_prompt(self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
        """The ids that a model is asked with; `messages` ends with a turn of the user."""
        if not messages or messages[-1]["role"] == "assistant":
            raise ValueError("a prompt must end with a turn of the user")
        rounds, rest = self.rounds(tokenizer, messages, tools)
        return [i for one in rounds for part in one for i in part] + rest

    def encode_conversation(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools | None = None
    ) -> tuple[list[int], list[bool]]:
        """The ids of a conversation that ends with an answer, and which of them are supervised.

        Supervised are the assistant's texts of `rounds`, if they are to be learned, and the token that ends each of
        them. What a template writes after the last one is left out.
        """
        ids: list[int] = []
        supervised: list[bool] = []
        rounds = self.rounds(tokenizer, messages, tools)[0]
        answers = [message for message in messages if message["role"] == "assistant"]
        for one, message in zip(rounds, answers[len(answers) - len(rounds) :], strict=True):
            ids += one.prompt + one.answer
            supervised += [False] * len(one.prompt) + [message.get("train", True)] * len(one.answer)
        return ids, supervised

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Every id that ends an answer: the tokenizer's, and the one that this template writes."""
        return tuple(dict.fromkeys([*tokenizer.eos_ids, self._example_end(tokenizer)]))

    def _example_end(self, tokenizer: Tokenizer) -> int:
        """The id that ends an answer without anything special in it."""
        return self.rounds(tokenizer, EXAMPLE)[0][0].answer[-1]


class PlainTemplate(ChatTemplate):
    """No template: begin token, prompt, answer, end token; rounds one after another."""

    source = "plain"

    def _identity(self) -> str:
        return "plain"

    def save(self, folder: Path) -> None:
        """Nothing to write: no template is this template."""

    def rounds(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools | None = None
    ) -> tuple[list[Round], list[int]]:
        encode = tokenizer.encode if self.special_tokens_in_text else tokenizer.encode_text
        begin = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
        rounds: list[Round] = []
        asked: list[str] = []
        for message in messages:
            if message["role"] == "assistant":
                prompt = begin + encode("\n".join(asked))
                rounds.append(Round(prompt, [*encode(message["content"]), tokenizer.eos_id]))
                asked = []
            else:
                asked.append(message["content"])
        return rounds, begin + encode("\n".join(asked)) if asked else []


class JinjaTemplate(ChatTemplate):
    """A Jinja chat template as Hugging Face checkpoints carry it, run in a sandbox."""

    source = "jinja"

    def __init__(self, text: str, origin: str) -> None:
        self.text = text
        self.origin = origin
        if (half := half_of_pair(text)) is not None:
            raise UserError(f"{origin}: the chat template holds half of a surrogate pair at character {half}")
        self._examples: dict[Tokenizer, tuple[str, str]] = {}
        self._history = History()
        _ = self.compiled  # a broken template must be reported now

    def with_values(self, values: Mapping[str, Any]) -> JinjaTemplate:
        """The same template with other `values`."""
        other = copy.copy(self)
        other.values, other._examples = values, {}
        return other

    def _identity(self) -> str:
        return f"jinja\0{self.text}"

    def save(self, folder: Path) -> None:
        from utils.checkpoints.files import write_json  # with NumPy, which checks of data do without

        (folder / JINJA_FILE).write_text(self.text, encoding="utf-8")
        settings_file = folder / SETTINGS_FILE
        if settings_file.is_file():  # libraries that do not know the separate file read it there
            settings = read_json(settings_file)
            if settings.get("chat_template") != self.text:
                settings["chat_template"] = self.text
                write_json(settings_file, settings)

    @cached_property
    def compiled(self) -> Any:
        from utils.data.jinja import compile_jinja

        return compile_jinja(self.text, self.origin)

    @cached_property
    def written_keys(self) -> frozenset[str]:
        """Those of `known_keys` that the template looks for."""
        from utils.data.jinja import names_in

        return names_in(self.text) & {"tools", "tool_calls", "reasoning_content"}

    @cached_property
    def calls_as_text(self) -> bool:
        """See `takes_text`."""
        return takes_text(self.compiled, self.origin)

    def _example(self, tokenizer: Tokenizer) -> tuple[str, str]:
        """The text of a short question, and that with its answer."""
        if tokenizer not in self._examples:
            talk = Talk(self, tokenizer, EXAMPLE, None, ())
            try:
                self._examples[tokenizer] = talk.render(1, ask=True).text, talk.render(2).text
            except UserError:  # a template that refuses so short a conversation
                self._examples[tokenizer] = "", ""
        return self._examples[tokenizer]

    def known_keys(self, tokenizer: Tokenizer) -> frozenset[str]:
        opened = OPENED.search(self._example(tokenizer)[0])
        return self.written_keys | ({"reasoning_content"} if opened else set())

    def _own_tokens(self, tokenizer: Tokenizer) -> frozenset[str]:
        """The tokens that the template writes around any text.

        Many models call those that begin a turn ordinary tokens; in a text of a user they are text as well.
        """
        return tokenizer.tags_in("\n".join(self._example(tokenizer)))

    def rounds(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools | None = None
    ) -> tuple[list[Round], list[int]]:
        talk = Talk(self, tokenizer, messages, tools, self._own_tokens(tokenizer))
        asks = bool(messages) and messages[-1]["role"] != "assistant"
        context = [tools, dict(self.values), self.special_tokens_in_text]
        known = self._history.longest(tokenizer, messages, context) if asks else Told()
        found = self._rounds_behind(known, talk, asks=asks)
        if found is not None:
            told, rest = found
            if told.length > known.length and asks:
                self._history.add(tokenizer, messages, context, told)
            return list(told.rounds), [*told.behind, *rest]
        # the template writes history in another way than the turn at hand, so only the last answer can be learned as
        # it will be asked for
        if asks:
            return [], talk.render(len(messages), ask=True).encode(tokenizer)
        place = len(messages) - 1
        question = talk.render(place, ask=True)
        answer, behind = self._answer(talk, place, question, talk.render(place + 1))
        return [Round(question.encode(tokenizer), answer)], behind

    def _rounds_behind(self, told: Told, talk: Talk, *, asks: bool) -> tuple[Told, list[int]] | None:
        """What follows the rounds that are known.

        Args:
            asks: whether the conversation ends with a question.

        Returns:
            All that is known up to the last answer, and the ids of what follows it; None if the template does not
            only append.
        """
        tokenizer, messages = talk.tokenizer, talk.messages
        count, rounds, behind, done = told.length, list(told.rounds), list(told.behind), told.text
        for place in range(told.length, len(messages)):
            if messages[place]["role"] != "assistant":
                continue
            question, answered = talk.render(place, ask=True), talk.render(place + 1)
            is_last = not asks and place == len(messages) - 1
            if not (question.text.startswith(done.text) and (is_last or answered.text.startswith(question.text))):
                return None
            prompt = behind + question.cut(len(done.text)).encode(tokenizer, continuation=bool(done.text))
            answer, behind = self._answer(talk, place, question, answered)
            rounds.append(Round(prompt, answer))
            done, count = answered, place + 1
        told = Told(count, tuple(rounds), tuple(behind), done)
        if not asks:
            return told, []
        last = talk.render(len(messages), ask=True)
        if not last.text.startswith(done.text):
            return None
        return told, last.cut(len(done.text)).encode(tokenizer, continuation=bool(done.text))

    def _answer(self, talk: Talk, place: int, question: Rendered, answered: Rendered) -> tuple[list[int], list[int]]:
        """The ids of an answer, and of what the template writes behind it.

        Raises:
            UserError: what is asked is no beginning of what is answered.
        """
        message = talk.messages[place]
        if answered.text.startswith(question.text):
            added = answered.cut(len(question.text))
            end = own_text_end(added.text, message["content"])
            if end is None and (found := talk.end_of(place, answered)) is not None:
                end = found - len(question.text)
        else:
            thought, opened, found = "", OPENED.search(question.text), talk.end_of(place, answered)
            if opened is None or found is None:
                raise UserError(
                    f"{self.origin}: this template rewrites earlier turns, so what a model is trained on would "
                    "differ from what it is asked with; give a template that only appends with --chat_template"
                )
            thought = opened_thought(message, opened, self.origin)
            added, end = talk.of_user(thought) + answered.cut(found), len(thought)
        only = self._example_end(talk.tokenizer) if "tool_calls" in message else None
        return end_turn(talk.tokenizer, added, end, continuation=bool(question.text), only=only)


def _read_template(file: Path) -> ChatTemplate:
    if file.suffix != ".json":
        return JinjaTemplate(read_text(file), str(file))
    from utils.data.paddlenlp_template import PaddleNLPTemplate  # which is a template itself

    content = read_json(file)
    if isinstance(content.get("chat_template"), str):  # processors' files hold Jinja text in JSON
        return JinjaTemplate(content["chat_template"], str(file))
    return PaddleNLPTemplate(content, str(file))


def _template_in_settings(file: Path) -> str | None:
    """`chat_template` of a tokenizer_config.json: a text, or a list of named ones, of which "default" is taken.

    Raises:
        UserError: it is anything else, which nothing may take for no template.
    """
    found = read_json(file).get("chat_template") if file.is_file() else None
    if found is None or isinstance(found, str):
        return found
    named = {}
    for entry in found if isinstance(found, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str):
            named[entry["name"]] = entry["template"]
    if not isinstance(found, list) or len(named) < max(1, len(found)):
        raise UserError(
            f"{file}: chat_template: expected a text, or a list of objects with the texts name (each another) and "
            f"template, found {shown(found)}"
        )
    if "default" not in named:
        raise UserError(
            f"{file}: chat_template: has templates named {', '.join(map(shown, named))} and none named default; save "
            f"the one to use as {file.with_name(JINJA_FILE)}, or, for finetune_generation.py, predictor.py and "
            "export_model.py, as a file that --chat_template names"
        )
    return named["default"]
