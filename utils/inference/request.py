"""A prompt on its way to an answer, and what is known about the answer so far."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from utils.errors import UserError
from utils.inference.constraint import Constraint
from utils.inference.engine import Logits
from utils.inference.lookup import Lookup
from utils.inference.sampling import Alternatives, RowSampler, SamplingOptions, likeliest, log_softmax
from utils.inference.slots import Slots
from utils.inference.text import TextStream


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt.

    Attributes:
        text: without end token and stop word.
        tokens: every generated token, the end token included.
        finish_reason: "stop" (end token or stop word), "length", or "error".
        prompt_tokens: length of the prompt.
        logprobs: log-probability of each token, when asked for.
        top_logprobs: for each token the likeliest ones at its place with their log-probabilities, the
            likeliest first, when asked for.
        error: why there is no (whole) answer, with finish_reason "error".
        note: what the user should know although there is an answer.
        cached_tokens: those of the prompt that were copied from another text instead of read.
        prompt_logprobs, prompt_top_logprobs: of each token of the prompt but the first, when asked for.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[Alternatives, ...] | None = None
    error: str | None = None
    note: str | None = None
    cached_tokens: int = field(default=0, compare=False)  # depends on what else runs
    prompt_logprobs: tuple[float, ...] | None = None
    prompt_top_logprobs: tuple[Alternatives, ...] | None = None


@dataclass(eq=False)
class Request:
    """What was asked; the handle of those who asked. All but the prompt's facts is filled in as it runs.

    Attributes:
        prompt, options: as submitted.
        seed, number: together the key of the random numbers.
        budget: most tokens of the answer; fewer than asked for when the model has too few positions.
        end_ids: tokens that end the answer.
        text: turns the tokens into text as they come; None when only the whole text is wanted.
        constraint: the form of the answer, if it must have one.
        opened: when its turn came, by `time.perf_counter`.
        tokens, logprobs, top_logprobs: of the answer so far.
        finish_reason: see `Completion`; None while it is in the making.
        ended: whether the last token is an end token.
        error, note, cached_tokens, prompt_logprobs, prompt_top_logprobs: see `Completion`.
    """

    prompt: list[int]
    options: SamplingOptions
    seed: int
    number: int
    budget: int
    end_ids: frozenset[int]
    text: TextStream | None
    constraint: Constraint | None = None
    opened: float = 0.0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[Alternatives] = field(default_factory=list)
    finish_reason: str | None = None
    ended: bool = False
    error: str | None = None
    note: str | None = None
    cached_tokens: int = 0
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top_logprobs: list[Alternatives] = field(default_factory=list)

    @property
    def places(self) -> int:
        """How many slots the answer takes."""
        return self.options.num_beams

    def may_stop(self, length: int) -> bool:
        """Whether a stop word may end an answer of so many tokens."""
        return length > self.options.min_new_tokens

    def fail(self, error: str) -> None:
        """Ends the answer with an error."""
        self.error, self.finish_reason = error, "error"


class View:
    """The logits after some tokens of one text, in the form that its answer asked for.

    Attributes:
        values: float32 [tokens, vocabulary]; None for those who only take the likeliest.
    """

    def __init__(
        self, values: NDArray[np.float32] | None, best: NDArray[np.int64], highest: NDArray[np.float32]
    ) -> None:
        self.values, self._best, self._highest = values, best, highest

    def best(self, place: int) -> int:
        """The likeliest token after the token at `place`."""
        return int(self._best[place])

    def is_sound(self, place: int) -> bool:
        """Whether the logits after the token at `place` are numbers at all."""
        return bool(np.isfinite(self._highest[place]))


def views(logits: Logits, counts: Sequence[int], whole: Sequence[bool]) -> list[View]:
    """Cuts the logits of several texts apart; only what is asked for leaves the device.

    Args:
        logits: after all tokens of the first text, then of the next.
        counts: how many tokens of each text.
        whole: whether all logits of a text are wanted, or only the likeliest tokens.
    """
    ends = np.cumsum(counts)
    spans = [np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)]
    found: list[View | None] = [None] * len(spans)
    for wanted in (False, True):
        group = [index for index, flag in enumerate(whole) if flag == wanted]
        if not group:
            continue
        part = logits.take(np.concatenate([spans[index] for index in group]).tolist())
        values = part.numpy() if wanted else None
        best, highest = part.argmax() if values is None else (values.argmax(axis=-1), values.max(axis=-1))
        start = 0
        for index in group:
            span = slice(start, start + counts[index])
            start += counts[index]
            found[index] = View(None if values is None else values[span], best[span], highest[span])
    return [view for view in found if view is not None]


def not_finite(number: int) -> str:
    """The error of a model that computes no numbers."""
    return f"the model's logits are not finite at token {number} of the answer"


def alternatives(values: NDArray[np.float32], token: int, count: int) -> tuple[float, Alternatives]:
    """(log-probability of a token, the `count` likeliest tokens with theirs) of one row of logits."""
    scores = log_softmax(values)
    return float(scores[token]), tuple(likeliest(scores, count))


class Answer(ABC):
    """An answer in the making: slots, and how the next tokens come from logits."""

    request: Request

    @property
    @abstractmethod
    def needs_values(self) -> bool:
        """Whether it wants all logits, not only the likeliest token."""

    @abstractmethod
    def feed(self) -> list[tuple[int, list[int]]]:
        """(slot, tokens to append) of each of its texts."""

    @abstractmethod
    def take(self, found: Sequence[View]) -> None:
        """Goes on with the logits after what `feed` gave (at first: after the prompt)."""

    @abstractmethod
    def slots(self) -> list[int]:
        """The slots it holds."""


class PlainAnswer(Answer):
    """One text that grows token by token, or faster where guesses of the next tokens are right.

    Its slot holds all tokens but the last.

    Attributes:
        drafted, accepted: tokens guessed, and how many of them were right.
    """

    def __init__(self, request: Request, slot: int, slots: Slots) -> None:
        self.request = request
        self.drafted = self.accepted = 0
        self._slot = slot
        self._slots = slots
        self._sampler = RowSampler(
            request.options, request.prompt, request.end_ids, request.seed, request.number, request.constraint
        )
        self._lookup = Lookup(request.prompt) if request.options.prompt_lookup_num_tokens else None
        self._draft: list[int] = []

    @property
    def needs_values(self) -> bool:
        return self.request.options.logprobs or not self._sampler.takes_argmax

    def feed(self) -> list[tuple[int, list[int]]]:
        request = self.request
        if self._lookup is not None:
            # one more token comes from the logits after the last guess
            room = request.budget - len(request.tokens) - 1
            self._draft = self._lookup.draft(min(request.options.prompt_lookup_num_tokens, room))
        return [(self._slot, [request.tokens[-1], *self._draft])]

    def take(self, found: Sequence[View]) -> None:
        (view,) = found
        draft, self._draft = self._draft, []
        right = 0
        while self._next(view, right) and right < len(draft) and self.request.tokens[-1] == draft[right]:
            right += 1
        self.drafted += len(draft)
        self.accepted += right
        if self.request.finish_reason is None:
            self._slots.rewind(self._slot, len(draft) - right)

    def slots(self) -> list[int]:
        return [self._slot]

    def _next(self, view: View, place: int) -> bool:
        """Chooses the token after the one at `place`; whether the answer goes on."""
        request = self.request
        if not view.is_sound(place):
            request.fail(not_finite(len(request.tokens) + 1))
            return False
        token = view.best(place)
        if view.values is not None:
            try:
                token = self._sampler.choose(view.values[place])
            except UserError as error:
                request.fail(str(error))
                return False
            if request.options.logprobs:
                own, others = alternatives(view.values[place], token, request.options.top_logprobs)
                request.logprobs.append(own)
                request.top_logprobs.append(others)
        request.tokens.append(token)
        self._sampler.accept(token)
        if self._lookup is not None:
            self._lookup.accept(token)
        if token in request.end_ids:
            request.ended = True
            request.finish_reason = "stop"
        elif request.text is not None:
            request.text.push(token, may_stop=request.may_stop(len(request.tokens)))
            if request.text.stopped:
                request.finish_reason = "stop"
        if request.finish_reason is None and self._sampler.ended:
            request.finish_reason = "stop"
        if request.finish_reason is None and len(request.tokens) >= request.budget:
            request.finish_reason = "length"
        return request.finish_reason is None
