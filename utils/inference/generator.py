"""From prompts to answers, above any engine: batches, end tokens, stop words, streams, speed figures."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Sequence
from collections.abc import Generator as PythonGenerator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from utils.inference.engine import Engine, Logits
from utils.inference.sampling import RowSampler, SamplingOptions, log_probability
from utils.inference.text import TextStream


class Decoder(Protocol):
    """What the generator needs of a tokenizer."""

    eos_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt.

    Attributes:
        text: without end token and stop word.
        tokens: every generated token, the end token included.
        finish_reason: "stop" (end token or stop word), "length", or "error".
        prompt_tokens: length of the prompt.
        logprobs: log-probability of each token, when asked for.
        error: why there is no (whole) answer, with finish_reason "error".
        note: what the user should know although there is an answer.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    logprobs: tuple[float, ...] | None = None
    error: str | None = None
    note: str | None = None


@dataclass
class Speed:
    """Time and real tokens (no padding) of everything generated so far. Times in seconds.

    Attributes:
        load_seconds: until the generator was ready, if it was loaded from files.
        prompt_tokens, prefill_seconds: of the first forward of each batch.
        decode_tokens, decode_seconds: of all further forwards.
        first_token_seconds: from the start of each batch to its first tokens.
    """

    load_seconds: float = 0.0
    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    first_token_seconds: list[float] = field(default_factory=list)


class _Row:
    """One answer in the making."""

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        options: SamplingOptions,
        budget: int,
        end_ids: frozenset[int],
        stream: TextStream | None,
        sampler: RowSampler,
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.options = options
        self.budget = budget
        self.end_ids = end_ids
        self.stream = stream
        self.sampler = sampler
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.fresh = ""
        self.finish_reason: str | None = None
        self.ended = False
        self.error: str | None = None

    def accept(self, token: int) -> None:
        """Adds a token and sees whether it is the last."""
        self.tokens.append(token)
        self.sampler.accept(token)
        if token in self.end_ids:
            self.ended = True
            self.finish_reason = "stop"
        elif self.stream is not None:
            self.fresh = self.stream.push(token)
            if self.stream.stopped:
                self.finish_reason = "stop"
        if self.finish_reason is None and len(self.tokens) >= self.budget:
            self.finish_reason = "length"

    def fail(self, error: str) -> None:
        self.error = error
        self.finish_reason = "error"


class Generator:
    """Generates answers with an engine and a tokenizer.

    Attributes:
        speed: figures over all calls; assign `Speed()` to start anew.
    """

    def __init__(self, engine: Engine, tokenizer: Decoder, end_ids: Collection[int] | None = None) -> None:
        """
        Args:
            engine: without rows in flight.
            tokenizer: of the engine's model.
            end_ids: tokens that end an answer; None takes the tokenizer's.
        """
        self.engine = engine
        self.speed = Speed()
        self._tokenizer = tokenizer
        self._end_ids = tokenizer.eos_ids if end_ids is None else tuple(end_ids)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: SamplingOptions | Sequence[SamplingOptions],
        batch_size: int = 8,
        on_row: Callable[[int, Completion], None] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Answers every prompt. Batches take prompts of similar length; finished rows leave the batch.

        A prompt that cannot be answered (empty, too long for the model's positions, unknown ids) gives
        a completion with an error, and the others go on.

        Args:
            prompts: token ids.
            options: for all prompts, or one per prompt.
            batch_size: most rows at a time; it does not change the answers.
            on_row: called with (index in `prompts`, completion) as soon as each answer is ready.
            numbers: what the random numbers of each prompt depend on beside the seed; default its index.

        Returns:
            One completion per prompt, in the order of `prompts`.
        """
        each = [options] * len(prompts) if isinstance(options, SamplingOptions) else list(options)
        if len(each) != len(prompts) or (numbers is not None and len(numbers) != len(prompts)):
            raise ValueError("options and numbers must be as many as the prompts")
        fallback_seed = secrets.randbits(64)
        done: dict[int, Completion] = {}

        def finish(index: int, completion: Completion) -> None:
            done[index] = completion
            if on_row is not None:
                on_row(index, completion)

        good = []
        for index, prompt in enumerate(prompts):
            fault = self._fault(prompt)
            if fault:
                finish(index, Completion("", (), "error", len(prompt), error=fault))
            else:
                good.append(index)
        good.sort(key=lambda index: -len(prompts[index]))  # longest first: too little memory shows at once
        for start in range(0, len(good), batch_size):
            rows = []
            for index in good[start : start + batch_size]:
                number = numbers[index] if numbers is not None else index
                rows.append(self._row(index, prompts[index], each[index], fallback_seed, number))
            with closing(self._steps(rows)) as steps:  # frees the engine even if `on_row` raises
                for step in steps:
                    for row in step:
                        if row.finish_reason:
                            finish(row.index, self._completion(row))
        return [done[index] for index in range(len(prompts))]

    def stream(
        self, prompt: Sequence[int], options: SamplingOptions, number: int = 0
    ) -> PythonGenerator[str, None, Completion]:
        """Answers one prompt piece by piece; a piece is never empty and holds whole characters only.

        The completion is what the generator returns (`completion = yield from ...`). Closing it early
        frees the engine.
        """
        fault = self._fault(prompt)
        if fault:
            return Completion("", (), "error", len(prompt), error=fault)
        row = self._row(0, prompt, options, secrets.randbits(64), number)
        row.stream = row.stream or TextStream(self._tokenizer.decode)
        with closing(self._steps([row])) as steps:
            for _ in steps:
                if row.fresh:
                    yield row.fresh
        rest = row.stream.finish()
        if rest:
            yield rest
        return self._completion(row)

    def _fault(self, prompt: Sequence[int]) -> str | None:
        """What keeps a prompt from being answered."""
        limit = self.engine.max_positions
        if not len(prompt):
            return "the prompt is empty"
        if limit is not None and len(prompt) >= limit:
            return (
                f"the prompt has {len(prompt)} tokens and the model {limit} positions, which leaves no room "
                "for an answer; shorten it or set a smaller src_length"
            )
        if min(prompt) < 0 or max(prompt) >= self.engine.vocabulary:
            return f"the prompt has token ids outside the model's vocabulary of {self.engine.vocabulary}"
        return None

    def _row(
        self, index: int, prompt: Sequence[int], options: SamplingOptions, fallback_seed: int, number: int
    ) -> _Row:
        budget = options.max_new_tokens
        if self.engine.max_positions is not None:
            budget = min(budget, self.engine.max_positions - len(prompt))
        stream = TextStream(self._tokenizer.decode, options.stop) if options.stop else None
        # A stop word that is a special token never shows in the text; its id ends the answer.
        ids = [self._tokenizer.encode(word) for word in options.stop]
        specials = [word[0] for word in ids if len(word) == 1 and not self._tokenizer.decode(word)]
        end_ids = frozenset([*self._end_ids, *specials])
        seed = fallback_seed if options.seed is None else options.seed
        sampler = RowSampler(options, prompt, end_ids, seed, number)
        return _Row(index, prompt, options, budget, end_ids, stream, sampler)

    def _steps(self, rows: list[_Row]) -> PythonGenerator[list[_Row], None, None]:
        """Runs one batch; after each step, yields the rows that took part in it."""
        speed, started = self.speed, time.perf_counter()
        try:
            logits = self.engine.prefill([row.prompt for row in rows])
            self._choose(rows, logits)
            spent = time.perf_counter() - started
            speed.prompt_tokens += sum(len(row.prompt) for row in rows)
            speed.prefill_seconds += spent
            speed.first_token_seconds.append(spent)
            while True:
                yield rows
                alive = [place for place, row in enumerate(rows) if row.finish_reason is None]
                if not alive:
                    return
                started = time.perf_counter()
                if len(alive) < len(rows):
                    self.engine.keep(alive)
                    rows = [rows[place] for place in alive]
                self._choose(rows, self.engine.decode([row.tokens[-1] for row in rows]))
                speed.decode_tokens += len(rows)
                speed.decode_seconds += time.perf_counter() - started
        finally:
            self.engine.reset()

    def _choose(self, rows: list[_Row], logits: Logits) -> None:
        """Gives every row its next token."""
        best, highest = logits.argmax()
        simple = all(row.sampler.takes_argmax and not row.options.logprobs for row in rows)
        values = None if simple else logits.numpy()
        for place, row in enumerate(rows):
            row.fresh = ""
            if not np.isfinite(highest[place]):
                row.fail(f"the model's logits are not finite at token {len(row.tokens) + 1} of the answer")
                continue
            token = int(best[place])
            if values is not None:
                token = row.sampler.choose(values[place])
                if row.options.logprobs:
                    row.logprobs.append(log_probability(values[place], token))
            row.accept(token)

    def _completion(self, row: _Row) -> Completion:
        if row.stream is not None:
            row.stream.finish()
            text = row.stream.text
        else:
            text = self._tokenizer.decode(row.tokens[:-1] if row.ended else row.tokens)
        note = None
        if row.finish_reason == "length" and row.budget < row.options.max_new_tokens:
            note = (
                f"the answer was cut at {row.budget} tokens: the model has {self.engine.max_positions} "
                f"positions and the prompt takes {len(row.prompt)}"
            )
        return Completion(
            text=text,
            tokens=tuple(row.tokens),
            finish_reason=row.finish_reason or "length",
            prompt_tokens=len(row.prompt),
            logprobs=tuple(row.logprobs) if row.options.logprobs else None,
            error=row.error,
            note=note,
        )
