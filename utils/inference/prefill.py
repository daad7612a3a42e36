"""Reading prompts into slots: whole, or in chunks between the steps of the answers in the making."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from utils.inference.engine import Logits, alike
from utils.inference.kept import KeptPrefixes
from utils.inference.request import Request, alternatives
from utils.inference.shared_prefixes import WINDOW, SharedPrefix, SharedPrefixes
from utils.inference.slots import Slots

# Tokens of a prompt whose logits are on the host at a time: 128 of a vocabulary of 150,000 take 77 MB.
_WITH_LOGITS = 128


@dataclass(eq=False)
class _Reading:
    """A text on its way into a slot.

    Attributes:
        tokens: of the text.
        owner: whose prompt it is, or the prefix that it becomes.
        prefix: its beginning, which is copied once it is read; None if there is none.
        known: tokens of its beginning that are kept from earlier texts, where these are more than those of a prefix.
        slot: None as long as nothing of it is read.
        done: tokens that are in the slot, or will come with the prefix.
    """

    tokens: Sequence[int]
    owner: Request | SharedPrefix
    prefix: SharedPrefix | None = None
    known: int = 0
    slot: int | None = None
    done: int = 0

    @property
    def is_ready(self) -> bool:
        """Whether it can go on: its prefix is read."""
        return self.slot is not None or self.prefix is None or self.prefix.slot is not None

    @property
    def wants_logprobs(self) -> bool:
        return isinstance(self.owner, Request) and self.owner.options.prompt_logprobs

    def begin_with(self, prefix: SharedPrefix | None, known: int) -> None:
        if prefix is not None and len(prefix.tokens) > known:
            self.prefix, self.known, self.done = prefix, 0, len(prefix.tokens)
        else:
            self.prefix, self.known, self.done = None, known, known


@dataclass(frozen=True)
class Read:
    """Prompts that are read.

    Attributes:
        requests, slots: of the same length.
        logits: after each prompt, [requests, vocabulary].
    """

    requests: list[Request]
    slots: list[int]
    logits: Logits


class Prefill:
    """The prompts that are being read.

    With a limit, each step reads either one chunk of the prompt that came first of those with more than one chunk to
    go, or the rests of as many others as the limit allows, in the order in which they came. The two take turns. So a
    short prompt waits for one chunk of a long one at most, and a long one is never left behind. A chunk begins a
    multiple of the limit after the beginning of what is read, whatever else is read or answered.

    Without a limit a step reads all there is. Models whose whole prompt decides what its beginning means (prefix
    language models) read each prompt whole in any case: there the limit holds for the sum of short prompts alone.
    """

    def __init__(
        self, slots: Slots, prefixes: SharedPrefixes | None, chunk: int | None, kept: KeptPrefixes | None = None
    ) -> None:
        """
        Args:
            prefixes: that prompts have in common; None reads each prompt from its first token on.
            kept: what is known from earlier texts.
            chunk: most tokens of a step; None has no limit.
        """
        self._slots, self._prefixes, self._chunk, self._kept = slots, prefixes, chunk, kept
        self._whole = chunk is None or not slots.engine.shares_prefixes
        self._readings: list[_Reading] = []
        self._long_is_next = False

    @property
    def requests(self) -> list[Request]:
        """Whose prompts are being read."""
        return [reading.owner for reading in self._readings if isinstance(reading.owner, Request)]

    def begin(self, request: Request) -> None:
        """Adds a prompt, of which nothing is read yet."""
        self._readings.append(_Reading(request.prompt, request))

    def read(self, waiting: Collection[Request]) -> Iterator[Read]:
        """One step; yields the prompts that are complete now.

        Args:
            waiting: those whose turn has not come: what they share with the prompts here is read for all of them.
        """
        while picked := self._pick(waiting):
            yield from self._forward(picked)
            if self._chunk is not None:
                break
        self.release(waiting)

    def cancel(self, request: Request, waiting: Collection[Request]) -> None:
        """Forgets a prompt, if it is here, and frees its slot."""
        self._drop([reading for reading in self._readings if reading.owner is request])
        self.release(waiting)

    def release(self, waiting: Collection[Request]) -> None:
        """Frees the prefixes that nobody needs any more."""
        if self._prefixes is None:
            return
        starting = [reading.prefix for reading in self._readings if reading.slot is None and reading.prefix is not None]
        self._prefixes.release([request.prompt for request in waiting], starting)
        self._drop([r for r in self._readings if isinstance(r.owner, SharedPrefix) and not self._prefixes.has(r.owner)])

    def forget(self) -> None:
        """Knows no prompts any more; their slots are freed by who closes all."""
        self._readings = []
        if self._prefixes is not None:
            self._prefixes.forget()

    def _drop(self, readings: Sequence[_Reading]) -> None:
        self._readings = [reading for reading in self._readings if reading not in readings]
        self._slots.free([reading.slot for reading in readings if reading.slot is not None])

    # --- what is read next ----------------------------------------------------------------------------

    def _pick(self, waiting: Collection[Request]) -> list[_Reading]:
        if self._prefixes is not None:
            self._find_prefixes(self._prefixes, waiting)
        ready = [reading for reading in self._readings if reading.is_ready]
        if self._chunk is None:
            return ready
        short = [reading for reading in ready if self._end(reading) == len(reading.tokens)]
        long = [reading for reading in ready if reading not in short]
        if long and (self._long_is_next or not short):
            self._long_is_next = False
            return long[:1]
        self._long_is_next = True
        picked, room = short[:1], self._chunk - sum(self._size(reading) for reading in short[:1])
        for reading in short[1:]:
            room -= self._size(reading)
            if room < 0:
                break
            picked.append(reading)
        return picked

    def _end(self, reading: _Reading) -> int:
        """How far a text is read in the next step."""
        most = len(reading.tokens) if self._whole or self._chunk is None else self._chunk
        if reading.wants_logprobs:
            most = min(most, _WITH_LOGITS) if reading.done else 1
        return min(reading.done + most, len(reading.tokens))

    def _size(self, reading: _Reading) -> int:
        return self._end(reading) - reading.done

    def _find_prefixes(self, prefixes: SharedPrefixes, waiting: Collection[Request]) -> None:
        """Finds out what the texts of which nothing is read yet begin with; adds prefixes that are not read either."""
        starting = [
            reading
            for reading in self._readings
            if reading.slot is None and isinstance(reading.owner, Request) and not reading.wants_logprobs
        ]
        later = [request.prompt for request in islice(waiting, WINDOW) if not request.options.prompt_logprobs]
        for reading in starting:
            others = [other.tokens for other in starting if other is not reading]
            known = self._known(reading)
            reading.begin_with(prefixes.find(reading.tokens, [*others, *later], known), known)
            place = self._readings.index(reading)
            for prefix in prefixes.found_anew():
                self._readings.insert(place, _Reading(prefix.tokens, prefix))
                place += 1
        for reading in self._readings:
            if reading.slot is None and isinstance(reading.owner, SharedPrefix):
                reading.begin_with(reading.owner.parent, self._known(reading))

    def _known(self, reading: _Reading) -> int:
        """How many tokens a text begins with that are kept from earlier ones."""
        known = None if self._kept is None else self._kept.find(reading.tokens)
        return 0 if known is None else known.length

    # --- reading --------------------------------------------------------------------------------------

    def _forward(self, picked: Sequence[_Reading]) -> Iterator[Read]:
        """Reads a part of each of these texts."""
        self._copy_prefixes([reading for reading in picked if reading.slot is None and reading.prefix is not None])
        self._restore([reading for reading in picked if reading.slot is None and reading.known])
        plain = [reading for reading in picked if not reading.wants_logprobs]
        new = [reading for reading in plain if reading.slot is None]
        begun = [reading for reading in plain if reading.slot is not None]
        for group in self._groups(new):
            slots, logits = self._slots.open([self._part(reading) for reading in group])
            for reading, slot in zip(group, slots, strict=True):
                reading.slot = slot
            yield from self._advanced(group, logits)
        for group in self._groups(begun):
            slots = [reading.slot for reading in group if reading.slot is not None]
            logits = self._slots.advance(slots, [self._part(reading) for reading in group], last=True)
            yield from self._advanced(group, logits)
        for reading in picked:
            if reading.wants_logprobs:
                yield from self._advanced([reading], self._with_logprobs(reading))

    def _groups(self, readings: Sequence[_Reading]) -> list[list[_Reading]]:
        """Those that are read by one forward: in small steps padding counts."""
        if self._chunk is None:
            return [list(readings)] if readings else []
        groups = alike([self._size(reading) for reading in readings], self._chunk)
        return [[readings[number] for number in group] for group in groups]

    def _part(self, reading: _Reading) -> Sequence[int]:
        return reading.tokens[reading.done : self._end(reading)]

    def _copy_prefixes(self, readings: Sequence[_Reading]) -> None:
        alike: dict[SharedPrefix, list[_Reading]] = {}
        for reading in readings:
            if reading.prefix is not None:
                alike.setdefault(reading.prefix, []).append(reading)
        for prefix, group in alike.items():
            assert prefix.slot is not None
            for reading, slot in zip(group, self._slots.fork(prefix.slot, len(group)), strict=True):
                reading.slot = slot
                if isinstance(reading.owner, Request):
                    reading.owner.cached_tokens = len(prefix.tokens) - prefix.claim()

    def _restore(self, readings: Sequence[_Reading]) -> None:
        """Gives slots to texts whose beginning is kept from earlier ones."""
        if self._kept is None or not readings:
            return
        found = [self._kept.find(reading.tokens) for reading in readings]
        states = [known.states for known in found if known is not None]
        slots = self._slots.restore([reading.tokens[: reading.known] for reading in readings], states)
        for reading, slot in zip(readings, slots, strict=True):
            reading.slot = slot
            if isinstance(reading.owner, Request):
                reading.owner.cached_tokens = reading.known
            else:
                reading.owner.known = reading.known

    def _advanced(self, readings: Sequence[_Reading], logits: Logits) -> Iterator[Read]:
        """Notes how far texts are read; yields the prompts that are complete."""
        for reading in readings:
            reading.done = self._end(reading)
        complete = [row for row, reading in enumerate(readings) if reading.done == len(reading.tokens)]
        rows, requests, slots = [], [], []
        for row in complete:
            owner, slot = readings[row].owner, readings[row].slot
            assert slot is not None
            self._readings.remove(readings[row])
            if isinstance(owner, SharedPrefix):
                owner.slot = slot
            else:
                rows.append(row)
                requests.append(owner)
                slots.append(slot)
        if rows:
            yield Read(requests, slots, logits.take(rows))

    def _with_logprobs(self, reading: _Reading) -> Logits:
        """Reads a part of a prompt and notes the log-probability of each of its tokens but the first."""
        part = list(self._part(reading))
        if reading.slot is None:
            (reading.slot,), logits = self._slots.open([part])
        else:
            logits = self._slots.advance([reading.slot], [part])
        assert isinstance(reading.owner, Request)
        following = reading.tokens[reading.done + 1 : reading.done + len(part) + 1]
        for values, token in zip(logits.numpy(), following, strict=False):
            own, others = alternatives(values, token, reading.owner.options.top_logprobs)
            reading.owner.prompt_logprobs.append(own)
            reading.owner.prompt_top_logprobs.append(others)
        return logits.take([len(part) - 1])
