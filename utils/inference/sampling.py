"""Choosing the next token from logits: penalties, filters and one random number per token.

Plain numpy on one row at a time. A row's choices depend on its own logits, history and seed alone,
so its text is the same in any batch. The order of the steps is: the form of the answer, bias,
repetition penalty, presence and frequency penalty, repeated n-grams, minimum length, temperature,
top-k, top-p, min-p, draw.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.errors import raise_if
from utils.inference.constraint import Constraint
from utils.inference.grammar import Grammar

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]
Alternatives = tuple[tuple[int, float], ...]  # tokens at one place, the likeliest first, with their log-probabilities

# top-p looks at this many of the likeliest tokens, then at 8 times as many, and so on, before it sorts
# the whole vocabulary.
TOP_P_HEAD = 1024
DRAW_BLOCK = 256
_BEHIND_IDS = 2**32
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIXING = tuple(
    (np.uint64(shift), np.uint64(factor)) for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
)
MOST_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingOptions:
    """How the tokens of one answer are chosen.

    Attributes:
        max_new_tokens: most tokens to generate, the end token included; 0 only with `prompt_logprobs`.
        min_new_tokens: tokens to generate before an end token may be chosen, or a text of `stop` ends the answer.
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k likeliest tokens; 1 is greedy, 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities add up to p (Holtzman et al. 2020).
        min_p: keep tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024).
        repetition_penalty: see `penalise_repetition`.
        presence_penalty, frequency_penalty: see `penalise_presence`.
        no_repeat_ngram_size: no sequence of n tokens occurs twice, prompt included; 0 allows all.
        seed: of the random numbers; None draws a fresh one. Row number and seed together decide.
        logit_bias: (token id, what is added to its logit); also a search with beams and greedy answers heed it.
        stop: texts that end the answer; they are not part of it.
        stop_ids: more tokens that end the answer; their text is not part of it.
        ignore_eos: the model's end tokens do not end the answer.
        grammar: the form that the answer must have; None is free.
        logprobs: also return the log-probability of each token under the model's own softmax.
        top_logprobs: also return that many of the likeliest tokens at each place, as OpenAI's API does.
        prompt_logprobs: return the same of the prompt's tokens, all but the first.
        num_beams: above 1 searches for the likeliest answer with that many texts at a time; see `beams`.
        length_penalty: a beam's score is its summed log-probability / length ** length_penalty.
        early_stopping: end the search as soon as num_beams answers are complete.
        prompt_lookup_num_tokens: most tokens guessed from earlier text and verified in one forward; see
            `lookup`. It changes the speed, never the text; 0 is off.

    Raises:
        UserError: values out of range, all named together.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 1
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    grammar: Grammar | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    prompt_lookup_num_tokens: int = 0

    def __post_init__(self) -> None:
        texts = not isinstance(self.stop, str) and all(isinstance(word, str) and word for word in self.stop)
        fewest = 0 if self.prompt_logprobs else 1
        ranks = 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS
        rules = [
            (self.max_new_tokens >= fewest, "max_new_tokens", f"at least {fewest}"),
            (0 <= self.min_new_tokens <= self.max_new_tokens, "min_new_tokens", "from 0 to max_new_tokens"),
            (0 <= self.temperature < np.inf, "temperature", "0 (greedy) or more"),
            (self.top_k >= 0, "top_k", "0 (off), 1 (greedy) or more"),
            (0 <= self.top_p <= 1, "top_p", "from 0 to 1"),
            (0 <= self.min_p <= 1, "min_p", "from 0 to 1"),
            (1e-6 <= self.repetition_penalty <= 1e6, "repetition_penalty", "from 1e-6 to 1e6 (1 is off)"),
            (abs(self.presence_penalty) <= 1e6, "presence_penalty", "from -1e6 to 1e6"),
            (abs(self.frequency_penalty) <= 1e6, "frequency_penalty", "from -1e6 to 1e6"),
            (self.no_repeat_ngram_size >= 0, "no_repeat_ngram_size", "0 (off) or more"),
            (self.seed is None or 0 <= self.seed < 2**64, "seed", "from 0 to 2**64 - 1"),
            (_are_biases(self.logit_bias), "logit_bias", "pairs of a token id and a number from -1e6 to 1e6"),
            (texts, "stop", "a list of texts that are not empty"),
            (all(_is_id(token) for token in self.stop_ids), "stop_ids", "token ids"),
            (ranks, "top_logprobs", f"from 0 to {MOST_TOP_LOGPROBS}"),
            (self.logprobs or not self.top_logprobs, "top_logprobs", "0 without logprobs"),
            (1 <= self.num_beams <= 1024, "num_beams", "from 1 to 1024"),
            (abs(self.length_penalty) <= 50, "length_penalty", "from -50 to 50"),
            (self.prompt_lookup_num_tokens >= 0, "prompt_lookup_num_tokens", "0 (off) or more"),
            (
                self.num_beams == 1 or (self.greedy and not self.prompt_lookup_num_tokens),
                "num_beams",
                "1 together with sampling or prompt_lookup_num_tokens",
            ),
            (self.num_beams == 1 or self.grammar is None, "num_beams", "1 together with grammar"),
        ]
        raise_if([f"{name} is {getattr(self, name)!r}: expected {text}" for ok, name, text in rules if not ok])
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        object.__setattr__(self, "logit_bias", tuple((token, float(bias)) for token, bias in self.logit_bias))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.top_k == 1 or self.temperature == 0

    @property
    def changes_logits(self) -> bool:
        """Whether any penalty or bias is on."""
        return (
            bool(self.logit_bias)
            or self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.no_repeat_ngram_size > 0
        )


def _is_id(token: object) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and token >= 0


def _are_biases(pairs: Sequence[tuple[int, float]]) -> bool:
    """Whether these are numbers to add to the logits of tokens."""
    return all(
        len(pair) == 2 and _is_id(pair[0]) and isinstance(pair[1], (int, float)) and abs(pair[1]) <= 1e6
        for pair in pairs
    )


# --- penalties: each changes `scores` [vocabulary] in place ------------------------------------------


def penalise_repetition(scores: Floats, seen: Ids, penalty: float) -> None:
    """Divides the scores of tokens that already occurred by `penalty` (CTRL, Keskar et al. 2019, 4.1).

    Negative scores are multiplied instead: the paper's division would make those tokens likelier.

    Args:
        scores: [vocabulary] float64.
        seen: distinct ids of the prompt and of the answer so far.
        penalty: above 1 discourages, below 1 encourages.
    """
    found = scores[seen]
    scores[seen] = np.where(found > 0, found / penalty, found * penalty)


def penalise_presence(scores: Floats, ids: Ids, counts: Ids, presence: float, frequency: float) -> None:
    """score -= count * frequency + (count > 0) * presence, as the OpenAI API defines the two.

    Args:
        scores: [vocabulary] float64.
        ids: distinct ids of the answer so far (the prompt does not count).
        counts: how often each of `ids` was chosen.
    """
    scores[ids] -= counts * frequency + presence


# --- filters: each returns the lowest value that stays -----------------------------------------------


def top_k_threshold(scores: Floats, k: int) -> float:
    """The k-th largest score; equal scores stay together, so the choice never depends on order."""
    return float(np.partition(scores, -k)[-k]) if 0 < k < scores.size else -np.inf


def top_p_threshold(probabilities: Floats, p: float) -> float:
    """The smallest probability in the smallest set of likeliest tokens whose sum reaches `p`."""
    size = min(TOP_P_HEAD, probabilities.size)
    while True:
        head = np.sort(np.partition(probabilities, -size)[-size:])[::-1]
        mass = np.cumsum(head)
        if mass[-1] >= p or size == probabilities.size:
            return float(head[min(int(np.searchsorted(mass, p)), size - 1)])
        size = min(8 * size, probabilities.size)


def softmax(scores: Floats) -> Floats:
    """Probabilities of scores; -inf gives 0."""
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def filtered_probabilities(scores: Floats, options: SamplingOptions) -> tuple[Ids, Floats]:
    """The distribution that a token is drawn from.

    Args:
        scores: [vocabulary] float64 with at least one finite value.
        options: temperature (above 0), top_k, top_p and min_p are used, in this order.

    Returns:
        (ids ascending, their probabilities, which sum to 1).
    """
    scores = (scores - scores.max()) / options.temperature
    lowest_score = max(top_k_threshold(scores, options.top_k), float(np.finfo(np.float64).min))
    if scores.min() >= lowest_score:  # all stay: taking them one by one takes as long as the rest
        ids, probabilities = np.arange(scores.size), softmax(scores)
    else:
        ids = np.flatnonzero(scores >= lowest_score)
        probabilities = softmax(scores[ids])
    lowest = options.min_p * float(probabilities.max())
    if options.top_p < 1:
        lowest = max(lowest, top_p_threshold(probabilities, options.top_p))
    if lowest > 0:
        kept = probabilities >= lowest
        ids, probabilities = ids[kept], probabilities[kept]
        probabilities = probabilities / probabilities.sum()
    return ids, probabilities


def draw(ids: Ids, probabilities: Floats, key: int) -> int:
    """Each id with its probability: first a block of neighbouring ids, then one of them, both as `_winner` does.

    Args:
        ids: [n], rising.
        probabilities: [n] of these; they need not sum to 1.
        key: of the random numbers, below 2**64.
    """
    # all ids at once would take far longer
    starts = np.unique(np.searchsorted(ids, np.arange(0, ids[-1] + 1, DRAW_BLOCK)))
    chosen = _winner(_BEHIND_IDS + ids[starts] // DRAW_BLOCK, np.add.reduceat(probabilities, starts), key)
    begin, end = [*starts, ids.size][chosen : chosen + 2]
    return int(ids[begin + _winner(ids[begin:end], probabilities[begin:end], key)])


def _winner(numbers: Ids, weights: Floats, key: int) -> int:
    """The place of the first in a race where each arrives after an exponential time, divided by its weight.

    So each wins with a chance in proportion to its weight. Other last digits of the weights, as another batch gives
    them, make another one win only where two arrive at nearly the same time. At a place in the running sum, they would
    move all borders, and in the long tail of a vocabulary these are as close to each other as that.

    Args:
        numbers: of those who run; with the key each decides a time, whoever else runs.
    """
    # the sequence that begins with the key, at these places: SplitMix64, Steele et al. 2014
    bits = numbers.astype(np.uint64) * _GOLDEN + np.array([key], dtype=np.uint64)
    for shift, factor in _MIXING:
        bits = (bits ^ (bits >> shift)) * factor
    bits ^= bits >> np.uint64(31)
    uniform = ((bits >> np.uint64(12)) + 0.5) * 2.0**-52  # neither 0 nor 1
    return int((weights / -np.log(uniform)).argmax())


def log_softmax(logits: NDArray[np.float32]) -> Floats:
    """log softmax(logits) of one row [vocabulary]."""
    scores = logits.astype(np.float64)
    scores -= scores.max()
    return scores - np.log(np.exp(scores).sum())


def likeliest(scores: Floats, count: int) -> list[tuple[int, float]]:
    """The `count` best tokens of a row and their scores, best first; of equal ones the lower id."""
    count = min(count, scores.size)
    if count < 1:
        return []
    ids = np.flatnonzero(scores >= np.partition(scores, -count)[-count])
    order = np.lexsort((ids, -scores[ids]))[:count]
    return [(int(token), float(scores[token])) for token in ids[order]]


class History:
    """A text as penalties see it: which tokens occurred, how often the answer has each, and n-grams."""

    def __init__(self, options: SamplingOptions, prompt: Sequence[int], end_ids: Collection[int]) -> None:
        """
        Args:
            options: which penalties are on.
            prompt: ids before the answer; they count for repetition penalty and n-grams.
            end_ids: tokens that end an answer.
        """
        self.length = 0
        self._options = options
        self._end_ids = np.array(sorted(end_ids), dtype=np.int64)
        self._biased = np.array([token for token, _ in options.logit_bias], dtype=np.int64)
        self._biases = np.array([bias for _, bias in options.logit_bias], dtype=np.float64)
        self._counts: dict[int, int] = {}
        self._seen = dict.fromkeys(prompt)
        self._ngrams: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._recent: tuple[int, ...] = ()
        for token in prompt if options.no_repeat_ngram_size else ():
            self._note_ngram(token)

    @property
    def changes_logits(self) -> bool:
        """Whether `penalised` may change anything now."""
        return self._options.changes_logits or self.length < self._options.min_new_tokens

    def copy(self) -> History:
        """A history that goes on from here on its own."""
        other = copy.copy(self)
        other._counts, other._seen, other._ngrams = dict(self._counts), dict(self._seen), dict(self._ngrams)
        return other

    def accept(self, token: int) -> None:
        """Adds a token of the answer."""
        self.length += 1
        if self._options.changes_logits:
            self._seen[token] = None
            self._counts[token] = self._counts.get(token, 0) + 1
            if self._options.no_repeat_ngram_size:
                self._note_ngram(token)

    def penalised(self, scores: Floats) -> Floats:
        """Scores [vocabulary] after bias and all penalties.

        When penalties leave no token at all (every one would repeat an n-gram), they are put aside.
        """
        scores, options = scores.copy(), self._options
        np.add.at(scores, self._biased, self._biases)  # a token may be named twice
        before, scores = scores, scores.copy()
        if options.repetition_penalty != 1:
            seen = np.fromiter(self._seen, dtype=np.int64, count=len(self._seen))
            penalise_repetition(scores, seen, options.repetition_penalty)
        if self._counts and (options.presence_penalty or options.frequency_penalty):
            ids = np.fromiter(self._counts, dtype=np.int64, count=len(self._counts))
            counts = np.fromiter(self._counts.values(), dtype=np.int64, count=len(self._counts))
            penalise_presence(scores, ids, counts, options.presence_penalty, options.frequency_penalty)
        if options.no_repeat_ngram_size:
            scores[list(self._ngrams.get(self._recent, ()))] = -np.inf
        if self.length < options.min_new_tokens:
            scores[self._end_ids] = -np.inf
        return scores if np.isfinite(scores.max()) else before

    def _note_ngram(self, token: int) -> None:
        """Remembers that `token` followed the n - 1 tokens before it."""
        before = self._options.no_repeat_ngram_size - 1
        if len(self._recent) == before:
            self._ngrams[self._recent] = (*self._ngrams.get(self._recent, ()), token)
        self._recent = (*self._recent, token)[-before:] if before else ()


class RowSampler:
    """Chooses the tokens of one answer, one after another."""

    def __init__(
        self,
        options: SamplingOptions,
        prompt: Sequence[int],
        end_ids: Collection[int],
        seed: int,
        row: int,
        constraint: Constraint | None = None,
    ) -> None:
        """
        Args:
            options: how to choose.
            prompt, end_ids: see `History`.
            seed, row: together the key of the row's random numbers (Philox, Salmon et al. 2011).
            constraint: the form of this answer, at its beginning; None is free.
        """
        self.options = options
        self._constraint = constraint
        self._history = History(options, prompt, end_ids)
        self._random = np.random.Generator(np.random.Philox(key=np.array([seed, row], dtype=np.uint64)))

    @property
    def takes_argmax(self) -> bool:
        """Whether the next token, and every one after it, is simply the likeliest one."""
        return self.options.greedy and not self._history.changes_logits and self._constraint is None

    @property
    def ended(self) -> bool:
        """Whether nothing may follow in the form that the answer has."""
        return self._constraint is not None and self._constraint.ended

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token from the model's logits [vocabulary], which stay as they are.

        Raises:
            UserError: see `Constraint.mask`.
        """
        if self.takes_argmax:
            return int(logits.argmax())
        scores = logits.astype(np.float64)
        if self._constraint is not None:
            scores[~self._constraint.mask()] = -np.inf
        if self._history.changes_logits:
            scores = self._history.penalised(scores)
        if self.options.greedy:
            return int(scores.argmax())
        return draw(*filtered_probabilities(scores, self.options), int(self._random.integers(2**64, dtype=np.uint64)))

    def accept(self, token: int) -> None:
        """Adds a token to the history."""
        self._history.accept(token)
        if self._constraint is not None:
            self._constraint.accept(token)
