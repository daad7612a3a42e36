"""Sampling against distributions and tables computed here by hand or by the plain definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.errors import UserError
from utils.inference.sampling import (
    History,
    RowSampler,
    SamplingOptions,
    draw,
    filtered_probabilities,
    likeliest,
    log_softmax,
    penalise_presence,
    penalise_repetition,
    top_p_threshold,
)
from utils.inference.text import TextStream

DRAWS = 20_000
# Upper 0.001 quantile of the chi-square distribution by degrees of freedom (NIST handbook, 1.3.6.7.4).
CHI_SQUARE = {2: 13.816, 3: 16.266, 4: 18.467, 5: 20.515, 9: 27.877}
LOGITS = np.array([1.2, -0.3, 0.8, 2.0, -1.5, 0.0, 1.0, -0.7, 0.4, -2.5], dtype=np.float32)


def reference(options: SamplingOptions) -> np.ndarray:
    """The wanted distribution over all tokens, straight from the definitions, token by token."""
    weights = [np.exp(float(logit) / options.temperature) for logit in LOGITS]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    if options.top_k:
        order = order[: options.top_k]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= options.top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    kept = [i for i in kept if weights[i] >= options.min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return np.array([weights[i] / total if i in kept else 0.0 for i in range(len(weights))])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (SamplingOptions(top_k=0, seed=1), 10),
        (SamplingOptions(top_k=0, temperature=0.5, seed=2), 10),
        (SamplingOptions(top_k=0, temperature=2.0, seed=3), 10),
        (SamplingOptions(top_k=4, seed=4), 4),
        (SamplingOptions(top_k=0, top_p=0.75, seed=5), 4),
        (SamplingOptions(top_k=0, min_p=0.3, seed=6), 4),
        (SamplingOptions(top_k=6, top_p=0.9, min_p=0.05, temperature=1.3, seed=7), 5),
    ],
)
def test_draws_follow_the_distribution(options: SamplingOptions, kept: int) -> None:
    wanted = reference(options)
    assert (wanted > 0).sum() == kept
    sampler = RowSampler(options, prompt=[1, 2], end_ids=(), seed=options.seed or 0, row=0)
    counts = np.bincount([sampler.choose(LOGITS) for _ in range(DRAWS)], minlength=LOGITS.size)
    assert counts[wanted == 0].sum() == 0
    expected = wanted[wanted > 0] * DRAWS
    statistic = float(((counts[wanted > 0] - expected) ** 2 / expected).sum())
    assert statistic < CHI_SQUARE[kept - 1]


def test_draws_of_a_wrong_distribution_would_be_noticed() -> None:
    """The bound above is sharp enough: draws at temperature 1.1 fail it."""
    sampler = RowSampler(SamplingOptions(top_k=0, temperature=1.1), prompt=[], end_ids=(), seed=1, row=0)
    counts = np.bincount([sampler.choose(LOGITS) for _ in range(DRAWS)], minlength=LOGITS.size)
    expected = reference(SamplingOptions(top_k=0)) * DRAWS
    assert ((counts - expected) ** 2 / expected).sum() > CHI_SQUARE[9]


def test_top_p_sorts_only_when_it_must() -> None:
    """Both paths of the threshold: a peaked and a flat distribution over a large vocabulary."""
    random = np.random.default_rng(0)
    for spread in (6.0, 0.01):
        weights = np.exp(random.normal(size=5000) * spread)
        probabilities = weights / weights.sum()
        threshold = top_p_threshold(probabilities, 0.9)
        kept = probabilities[probabilities >= threshold]
        assert kept.sum() >= 0.9 > kept.sum() - threshold


def test_filters_keep_ties_and_never_everything_away() -> None:
    equal = np.zeros(8)
    for options in (
        SamplingOptions(top_k=3),
        SamplingOptions(top_k=0, top_p=0.0),
        SamplingOptions(top_k=0, min_p=1.0),
    ):
        ids, probabilities = filtered_probabilities(equal, options)
        assert ids.tolist() == list(range(8)) and np.allclose(probabilities, 1 / 8)
    ids, probabilities = filtered_probabilities(
        np.array([0.0, -np.inf, 3.0, -np.inf]), SamplingOptions(top_k=50, temperature=1e-3)
    )
    assert ids.tolist() == [0, 2] and probabilities[1] == 1.0


def test_noise_in_the_last_digits_changes_no_draw() -> None:
    """Half of the probability is one token's, and the rest lies in a long tail: by their places in the running sum
    some of these draws would be others."""
    logits = np.random.default_rng(0).normal(0, 1, 50_000).astype(np.float32)
    logits[0] = np.log(np.exp(logits[1:]).sum())
    noisy = logits.copy()
    noisy[0] += 3e-6  # what other rows of a batch change
    samplers = [RowSampler(SamplingOptions(top_k=0), prompt=[], end_ids=(), seed=1, row=0) for _ in range(2)]
    found = [(samplers[0].choose(logits), samplers[1].choose(noisy)) for _ in range(300)]
    assert noisy[0] > logits[0] and 100 < sum(one > 0 for one, _ in found) < 200
    assert all(one == other for one, other in found)


def test_draws_from_several_blocks_follow_the_distribution() -> None:
    ids = np.array([*range(5), *range(250, 260), 300, 70_000])
    weights = np.arange(1.0, ids.size + 1)
    keys = np.random.default_rng(3).integers(2**64, size=DRAWS, dtype=np.uint64)
    found = np.searchsorted(ids, [draw(ids, weights, int(key)) for key in keys])
    expected = weights / weights.sum() * DRAWS
    statistic = ((np.bincount(found, minlength=ids.size) - expected) ** 2 / expected).sum()
    assert statistic < 39.3  # of 16 degrees of freedom, one in a thousand


def test_repetition_penalty_table() -> None:
    """Seen tokens 0, 1, 3 with penalty 1.25: positive scores / 1.25, negative * 1.25, zero stays."""
    scores = np.array([2.0, -1.0, 3.0, 0.0, -4.0])
    penalise_repetition(scores, np.array([0, 1, 3]), 1.25)
    np.testing.assert_allclose(scores, [1.6, -1.25, 3.0, 0.0, -4.0])


def test_presence_and_frequency_table() -> None:
    """Token 1 was chosen once, token 4 three times; presence 0.5, frequency 0.2."""
    scores = np.array([2.0, -1.0, 3.0, 0.0, 4.0])
    penalise_presence(scores, np.array([1, 4]), np.array([1, 3]), 0.5, 0.2)
    np.testing.assert_allclose(scores, [2.0, -1.7, 3.0, 0.0, 2.9])


@pytest.mark.parametrize(
    ("options", "accepted", "choice"),
    [
        # repetition counts the prompt (token 3): 2.0 / 1.8 = 1.11 < 1.2
        (SamplingOptions(repetition_penalty=1.8), [], 0),
        # ... and the answer (token 0): 1.2 / 1.8 = 0.67 < 1.0 of token 6
        (SamplingOptions(repetition_penalty=2.2), [0], 6),
        # presence and frequency do not count the prompt
        (SamplingOptions(presence_penalty=2.0, frequency_penalty=2.0), [], 3),
        # presence counts once: 2.0 - 0.7 = 1.3 > 1.2 ...
        (SamplingOptions(presence_penalty=0.7), [3, 3], 3),
        # ... frequency every time: 2.0 - 2 * 0.7 = 0.6
        (SamplingOptions(frequency_penalty=0.7), [3, 3], 0),
    ],
)
def test_penalties_count_what_they_should(options: SamplingOptions, accepted: list[int], choice: int) -> None:
    sampler = RowSampler(options, prompt=[3], end_ids=(), seed=0, row=0)
    for token in accepted:
        sampler.accept(token)
    assert sampler.choose(LOGITS) == choice


@given(st.integers(1, 4), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_no_ngram_occurs_twice(n: int, prompt: list[int], seed: int) -> None:
    options = SamplingOptions(no_repeat_ngram_size=n, top_k=0)
    sampler = RowSampler(options, prompt, end_ids=(), seed=seed, row=0)
    text, random = list(prompt), np.random.default_rng(seed)
    for _ in range(30):
        possible = {t for t in range(5) if not _repeats([*text, t], n)}
        token = sampler.choose(random.normal(size=5).astype(np.float32))
        if not possible:
            break
        assert token in possible
        sampler.accept(token)
        text.append(token)


def _repeats(text: list[int], n: int) -> bool:
    grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
    return len(text) >= n and grams[-1] in grams[:-1]


def test_nothing_left_puts_the_penalties_aside() -> None:
    sampler = RowSampler(SamplingOptions(no_repeat_ngram_size=1), list(range(10)), (), seed=0, row=0)
    assert sampler.choose(LOGITS) == 3


def test_end_tokens_wait_for_the_minimum() -> None:
    sampler = RowSampler(SamplingOptions(min_new_tokens=2, max_new_tokens=9), [1], (3, 0), seed=0, row=0)
    found = []
    for _ in range(3):
        found.append(sampler.choose(LOGITS))
        sampler.accept(found[-1])
    assert found == [6, 6, 3]


def test_logits_are_left_alone() -> None:
    before = LOGITS.copy()
    options = SamplingOptions(
        top_k=3, repetition_penalty=2.0, presence_penalty=1.0, no_repeat_ngram_size=2, min_new_tokens=1
    )
    sampler = RowSampler(options, [3, 3, 4], (1,), seed=0, row=0)
    sampler.accept(sampler.choose(LOGITS))
    sampler.choose(LOGITS)
    np.testing.assert_array_equal(before, LOGITS)


def test_a_bias_is_added_each_time_that_its_token_is_named() -> None:
    history = History(SamplingOptions(logit_bias=((3, 2.0), (5, -1.0), (3, 0.5))), [], ())
    wanted = LOGITS.astype(np.float64)
    wanted[[3, 5]] += [2.5, -1.0]
    np.testing.assert_allclose(history.penalised(LOGITS.astype(np.float64)), wanted)


def test_all_penalties_in_one_table() -> None:
    """Prompt 3 4, answer 4 6 4 6; repetition 2.0, presence 0.5, frequency 0.25, bigrams once, token 0 ends.

    Token 3: 2.0 / 2. Token 4: -1.5 * 2 - 0.5 - 2 * 0.25, but "6 4" occurred, so it is out. Token 6: 1.0 / 2
    - 0.5 - 2 * 0.25. Token 0 waits for the minimum length.
    """
    options = SamplingOptions(
        min_new_tokens=5, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, no_repeat_ngram_size=2
    )
    history = History(options, [3, 4], (0,))
    for token in (4, 6, 4):
        history.accept(token)
    other = history.copy()
    history.accept(6)
    wanted = LOGITS.astype(np.float64)
    wanted[[0, 3, 4, 6]] = [-np.inf, 1.0, -np.inf, -0.5]
    np.testing.assert_allclose(history.penalised(LOGITS.astype(np.float64)), wanted)
    # the copy is still where it was: "4 4" and "4 6" occurred; 4 came twice, 6 once
    wanted[[3, 4, 6]] = [1.0, -np.inf, -np.inf]
    np.testing.assert_allclose(other.penalised(LOGITS.astype(np.float64)), wanted)
    assert (history.length, other.length) == (4, 3)


def test_likeliest_tokens_and_their_logarithms() -> None:
    scores = log_softmax(np.array([0.0, 2.0, 1.0, 2.0, -np.inf], dtype=np.float32))
    assert np.exp(scores).sum() == pytest.approx(1.0)
    assert [token for token, _ in likeliest(scores, 3)] == [1, 3, 2]
    assert [token for token, _ in likeliest(scores, 1)] == [1]  # of equal ones the lower id
    assert [token for token, _ in likeliest(scores, 9)] == [1, 3, 2, 0, 4]
    assert likeliest(scores, 0) == []
    assert likeliest(scores, 2)[0][1] - likeliest(scores, 3)[2][1] == pytest.approx(1.0)


def test_all_wrong_options_are_named_together() -> None:
    with pytest.raises(UserError) as caught:
        SamplingOptions(temperature=-1.0, top_p=1.5, top_k=-2, min_new_tokens=5, max_new_tokens=2, stop=("",))
    named = [fault.split()[0] for fault in caught.value.faults]
    assert named == ["min_new_tokens", "temperature", "top_k", "top_p", "stop"]


# --- text ------------------------------------------------------------------------------------------


def pieces_of(text: str, cuts: list[int]) -> list[bytes]:
    data = text.encode()
    borders = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(borders)]


@given(st.text(st.sampled_from("ab é中😀\u0301"), max_size=12), st.lists(st.integers(0, 40), max_size=12))
@settings(max_examples=200, deadline=None)
def test_pieces_join_to_the_text_and_end_with_whole_characters(text: str, cuts: list[int]) -> None:
    tokens = pieces_of(text, cuts)
    stream = TextStream(lambda ids: b"".join(tokens[i] for i in ids).decode(errors="replace"))
    pieces = [stream.push(i) for i in range(len(tokens))]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text == stream.text
    assert stream.finish() == ""


@given(
    st.text(st.sampled_from("ab中"), max_size=14),
    st.lists(st.integers(0, 40), max_size=12),
    st.lists(st.text(st.sampled_from("ab中"), min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_text_ends_before_the_first_stop_word(text: str, cuts: list[int], stop: list[str]) -> None:
    tokens = pieces_of(text, cuts)
    stream = TextStream(lambda ids: b"".join(tokens[i] for i in ids).decode(errors="replace"), stop)
    found = "".join(stream.push(i) for i in range(len(tokens))) + stream.finish()
    ends = [(text.find(word) + len(word), text.find(word)) for word in stop if word in text]
    assert stream.stopped == bool(ends)
    assert found == stream.text == (text[: min(ends)[1]] if ends else text)


def test_decoders_that_strip_a_leading_space() -> None:
    """SentencePiece drops the space of the first piece of what it decodes, and shows no special token."""
    pieces = {0: "", 1: "▁Hello", 2: "▁wor", 3: "ld"}

    def decode(ids: list[int]) -> str:
        return "".join(pieces[i] for i in ids).replace("▁", " ").removeprefix(" ")

    stream = TextStream(decode)  # type: ignore[arg-type]
    assert [stream.push(i) for i in (0, 1, 0, 2, 3, 1)] == ["", "Hello", "", " wor", "ld", " Hello"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"stop": "word"}, "stop is 'word': expected a list of texts"),
        ({"stop": (3,)}, "stop is (3,): expected a list of texts"),
        ({"top_logprobs": 2}, "top_logprobs is 2: expected 0 without logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs is 21: expected from 0 to 20"),
        ({"num_beams": 0}, "num_beams is 0: expected from 1 to 1024"),
        ({"num_beams": 2, "top_k": 5}, "num_beams is 2: expected 1 together with sampling"),
        ({"num_beams": 2, "prompt_lookup_num_tokens": 5}, "num_beams is 2: expected 1 together with"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"length_penalty": 1e308}, "length_penalty is 1e+308"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"frequency_penalty": -1e308}, "frequency_penalty is -1e+308"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"temperature": float("inf")}, "temperature is inf"),
    ],
)
def test_options_that_cannot_be(settings: dict, named: str) -> None:
    with pytest.raises(UserError) as caught:
        SamplingOptions(**settings)
    assert len(caught.value.faults) == 1 and named in caught.value.faults[0]
    assert SamplingOptions(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


@given(st.text(st.sampled_from("ab中"), max_size=8), st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_a_copied_stream_goes_on_alone(text: str, at: int) -> None:
    tokens = pieces_of(text, list(range(30)))
    stream = TextStream(lambda ids: b"".join(tokens[i] for i in ids).decode(errors="replace"), ("ab",))
    whole = stream.copy()
    for number in range(len(tokens)):
        if number == at:
            branch = stream.copy()
            branch.push(0)
        stream.push(number)
        whole.push(number)
    stream.finish(), whole.finish()
    assert stream.text == whole.text == text.split("ab")[0]


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_nothing_is_drawn_that_cannot_be(size: int) -> None:
    random = np.random.default_rng(size)
    weights = np.exp(random.normal(0, 3, size)) * (random.random(size) < 0.6)
    weights[random.integers(size)] = 1.0
    for key in (0, 2**64 - 1, *random.integers(2**64, size=200, dtype=np.uint64)):
        assert weights[draw(np.arange(size) + 7, weights, int(key)) - 7] > 0
