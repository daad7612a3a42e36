"""Beam search against all answers there are, and against a plain rendering of Hugging Face's rules."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import pytest
from reference_engine import FunctionEngine, ReferenceEngine, TextEngine, random_logits

from utils.checkpoints.load import new_model
from utils.families import FAMILIES
from utils.inference.generator import Completion, Generator
from utils.inference.sampling import SamplingOptions


class Letters:
    """Token i is the i-th letter; token 0 ends an answer."""

    eos_ids: tuple[int, ...] = (0,)

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(96 + token) for token in ids if token)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, dtype=np.float32).astype(np.float64)
    return logits - np.log(np.exp(logits).sum())


def search(engine: TextEngine, prompt: list[int], options: SamplingOptions, batch_size: int = 4) -> Completion:
    (found,) = Generator(engine, Letters()).generate([prompt], options, batch_size)
    assert not engine.texts
    return found


# --- all answers there are ---------------------------------------------------------------------------


def every_answer(vocabulary: int, length: int) -> Iterator[tuple[int, ...]]:
    """All token sequences that end with token 0, or have the full length without it."""
    for size in range(length):
        for tokens in itertools.product(range(1, vocabulary), repeat=size):
            yield (*tokens, 0)
    yield from itertools.product(range(1, vocabulary), repeat=length)


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("seed", range(4))
def test_wide_beams_find_the_best_answer_of_all(seed: int, penalty: float) -> None:
    function, prompt = random_logits(4, seed), [3, 1]
    scores = {}
    for tokens in every_answer(4, 4):
        total, text = 0.0, list(prompt)
        for token in tokens:
            total += log_softmax(function(text))[token]
            text.append(token)
        scores[tokens] = total / len(tokens) ** penalty
    options = SamplingOptions(max_new_tokens=4, num_beams=150, length_penalty=penalty, logprobs=True)
    found = search(FunctionEngine(function, 4), prompt, options)
    assert found.tokens == max(scores, key=lambda tokens: scores[tokens])
    assert found.finish_reason == ("stop" if found.tokens[-1] == 0 else "length")
    assert sum(found.logprobs or ()) / len(found.tokens) ** penalty == pytest.approx(scores[found.tokens])


def test_one_step_of_greedy_is_not_the_best_answer() -> None:
    """Greedy takes b (0.5), whose best end is 0.5 * 0.4; two beams find c (0.4) with 0.4 * 0.9."""
    table = {(1,): [0.05, 0.05, 0.5, 0.4], (1, 2): [0.4, 0.3, 0.2, 0.1], (1, 3): [0.9, 0.05, 0.03, 0.02]}
    engine = FunctionEngine(lambda text: np.log(table.get(tuple(text), [0.25] * 4)), 4)
    options = SamplingOptions(max_new_tokens=2)
    assert search(engine, [1], options).tokens == (2, 0)
    assert search(engine, [1], replace(options, num_beams=2)).tokens == (3, 0)


# --- Hugging Face's rules, written down once more, with whole texts and no slots -----------------------


def penalised(scores: np.ndarray, prompt: list[int], tokens: list[int], options: SamplingOptions) -> np.ndarray:
    scores, text = scores.copy(), prompt + tokens
    for token in set(text):
        scores[token] *= options.repetition_penalty if scores[token] < 0 else 1 / options.repetition_penalty
    for token in set(tokens):
        scores[token] -= options.presence_penalty + options.frequency_penalty * tokens.count(token)
    n = options.no_repeat_ngram_size
    for start in range(len(text) - n + 1) if n else ():
        if n == 1 or text[start : start + n - 1] == text[len(text) - n + 1 :]:
            scores[text[start + n - 1]] = -np.inf
    if len(tokens) < options.min_new_tokens:
        scores[0] = -np.inf
    return scores


class Hypotheses:
    """The complete answers."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self.beams: list[tuple[float, list[int]]] = []

    def add(self, tokens: list[int], total: float) -> None:
        score = total / len(tokens) ** self.options.length_penalty
        if len(self.beams) < self.options.num_beams or score > min(self.beams)[0]:
            self.beams.append((score, tokens))
            if len(self.beams) > self.options.num_beams:
                self.beams.remove(min(self.beams))

    def is_done(self, best: float, length: int) -> bool:
        if len(self.beams) < self.options.num_beams:
            return False
        return self.options.early_stopping or min(self.beams)[0] >= best / length**self.options.length_penalty


def reference(engine: TextEngine, prompt: list[int], options: SamplingOptions) -> list[int]:
    width, done = options.num_beams, Hypotheses(options)
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for length in range(1, options.max_new_tokens + 1):
        candidates = []
        for total, tokens in beams:
            scores = log_softmax(engine.logits([*prompt, *tokens], 1)[0])
            scores = penalised(scores, prompt, tokens, options)
            candidates += [(total + score, [*tokens, token]) for token, score in enumerate(scores)]
        candidates = sorted((one for one in candidates if one[0] > -np.inf), reverse=True)[: 2 * width]
        beams = []
        for rank, (total, tokens) in enumerate(candidates):
            stopped = any(word in Letters().decode(tokens[options.min_new_tokens :]) for word in options.stop)
            if tokens[-1] == 0 or stopped:
                if rank < width:
                    done.add(tokens, total)
            elif len(beams) < width:
                beams.append((total, tokens))
        if not beams or length == options.max_new_tokens:
            break
        if done.is_done(beams[0][0], length):
            return max(done.beams)[1]
    for total, tokens in beams:
        done.add(tokens, total)
    return max(done.beams)[1]


VARIANTS = [
    SamplingOptions(num_beams=2),
    SamplingOptions(num_beams=4, length_penalty=0.6),
    SamplingOptions(num_beams=3, length_penalty=2.0, early_stopping=True),
    SamplingOptions(num_beams=3, early_stopping=True),
    SamplingOptions(num_beams=4, min_new_tokens=5),
    SamplingOptions(num_beams=3, no_repeat_ngram_size=2),
    SamplingOptions(num_beams=3, repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1),
    SamplingOptions(num_beams=3, stop=("ab", "cc", "e")),
    SamplingOptions(num_beams=5, no_repeat_ngram_size=3, min_new_tokens=3, stop=("d",), repetition_penalty=1.1),
]


@pytest.mark.parametrize("options", VARIANTS)
def test_search_follows_the_reference(options: SamplingOptions) -> None:
    found_lengths = set()
    for seed in range(12):
        options = replace(options, max_new_tokens=9)
        engine = FunctionEngine(random_logits(6, seed, 1.5), 6)
        prompt = np.random.default_rng(seed).integers(1, 6, 4).tolist()
        found = search(engine, prompt, options)
        assert list(found.tokens) == reference(engine, prompt, options), seed
        assert engine.most <= 2 * options.num_beams
        for word in options.stop:
            assert word not in found.text[options.min_new_tokens :]
        found_lengths.add(len(found.tokens))
    assert len(found_lengths) > 1


@pytest.fixture(scope="module")
def model() -> Any:
    paddle.seed(7)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": "llama", "vocab_size": 26, "initializer_range": 0.3, **sizes}
    return new_model(FAMILIES["llama"], config, "float32")


@pytest.mark.parametrize("options", VARIANTS[:3] + VARIANTS[-1:])
def test_a_real_models_beams_in_a_batch(model: Any, options: SamplingOptions) -> None:
    """Beams beside greedy and sampled rows, with heads that are shared, and in too small a batch."""
    engine = ReferenceEngine(FAMILIES["llama"], model, max_positions=64)
    options = replace(options, max_new_tokens=10)
    head = np.random.default_rng(0).integers(1, 26, 17).tolist()
    prompts = [[*head, 1, 2], [*head, 3], [4, 5, 6], [*head, 7, 8, 9], [10]]
    each = [options, SamplingOptions(max_new_tokens=8), options, options, SamplingOptions(top_k=0, seed=1)]
    each[4] = replace(each[4], max_new_tokens=12)
    wanted = [reference(engine, prompts[row], options) for row in (0, 2, 3)]
    for size in (1, 4, 16):
        generator = Generator(engine, Letters())
        found = generator.generate(prompts, each, size)
        assert [list(found[row].tokens) for row in (0, 2, 3)] == wanted
        assert not engine.texts
        if size == 16:
            assert generator.speed.shared_tokens == 34
    alone = Generator(engine, Letters()).generate(prompts, each, 1)
    assert found == alone


def test_the_answer_of_a_search_streams_in_one_piece(model: Any) -> None:
    engine = ReferenceEngine(FAMILIES["llama"], model, max_positions=64)
    options = SamplingOptions(max_new_tokens=6, num_beams=3, stop=("zz",))
    pieces = list(Generator(engine, Letters()).stream([4, 5], options))
    assert pieces == [search(engine, [4, 5], options).text]
    stream = Generator(engine, Letters()).stream([4, 5], replace(options, min_new_tokens=6))
    next(stream)
    stream.close()
    assert not engine.texts


def test_logprobs_and_alternatives_of_the_best_beam(model: Any) -> None:
    engine = ReferenceEngine(FAMILIES["llama"], model, max_positions=64)
    options = SamplingOptions(max_new_tokens=6, num_beams=3, logprobs=True, top_logprobs=3, repetition_penalty=1.2)
    found = search(engine, [4, 5], options)
    assert found.logprobs and found.top_logprobs and len(found.logprobs) == len(found.tokens)
    for place, token in enumerate(found.tokens):
        scores = log_softmax(engine.logits([4, 5, *found.tokens[:place]], 1)[0])
        assert found.logprobs[place] == pytest.approx(scores[token])
        assert [one for one, _ in found.top_logprobs[place]] == np.argsort(-scores)[:3].tolist()


def test_broken_weights_end_a_search() -> None:
    def function(text: list[int]) -> np.ndarray:
        values = random_logits(6, 1)(text)
        return values * np.nan if len(text) == 4 else values

    found = search(FunctionEngine(function, 6), [1], SamplingOptions(max_new_tokens=9, min_new_tokens=9, num_beams=3))
    assert found.finish_reason == "error" and "not finite at token 4" in (found.error or "")
