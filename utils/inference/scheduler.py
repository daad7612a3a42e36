"""The one loop behind all answers: requests come and go while others run, each step moves all on."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Protocol

from utils.errors import UserError
from utils.inference.beams import BeamSearch
from utils.inference.constraint import Constraint
from utils.inference.engine import Engine, Logits
from utils.inference.grammar import Grammar
from utils.inference.kept import KeptPrefixes
from utils.inference.prefill import Prefill
from utils.inference.request import Alternatives, Answer, Completion, PlainAnswer, Request, views
from utils.inference.sampling import SamplingOptions
from utils.inference.shared_prefixes import SharedPrefixes
from utils.inference.slots import Slots
from utils.inference.text import TextStream, whole_text


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    eos_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


_REMEMBERED = 64  # lists of stop words: all answers of a request have the same


@dataclass
class Speed:
    """Time and real tokens (no padding) of everything generated so far. Times in seconds.

    Attributes:
        load_seconds: until the generator was ready, if it was loaded from files.
        prompt_tokens, prefill_seconds: of the forwards that read prompts.
        shared_tokens: those of `prompt_tokens` that were copied from another prompt instead of read.
        decode_tokens, decode_seconds: tokens of answers (of beams, of one) by all further forwards.
        drafted_tokens, accepted_tokens: guessed by prompt lookup, and how many of them were right.
        first_token_seconds: of each time that prompts were complete, since the first of them was opened.
    """

    load_seconds: float = 0.0
    prompt_tokens: int = 0
    shared_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    first_token_seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Event:
    """What one step brought to one request.

    Attributes:
        request: what `submit` returned.
        opened: its turn has come: it waits no longer, and its prompt is read from the next step on.
        text: new text: whole characters, and nothing that may turn out to be a stop word. Empty until
            the end for beams and for requests that do not stream.
        tokens: new tokens; of beams, all of them at the end.
        logprobs, top_logprobs: of these tokens, if asked for; see `Completion`.
        completion: the whole answer, once it is complete; the last event of the request.
    """

    request: Request
    text: str = ""
    tokens: tuple[int, ...] = ()
    completion: Completion | None = None
    opened: bool = False
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[Alternatives, ...] = ()


class Scheduler:
    """Runs requests on an engine: `submit` any time, `step` until `busy` is false, `close` in the end.

    The first event of a request says that it is opened, unless it cannot be answered at all.

    At most `batch_size` slots work at a time; when an answer is complete, the next prompt that waits
    takes its place. Requests are answered in the order in which they came, and the answers do not
    depend on what runs beside them. Not for use by several threads at once.

    Attributes:
        speed: figures, counted on by every step.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Decoder,
        end_ids: Collection[int] | None = None,
        batch_size: int = 8,
        *,
        speed: Speed | None = None,
        share_prefixes: bool = True,
        prefill_chunk: int | None = None,
        prompt_cache_bytes: int = 0,
        constrain: Callable[[Grammar], Constraint] | None = None,
    ) -> None:
        """
        Args:
            engine: whose slots may also be in use by others.
            tokenizer: of the engine's model.
            end_ids: tokens that end an answer; None takes the tokenizer's.
            batch_size: most slots that work at a time. A search with more beams runs alone.
            speed: where to count; None starts anew.
            share_prefixes: read what prompts have in common once, if the engine can copy it.
            prefill_chunk: most tokens of prompts that are read in one step, so that a long prompt does not hold up
                other answers; see `Prefill`. None reads prompts whole, all that there are places for.
            prompt_cache_bytes: most memory for what the model keeps of prompts and answers when they are complete, so
                that later prompts which begin alike need not read that again, if the engine can copy it.
            constrain: begins an answer of a form; it raises a UserError for one that it does not know. None: no
                answer can be asked to have a form.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: expected at least 1")
        if prefill_chunk is not None and prefill_chunk < 1:
            raise ValueError(f"prefill_chunk is {prefill_chunk}: expected at least 1")
        self.speed = Speed() if speed is None else speed
        self._engine = engine
        self._tokenizer = tokenizer
        self._end_ids = tokenizer.eos_ids if end_ids is None else tuple(end_ids)
        self._batch_size = batch_size
        self._slots = Slots(engine)
        self._constrain = constrain
        self._special_ids = lru_cache(maxsize=_REMEMBERED)(partial(_special_ids, tokenizer))
        shares = share_prefixes and engine.shares_prefixes
        self._kept = KeptPrefixes(self._slots, prompt_cache_bytes) if shares and prompt_cache_bytes else None
        self._prefill = Prefill(self._slots, SharedPrefixes(self._slots) if shares else None, prefill_chunk, self._kept)
        self._waiting: deque[Request] = deque()
        self._refused: list[Request] = []
        self._live: list[Answer] = []
        self._has_read = False  # since all answers have moved on

    @property
    def engine(self) -> Engine:
        """Whose slots it uses."""
        return self._engine

    @property
    def busy(self) -> bool:
        """Whether any request is unanswered."""
        return bool(self.waiting or self.running)

    @property
    def running(self) -> int:
        """How many requests are being answered, or their prompts read."""
        return len(self._live) + len(self._prefill.requests)

    @property
    def waiting(self) -> int:
        """How many requests wait for a place."""
        return len(self._waiting) + len(self._refused)

    def submit(
        self, prompt: Sequence[int], options: SamplingOptions, *, number: int = 0, stream: bool = False
    ) -> Request:
        """Adds a request. One that cannot be answered gets a completion with an error from the next step.

        Args:
            prompt: token ids.
            options: how to answer.
            number: what the random numbers depend on beside the seed.
            stream: whether events should hold text before the answer is complete.

        Returns:
            The handle that events name and that `cancel` takes.
        """
        budget, note = options.max_new_tokens, None
        limit = self._engine.max_positions
        if limit is not None and limit - len(prompt) < budget:
            budget = limit - len(prompt)
            note = (
                f"the answer was cut at {budget} tokens: the model has {limit} "
                f"positions and the prompt takes {len(prompt)}"
            )
        request = Request(
            list(prompt),
            options,
            secrets.randbits(64) if options.seed is None else options.seed,
            number,
            budget,
            frozenset(
                [*(() if options.ignore_eos else self._end_ids), *options.stop_ids, *self._special_ids(options.stop)]
            ),
            TextStream(self._tokenizer.decode, options.stop) if options.stop or stream else None,
            note=note,
        )
        fault = self._fault(prompt, options)
        if fault is None and options.grammar is not None and self._constrain is not None:
            try:
                request.constraint = self._constrain(options.grammar)
            except UserError as error:
                fault = str(error)
        if fault is None:
            self._waiting.append(request)
        else:
            request.fail(fault)
            self._refused.append(request)
        return request

    @property
    def cache_bytes(self) -> int:
        """Memory in use for keys and values: of answers in the making, and of what is kept."""
        kept = 0 if self._kept is None else self._kept.nbytes
        texts = [(slot, answer.request) for answer in self._live for slot in answer.slots()]
        tokens = sum(len(request.prompt) + len(request.tokens) for _, request in texts)
        return kept + (self._engine.kept_bytes(texts[0][0], tokens) if texts else 0)

    def step(self) -> list[Event]:
        """One of three: gives free places to requests that wait, reads prompts, or moves every answer on.

        After each reading all answers move on before the next one. Places are given at once, and that is told before
        anything is read, which may take its time. When the engine raises an error, it comes out of here, and all that
        is left to do is `close`.
        """
        if events := self._admit():
            return events
        if self._prefill.requests and not (self._live and self._has_read):
            self._has_read = True
            return self._read()
        self._has_read = False
        return self._advance() if self._live else []

    def cancel(self, request: Request) -> None:
        """Forgets a request and frees its slots; there are no more events of it. Any time, any number of times."""
        if request in self._waiting:
            self._waiting.remove(request)
        self._prefill.cancel(request, self._waiting)
        self._refused = [one for one in self._refused if one is not request]
        for answer in [answer for answer in self._live if answer.request is request]:
            self._live.remove(answer)
            self._slots.free(answer.slots())

    def close(self) -> None:
        """Forgets all requests and frees all slots."""
        self._waiting.clear()
        self._refused, self._live = [], []
        self._prefill.forget()
        if self._kept is not None:
            self._kept.clear()
        self._slots.close()

    def _fault(self, prompt: Sequence[int], options: SamplingOptions) -> str | None:
        """What keeps a prompt from being answered."""
        limit, vocabulary = self._engine.max_positions, self._engine.vocabulary
        if not len(prompt):
            return "the prompt is empty"
        if limit is not None and len(prompt) + min(options.max_new_tokens, 1) > limit:
            return (
                f"the prompt has {len(prompt)} tokens and the model {limit} positions, which leaves no room "
                "for an answer; shorten it or set a smaller src_length"
            )
        named = {
            "the prompt": prompt,
            "logit_bias": [token for token, _ in options.logit_bias],
            "stop_ids": options.stop_ids,
        }
        for name, tokens in named.items():
            if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
                return f"{name} has token ids outside the model's vocabulary of {vocabulary}"
        if options.prompt_logprobs and not self._engine.shares_prefixes:
            return "prompt_logprobs: this model reads a prompt as a whole, so that no token of it follows from others"
        if options.grammar is not None and self._constrain is None:
            return "grammar: answers of a given form are not available here"
        return None

    def _advance(self) -> list[Event]:
        """One forward for all texts in the making."""
        started, speed = time.perf_counter(), self.speed
        answers, fed = self._live, [answer.feed() for answer in self._live]
        flat = [text for texts in fed for text in texts]
        logits = self._slots.advance([slot for slot, _ in flat], [tokens for _, tokens in flat])
        events = self._give(answers, logits, [[len(tokens) for _, tokens in texts] for texts in fed])
        speed.decode_tokens += sum(1 if answer.request.places > 1 else 0 for answer in answers)
        speed.decode_tokens += sum(len(event.tokens) for event in events if event.request.places == 1)
        speed.decode_seconds += time.perf_counter() - started
        return events

    def _admit(self) -> list[Event]:
        """Gives the places that are free to requests that wait; also tells of those that cannot be answered."""
        events = [self._event(request, "", 0) for request in self._refused]
        self._refused = []
        taken = [answer.request.places for answer in self._live]
        taken += [request.places for request in self._prefill.requests]
        free, alone = self._batch_size - sum(taken), not taken
        while self._waiting and (self._waiting[0].places <= free or alone):
            request = self._waiting.popleft()
            free, alone = free - request.places, False
            request.opened = time.perf_counter()
            self._prefill.begin(request)
            events.append(Event(request, opened=True))
        return events

    def _read(self) -> list[Event]:
        """Reads prompts; those that are complete get their first tokens."""
        started, speed = time.perf_counter(), self.speed
        events, done = [], []
        for read in self._prefill.read(self._waiting):
            answers: list[Answer] = []
            for request, slot in zip(read.requests, read.slots, strict=True):
                if self._kept is not None:
                    self._kept.store(slot, request.prompt)
                kind = BeamSearch if request.places > 1 else PlainAnswer
                answers.append(kind(request, slot, self._slots))
            self._live += answers
            done += read.requests
            events += self._give(answers, read.logits, [[1] for _ in answers])
        ended = time.perf_counter()
        speed.prompt_tokens += sum(len(request.prompt) for request in done)
        speed.shared_tokens += sum(request.cached_tokens for request in done)
        speed.prefill_seconds += ended - started
        if done:
            speed.first_token_seconds.append(ended - min(request.opened for request in done))
        return events

    def _give(self, answers: Sequence[Answer], logits: Logits, counts: Sequence[Sequence[int]]) -> list[Event]:
        """Hands each answer the logits of its texts; `counts` are their tokens."""
        flat = [count for texts in counts for count in texts]
        whole = [answer.needs_values for answer, texts in zip(answers, counts, strict=True) for _ in texts]
        found = iter(views(logits, flat, whole))
        events = []
        for answer, texts in zip(answers, counts, strict=True):
            request = answer.request
            said, known = request.text.text if request.text else "", len(request.tokens)
            own = [next(found) for _ in texts]
            if request.budget:
                answer.take(own)
            else:
                request.finish_reason = "length"  # only the prompt was asked for
            if isinstance(answer, PlainAnswer):
                self.speed.drafted_tokens += answer.drafted
                self.speed.accepted_tokens += answer.accepted
                answer.drafted = answer.accepted = 0
            if request.finish_reason is not None:
                self._keep(answer)
                self._slots.free(answer.slots())
            events.append(self._event(request, said, known))
        self._live = [answer for answer in self._live if answer.request.finish_reason is None]
        return events

    def _keep(self, answer: Answer) -> None:
        """Keeps a complete answer and its prompt: the next prompt of a chat begins with them."""
        request = answer.request
        if self._kept is not None and isinstance(answer, PlainAnswer) and request.error is None:
            (slot,) = answer.slots()
            self._kept.store(slot, [*request.prompt, *request.tokens[:-1]])  # the last token is not in the slot

    def _event(self, request: Request, said: str, known: int) -> Event:
        """What is new since `said` was the text and `known` the number of tokens."""
        completion = None
        if request.finish_reason is not None:
            if request.text is not None:
                request.text.finish()
            completion = self._completion(request)
        text = request.text.text[len(said) :] if request.text is not None else ""
        tokens, logprobs = tuple(request.tokens[known:]), tuple(request.logprobs[known:])
        others = tuple(request.top_logprobs[known:]) if request.options.top_logprobs else ()
        return Event(request, text, tokens, completion, False, logprobs, others)

    def _completion(self, request: Request) -> Completion:
        if request.text is not None:
            text = request.text.text
        else:
            text = whole_text(self._tokenizer.decode, request.tokens[:-1] if request.ended else request.tokens)
        asked = request.options
        return Completion(
            text=text,
            tokens=tuple(request.tokens),
            finish_reason=request.finish_reason or "length",
            prompt_tokens=len(request.prompt),
            logprobs=tuple(request.logprobs) if asked.logprobs else None,
            top_logprobs=tuple(request.top_logprobs) if asked.top_logprobs else None,
            error=request.error,
            note=request.note if request.finish_reason == "length" else None,
            cached_tokens=request.cached_tokens,
            prompt_logprobs=tuple(request.prompt_logprobs) if asked.prompt_logprobs else None,
            prompt_top_logprobs=tuple(request.prompt_top_logprobs)
            if asked.prompt_logprobs and asked.top_logprobs
            else None,
        )


def _special_ids(tokenizer: Decoder, words: Sequence[str]) -> list[int]:
    """Those of stop words that are special tokens: these never show in the text; their ids end the answer."""
    found = [tokenizer.encode(word) for word in words]
    return [ids[0] for ids in found if len(ids) == 1 and not tokenizer.decode(ids)]
