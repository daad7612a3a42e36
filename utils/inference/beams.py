"""Beam search: several texts of one prompt grow together, and the likeliest whole one is the answer.

The rules are those of Hugging Face's beam search without sampling, as transformers 4.57.6 has them:

- A candidate's total is the sum of its tokens' log-probabilities, after penalties. Each step looks at
  twice as many of the best candidates as there are beams (more, if there are several end tokens).
- A candidate that ends among the best `num_beams` is complete: its score is
  total / length ** length_penalty, the end token counted. The best `num_beams` of these are kept. Other
  candidates that end are dropped; of those that go on, the best `num_beams` become the next beams.
- At the length limit the beams count as complete, and the search ends.
- Before, with `early_stopping` the search ends when `num_beams` answers are complete; otherwise when,
  besides, no beam scores better than the worst of them at the present length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from utils.inference.request import Alternatives, Answer, Request, View, alternatives, not_finite
from utils.inference.sampling import History, likeliest, log_softmax
from utils.inference.slots import Slots
from utils.inference.text import TextStream


@dataclass
class _Beam:
    """One text. Its slot holds all tokens but the last; None once it is complete."""

    slot: int | None
    total: float
    history: History
    text: TextStream | None
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[Alternatives]


@dataclass
class _Candidate:
    """A beam and one more token."""

    parent: int
    token: int
    total: float


@dataclass
class _Complete:
    """A whole answer in the pool."""

    score: float
    beam: _Beam
    reason: str
    ended: bool


class BeamSearch(Answer):
    """The search for the likeliest answer to one prompt."""

    def __init__(self, request: Request, slot: int, slots: Slots) -> None:
        options = request.options
        history = History(options, request.prompt, request.end_ids)
        self.request = request
        self._slots = slots
        self._beams = [_Beam(slot, 0.0, history, request.text, [], [], [])]
        self._pool: list[_Complete] = []
        self._width = options.num_beams
        self._candidates = max(2, 1 + len(request.end_ids)) * options.num_beams

    @property
    def needs_values(self) -> bool:
        return True

    def feed(self) -> list[tuple[int, list[int]]]:
        return [(beam.slot, beam.tokens[-1:]) for beam in self._beams if beam.slot is not None]

    def slots(self) -> list[int]:
        return [beam.slot for beam in self._beams if beam.slot is not None]

    def take(self, found: Sequence[View]) -> None:
        if not all(view.is_sound(0) for view in found):
            self.request.fail(not_finite(len(self._beams[0].tokens) + 1))
            return
        candidates = self._best(found)
        chosen: list[_Candidate] = []
        for rank, candidate in enumerate(candidates):
            reason, text = self._ending(candidate)
            if reason:
                if rank < self._width:
                    beam = self._grown(candidate, found, text)
                    self._complete(beam, "stop", ended=candidate.token in self.request.end_ids)
            elif len(chosen) < self._width:
                chosen.append(candidate)
        length = len(self._beams[0].tokens) + 1
        self._go_on([(candidate, self._grown(candidate, found, None)) for candidate in chosen])
        if length >= self.request.budget or not chosen:
            for beam in self._beams:
                self._complete(beam, "length", ended=False)
            self._finish()
        elif self._is_done(length):
            self._finish()

    def _best(self, found: Sequence[View]) -> list[_Candidate]:
        """The best candidates, best first; of equal ones the earlier beam, then the lower token."""
        candidates = []
        for number, (beam, view) in enumerate(zip(self._beams, found, strict=True)):
            assert view.values is not None
            scores = log_softmax(view.values[0])
            if beam.history.changes_logits:
                scores = beam.history.penalised(scores)
            candidates += [
                _Candidate(number, token, beam.total + score)
                for token, score in likeliest(scores, self._candidates)
                if score > -float("inf")
            ]
        candidates.sort(key=lambda candidate: (-candidate.total, candidate.parent, candidate.token))
        return candidates[: self._candidates]

    def _ending(self, candidate: _Candidate) -> tuple[bool, TextStream | None]:
        """(whether a candidate's token completes the answer, the text if a stop word does)."""
        if candidate.token in self.request.end_ids:
            return True, None
        parent = self._beams[candidate.parent]
        text = parent.text
        if text is None or not self.request.options.stop:
            return False, None
        text = text.copy()
        text.push(candidate.token, may_stop=self.request.may_stop(len(parent.tokens) + 1))
        return text.stopped, text

    def _grown(self, candidate: _Candidate, found: Sequence[View], text: TextStream | None) -> _Beam:
        """The text of a candidate, without a slot yet; `text` if that is known already."""
        parent, token, options = self._beams[candidate.parent], candidate.token, self.request.options
        history = parent.history.copy()
        history.accept(token)
        if text is None and parent.text is not None:
            text = parent.text.copy()
            if token not in self.request.end_ids:
                text.push(token, may_stop=self.request.may_stop(len(parent.tokens) + 1))
        logprobs, top_logprobs = parent.logprobs, parent.top_logprobs
        values = found[candidate.parent].values
        if options.logprobs and values is not None:
            own, others = alternatives(values[0], token, options.top_logprobs)
            logprobs, top_logprobs = [*logprobs, own], [*top_logprobs, others]
        return _Beam(None, candidate.total, history, text, [*parent.tokens, token], logprobs, top_logprobs)

    def _go_on(self, grown: Sequence[tuple[_Candidate, _Beam]]) -> None:
        """Makes these the beams: the first child of a beam takes its slot, others get copies of it."""
        unused = dict(enumerate(self.slots()))
        slots = dict(unused)
        for candidate, beam in grown:
            beam.slot = unused.pop(candidate.parent, None)
            if beam.slot is None:
                (beam.slot,) = self._slots.fork(slots[candidate.parent])
        self._slots.free(list(unused.values()))
        self._beams = [beam for _, beam in grown]

    def _complete(self, beam: _Beam, reason: str, *, ended: bool) -> None:
        """Adds an answer to the pool, which keeps the best `num_beams`; of equal ones the earlier."""
        score = beam.total / len(beam.tokens) ** self.request.options.length_penalty
        self._pool.append(_Complete(score, beam, reason, ended))
        self._pool.sort(key=lambda one: -one.score)
        del self._pool[self._width :]

    def _is_done(self, length: int) -> bool:
        if len(self._pool) < self._width:
            return False
        options, best = self.request.options, self._beams[0].total  # they stand in order
        return options.early_stopping or self._pool[-1].score >= best / length**options.length_penalty

    def _finish(self) -> None:
        best, request = self._pool[0], self.request
        request.tokens, request.text = best.beam.tokens, best.beam.text
        request.logprobs, request.top_logprobs = best.beam.logprobs, best.beam.top_logprobs
        request.finish_reason, request.ended = best.reason, best.ended
