"""A conversation in the terminal: answers stream in, earlier rounds are remembered."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from utils import signals
from utils.data.encode import forgotten_rounds
from utils.data.lines import naming
from utils.data.template import Message
from utils.errors import UserError, notice
from utils.inference.loading import Prepared
from utils.inference.sampling import SamplingOptions
from utils.parallel.process_group import ProcessGroup

if TYPE_CHECKING:
    from utils.inference.generator import Completion, Generator

LONGEST_LINE = 4095  # bytes; what is typed behind them does not arrive from a terminal
HELP = "Type a message. /reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."


class Chat:
    """A conversation with a model.

    Attributes:
        messages: the rounds that the model remembers.
    """

    def __init__(self, prepared: Prepared, generator: Generator, options: SamplingOptions, src_length: int) -> None:
        self.messages: list[Message] = []
        self._prepared = prepared
        self._generator = generator
        self._options = options
        self._src_length = src_length
        self._rounds = 0

    def say(self, text: str, write: Callable[[str], None]) -> Completion:
        """Answers one message of the user; pieces of the answer go to `write` as they come.

        Rounds that no longer fit into src_length are forgotten, the oldest first. Ctrl-C ends the
        answer; what was said so far is remembered. A message that cannot be answered is forgotten.
        """
        from utils.inference.generator import Completion

        self.messages.append({"role": "user", "content": text})
        try:
            with naming("this message"):
                prompt = self._prompt()
        except UserError as error:
            self.messages.pop()
            return Completion("", (), "error", 0, error=str(error))
        stream = self._generator.stream(prompt, self._options, number=self._rounds)
        self._rounds += 1
        said = ""
        try:
            while True:
                piece = next(stream)
                said += piece
                write(piece)
        except StopIteration as end:
            completion: Completion = end.value
        except KeyboardInterrupt:
            stream.close()
            completion = Completion(said, (), "stop", 0)
        if completion.error is not None:
            self.messages.pop()
        else:
            self.messages.append({"role": "assistant", "content": completion.text})
        return completion

    def reset(self) -> None:
        """Forgets all rounds."""
        self.messages.clear()

    def _prompt(self) -> list[int]:
        template, tokenizer = self._prepared.template, self._prepared.tokenizer
        forgotten = forgotten_rounds(self.messages, tokenizer, template, self._src_length)
        if forgotten:
            del self.messages[: 2 * forgotten]
            notice(f"{forgotten} of the oldest rounds no longer fit into src_length {self._src_length}")
        ids, was_cut = self._prepared.encode(self.messages, self._src_length)
        if was_cut:
            notice(f"the message was cut to src_length {self._src_length} tokens")
        return ids


def _read() -> str | None:
    """A message, "" where it is none; None at the end of input."""
    signal.siginterrupt(signal.SIGINT, True)  # or else the reading would go on, see `signals.handle`
    try:
        text = input("> ")
    except (EOFError, KeyboardInterrupt):
        return None
    finally:
        signal.siginterrupt(signal.SIGINT, False)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:  # a byte that stands for no character, see `chat_in_terminal`
        notice(f"this message is no {sys.stdin.encoding} text; type it again")
        return ""
    if size == LONGEST_LINE and sys.stdin.isatty():
        notice(f"the terminal takes no more than {LONGEST_LINE} bytes of a line; the message may have been cut")
    return text.strip()


def chat_in_terminal(chat: Chat, processes: ProcessGroup) -> None:
    """Reads messages from standard input and writes answers to standard output until the end of input.

    Args:
        processes: all of these processes take part; the first speaks with the user.
    """
    notice(HELP)
    signals.handle(signal.SIGINT, signal.default_int_handler)  # it stops an answer, not the process
    if isinstance(sys.stdin, io.TextIOWrapper):  # a broken byte must not take with it what has been read ahead
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        text = processes.from_first(_read, "waiting for a message")
        if text is None:
            print()
            return
        if text == "/exit":
            return
        if text == "/reset":
            chat.reset()
        elif text:
            completion = chat.say(text, lambda piece: print(piece, end="", flush=True))
            print(flush=True)
            for remark in (completion.error, completion.note):
                if remark:
                    notice(remark)
