"""One row becomes ids and labels, cut to the lengths of the run; everything cut or dropped is counted."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.data.lines import naming
from utils.data.rows import Row
from utils.data.template import ChatTemplate, Message, Tools
from utils.errors import UserError

if TYPE_CHECKING:
    from utils.families.tokenizers import Tokenizer

IGNORED = -100
SHOWN_PLACES = 5
MOST_KINDS = 50  # of remarks in a report
# A later round whose answer does not fit is kept only with at least this much of the answer: a few
# words and an end token would teach a model to stop early.
CUT_ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Example:
    """A tokenized conversation.

    Attributes:
        input_ids: int32 [n].
        labels: int32 [n]; already shifted: `labels[t]` is the id to predict after `input_ids[t]`, -100
            where nothing is learned.
    """

    input_ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Dropped:
    """A row that gives no example, and why."""

    reason: str


@dataclass
class DataReport:
    """What became of the rows of a dataset.

    Attributes:
        kept, tokens, supervised: examples, their input tokens, and those with a label.
        counts: how many rows were cut, dropped or not read whole, by what happened to them.
        places: file and line of the first rows of each kind.
    """

    kept: int = 0
    tokens: int = 0
    supervised: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def note(self, what: str, row_place: str) -> None:
        """Counts one row under `what`; rows may have any number of keys that nobody reads."""
        if what not in self.counts and len(self.counts) >= MOST_KINDS:
            what = "other keys ignored"
        self.counts[what] += 1
        places = self.places.setdefault(what, [])
        if len(places) < SHOWN_PLACES:
            places.append(row_place)

    def add(self, example: Example) -> None:
        """Counts one example."""
        self.kept += 1
        self.tokens += len(example.input_ids)
        self.supervised += int(np.count_nonzero(example.labels != IGNORED))

    def merge(self, other: DataReport) -> None:
        """Counts what another report has counted of other rows."""
        self.kept += other.kept
        self.tokens += other.tokens
        self.supervised += other.supervised
        self.counts.update(other.counts)
        for what, found in other.places.items():
            places = self.places.setdefault(what, [])
            places += found[: SHOWN_PLACES - len(places)]

    def summary(self) -> str:
        """One line with the totals, and one for each kind of cut or dropped rows."""
        share = self.supervised / max(self.tokens, 1)
        return "\n".join(
            [f"{self.kept:,} examples, {self.tokens:,} tokens, {share:.0%} of them supervised", *self.remarks()]
        )

    def remarks(self) -> list[str]:
        """One line for each kind of cut or dropped rows."""
        lines = []
        for what, count in sorted(self.counts.items()):
            places = "; ".join(self.places[what])
            more = "; ..." if count > len(self.places[what]) else ""
            lines.append(f"{count:,} {'row' if count == 1 else 'rows'}: {what} ({places}{more})")
        return lines

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "counts": dict(self.counts)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> DataReport:
        return cls(**{**content, "counts": Counter(content["counts"])})


def note_ignored(row: Row, tokenizer: Tokenizer, template: ChatTemplate, report: DataReport) -> None:
    """Counts what a row says and neither its reader nor the template uses.

    Raises:
        UserError: nothing is left of an answer.
    """
    for what in row.ignored:
        report.note(what, row.place)
    said = {"tools"} if row.tools else set[str]()
    said |= {key for message in row.messages for key in ("tool_calls", "reasoning_content") if key in message}
    results = any(message["role"] == "tool" for message in row.messages)
    known = template.known_keys(tokenizer) if said or results else frozenset[str]()
    if results and not known & {"tools", "tool_calls"}:
        raise UserError("a turn of a tool, which the chat template does not write; use one that knows tools")
    unused = said - known
    if "tool_calls" in unused and any("tool_calls" in one and not one["content"].strip() for one in row.messages):
        raise UserError(
            "an answer is blank but for tool_calls, which the chat template does not write; "
            "give the answer a text, or use a chat template that writes them"
        )
    for key in sorted(unused):
        report.note(f'"{key}" ignored: the chat template does not write it', row.place)


def forgotten_rounds(messages: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate, src_length: int) -> int:
    """How many of the oldest rounds, a question and its answer, have to go until a conversation fits into `src_length`.

    A system message and the last question stay; if they alone are too long, all rounds have to go.
    """
    first = 1 if messages[0]["role"] == "system" else 0

    def fits(forgotten: int) -> bool:
        kept = [*messages[:first], *messages[first + 2 * forgotten :]]
        return len(template.encode_prompt(tokenizer, kept)) <= src_length

    rounds = (len(messages) - first - 1) // 2
    return 0 if rounds == 0 or fits(0) else bisect_left(range(rounds), True, key=fits)


def encode_source(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    src_length: int,
    tools: Tools | None = None,
) -> tuple[list[int], bool]:
    """The ids that a model is asked with, at most `src_length` of them.

    A prompt that is too long loses the end of its last question; what comes before it (begin token,
    system text, head of the question) and what the template writes after it stay. If the rounds before
    the last question leave it no room, the oldest of them go first.

    Args:
        messages: end with a turn of the user, or of a tool.
        tokenizer, template: of the checkpoint.
        src_length: the limit, in tokens.
        tools: of the row, see `Row`.

    Returns:
        The ids, and whether anything was cut.

    Raises:
        UserError: `src_length` has no room for what the template itself writes.
    """
    ids = template.encode_prompt(tokenizer, messages, tools)
    if len(ids) <= src_length:
        return ids, False
    first = 1 if messages[0]["role"] == "system" else 0
    begins = [first, *(at for at, message in enumerate(messages) if at > first and message["role"] == "user")]

    def without(rounds: int) -> list[Message]:
        return [*messages[:first], *messages[begins[rounds] :]]

    def leaves_room(rounds: int) -> bool:
        *before, question = without(rounds)
        return len(template.encode_prompt(tokenizer, [*before, {**question, "content": ""}], tools)) <= src_length

    # of the oldest questions and their answers, as few go as can
    rounds = bisect_left(range(len(begins)), True, key=leaves_room)
    kept = without(min(rounds, len(begins) - 1))
    ids = template.encode_prompt(tokenizer, kept, tools)
    if len(ids) <= src_length:
        return ids, True
    ids, fits = _cut_content(kept, len(kept) - 1, tokenizer, template, src_length, tools)
    if fits:
        return ids, True
    if kept[0]["role"] == "system":
        kept[-1] = {**kept[-1], "content": ""}
        ids, fits = _cut_content(kept, 0, tokenizer, template, src_length, tools)
        if fits:
            return ids, True
    raise UserError(f"src_length {src_length} is too short: the chat template alone takes {len(ids)} tokens")


def _cut_content(
    messages: Sequence[Message],
    place: int,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    limit: int,
    tools: Tools | None,
) -> tuple[list[int], bool]:
    """The prompt with the longest head of one message's content that fits into `limit` tokens.

    Returns:
        The ids, and whether they fit; if not, they are those of the prompt with that content empty.
    """

    def prompt(content: str) -> list[int]:
        changed = list(messages)
        changed[place] = {**messages[place], "content": content}
        return template.encode_prompt(tokenizer, changed, tools)

    content = messages[place]["content"]
    best = prompt("")
    if len(best) > limit:
        return best, False
    # The search is over characters, so no character is ever cut in two. The content's own first tokens
    # bound it from above; the margin covers merges that differ at the edges.
    head = tokenizer.encode(content)[: limit + 1]
    low, high = 0, min(len(content), len(tokenizer.decode(head, skip_special=False)) + 16)
    while low < high:
        middle = (low + high + 1) // 2
        ids = prompt(content[:middle])
        if len(ids) <= limit:
            low, best = middle, ids
        else:
            high = middle - 1
    return best, True


def encode_row(
    row: Row,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    src_length: int,
    max_length: int,
    report: DataReport | None = None,
) -> Example | Dropped:
    """The example of a row, at most `max_length` tokens long.

    The first prompt is cut to `src_length` as `encode_source` does. An answer that does not fit is cut
    and keeps its end token. Of a conversation as many leading rounds stay as fit. If the template
    rewrites earlier turns, they are part of the prompt and only the last answer is learned.

    Args:
        row: ends with an answer.
        tokenizer, template: of the checkpoint.
        src_length, max_length: limits in tokens, of the first prompt and of everything.
        report: where cut and dropped rows are counted.

    Raises:
        UserError: the template or the tokenizer cannot take the row, or `src_length` is too short for the template;
            with the row's place.
    """
    report = DataReport() if report is None else report
    with naming(row.place):
        rounds, _ = template.rounds(tokenizer, row.messages, row.tools)
        note_ignored(row, tokenizer, template, report)
    answers = [place for place, message in enumerate(row.messages) if message["role"] == "assistant"]
    if len(rounds) < len(answers):
        report.note("only the last answer learned, the chat template rewrites earlier ones", row.place)
    ids: list[int] = []
    supervised: list[bool] = []
    for number, (prompt, answer) in enumerate(rounds):
        if number == 0:
            # Two places stay for the answer: one token and the one that ends it.
            limit = min(src_length, max_length - min(2, len(answer)))
            if len(prompt) > limit:
                first_answer = answers[-len(rounds)]
                with naming(row.place):
                    prompt, _ = encode_source(row.messages[:first_answer], tokenizer, template, limit, row.tools)
                report.note(f"question cut to {limit} tokens", row.place)
        room = max_length - len(ids) - len(prompt)
        if number and room < min(len(answer), CUT_ANSWER_TOKENS):
            report.note(f"later rounds left out, over {max_length} tokens", row.place)
            break
        if len(answer) > room:
            answer = [*answer[: room - 1], answer[-1]]
            report.note(f"answer cut, over {max_length} tokens", row.place)
        ids += prompt + answer
        learned = row.messages[answers[number - len(rounds)]].get("train", True)
        supervised += [False] * len(prompt) + [learned] * len(answer)
        if len(ids) >= max_length and number + 1 < len(rounds):
            report.note(f"later rounds left out, over {max_length} tokens", row.place)
            break
    sequence = np.array(ids, dtype=np.int32)
    labels = np.where(np.array(supervised[1:], dtype=bool), sequence[1:], np.int32(IGNORED))
    if len(sequence) < 2 or not np.any(labels != IGNORED):
        unwanted = any(not message.get("train", True) for message in row.messages)
        reason = f"nothing to learn ({'its train, weight or loss says so' if unwanted else 'the answer has no tokens'})"
        report.note(f"dropped, {reason}", row.place)
        return Dropped(reason)
    example = Example(sequence[:-1], labels.astype(np.int32))
    report.add(example)
    return example
