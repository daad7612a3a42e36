"""The generator above the reference engine on a tiny random LLaMA, and its rules for when an answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
import pytest
from reference_engine import FunctionEngine, ReferenceEngine

from utils.checkpoints.load import new_model
from utils.families import FAMILIES
from utils.inference.generator import Completion, Generator, Speed
from utils.inference.sampling import SamplingOptions

VOCABULARY = 128
POSITIONS = 96
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.12,  # wide enough that the likeliest token changes with the context
}
FAMILY = FAMILIES["llama"]


class ToyTokenizer:
    """Token i is the character i of ASCII; ids 0 and 1 are special. A few more pieces on demand."""

    def __init__(self, eos_ids: tuple[int, ...] = (), pieces: dict[int, bytes] | None = None) -> None:
        self.eos_ids = eos_ids
        self._pieces = {i: bytes([i]) for i in range(2, VOCABULARY)} | {0: b"", 1: b""} | (pieces or {})

    def encode(self, text: str) -> list[int]:
        return [1] if text == "<special>" else list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return b"".join(self._pieces[i] for i in ids).decode(errors="replace")


@pytest.fixture(scope="module")
def model() -> Any:
    paddle.seed(7)
    return new_model(FAMILY, CONFIG, "float32")


@pytest.fixture
def generator(model: Any) -> Generator:
    return Generator(ReferenceEngine(FAMILY, model), ToyTokenizer())


def prompts_of(lengths: Sequence[int]) -> list[list[int]]:
    random = np.random.default_rng(3)
    return [random.integers(2, VOCABULARY, length).tolist() for length in lengths]


def full_logits(model: Any, ids: Sequence[int]) -> np.ndarray:
    """Logits of every position by one forward without cache, mask or padding."""
    with paddle.no_grad():
        hidden = model.hidden({"input_ids": paddle.to_tensor([list(ids)])})
        return model.logits(hidden)[0].numpy()


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(max_new_tokens=24),
        SamplingOptions(max_new_tokens=24, repetition_penalty=1.3, no_repeat_ngram_size=3),
        SamplingOptions(max_new_tokens=24, top_k=0, temperature=1.5, seed=11),
        SamplingOptions(max_new_tokens=24, top_k=40, top_p=0.9, min_p=0.01, presence_penalty=0.5, seed=2**63),
    ],
)
def test_same_text_in_any_batch(generator: Generator, options: SamplingOptions) -> None:
    prompts = prompts_of([3, 30, 8, 8, 1, 19, 45, 12])
    answers = [generator.generate(prompts, options, batch_size=size) for size in (1, 3, 8)]
    assert [a.tokens for a in answers[0]] == [a.tokens for a in answers[1]] == [a.tokens for a in answers[2]]
    assert len({a.tokens for a in answers[0]}) == len(prompts)
    assert all(len(set(a.tokens)) > 3 for a in answers[0])


def test_greedy_is_the_argmax_of_full_forwards(model: Any, generator: Generator) -> None:
    (prompt,) = prompts_of([10])
    ids = list(prompt)
    for _ in range(12):
        ids.append(int(full_logits(model, ids)[-1].argmax()))
    assert list(generator.generate([prompt], SamplingOptions(max_new_tokens=12))[0].tokens) == ids[10:]


def test_seeds_and_row_numbers(generator: Generator) -> None:
    (prompt,) = prompts_of([10])
    options = SamplingOptions(max_new_tokens=12, top_k=0, temperature=2.0, seed=1)
    first = generator.generate([prompt] * 3, options)
    assert len({a.tokens for a in first}) == 3
    assert generator.generate([prompt], options, numbers=[2])[0] == first[2]
    other = SamplingOptions(max_new_tokens=12, top_k=0, temperature=2.0, seed=2)
    assert generator.generate([prompt], other)[0].tokens != first[0].tokens
    unseeded = SamplingOptions(max_new_tokens=12, top_k=0, temperature=2.0)
    assert generator.generate([prompt], unseeded)[0].tokens != generator.generate([prompt], unseeded)[0].tokens


def test_options_per_row(generator: Generator) -> None:
    prompts = prompts_of([6, 6, 6])
    each = [SamplingOptions(max_new_tokens=n, top_k=k, seed=4) for n, k in ((3, 1), (9, 0), (5, 1))]
    assert [len(a.tokens) for a in generator.generate(prompts, each)] == [3, 9, 5]


def test_positions_are_respected(model: Any, generator: Generator) -> None:
    prompts = [*prompts_of([POSITIONS - 4, POSITIONS, POSITIONS + 9, 5]), [], [5, VOCABULARY]]
    cut, full, over, fine, empty, unknown = generator.generate(prompts, SamplingOptions(max_new_tokens=8))
    assert len(cut.tokens) == 4 and cut.finish_reason == "length" and "cut at 4 tokens" in (cut.note or "")
    assert len(fine.tokens) == 8 and fine.note is None and fine.error is None
    for bad, words in ((full, "no room"), (over, "no room"), (empty, "empty"), (unknown, "vocabulary")):
        assert bad.finish_reason == "error" and bad.tokens == () and words in (bad.error or "")
    # the last answer token would be at position 95, the last one there is
    np.testing.assert_array_equal(cut.tokens[-1], full_logits(model, [*prompts[0], *cut.tokens[:-1]])[-1].argmax())


def test_logprobs_are_the_models_own(model: Any, generator: Generator) -> None:
    (prompt,) = prompts_of([7])
    options = SamplingOptions(max_new_tokens=5, top_k=0, temperature=2.0, logprobs=True, seed=3)
    answer = generator.generate([prompt], options)[0]
    logits = full_logits(model, [*prompt, *answer.tokens])[len(prompt) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(answer.logprobs, expected[np.arange(5), list(answer.tokens)], atol=1e-5)
    assert generator.generate([prompt], SamplingOptions(max_new_tokens=2))[0].logprobs is None


def test_the_likeliest_tokens_at_each_place(model: Any, generator: Generator) -> None:
    (prompt,) = prompts_of([7])
    options = SamplingOptions(max_new_tokens=5, top_k=0, temperature=2.0, logprobs=True, top_logprobs=4, seed=3)
    answer = generator.generate([prompt], options)[0]
    logits = full_logits(model, [*prompt, *answer.tokens])[len(prompt) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert answer.top_logprobs is not None and len(answer.top_logprobs) == 5
    for found, scores in zip(answer.top_logprobs, expected, strict=True):
        assert [token for token, _ in found] == np.argsort(-scores)[:4].tolist()
        np.testing.assert_allclose([score for _, score in found], np.sort(scores)[:-5:-1], atol=1e-5)


def test_broken_weights_are_reported() -> None:
    paddle.seed(1)
    broken = new_model(FAMILY, CONFIG, "float32")
    with paddle.no_grad():
        # only rows that contain token 9 meet the bad number
        broken.llama.embed_tokens.weight[9] = float("nan")
    broken_generator = Generator(ReferenceEngine(FAMILY, broken, POSITIONS), ToyTokenizer())
    bad, good = broken_generator.generate([[5, 9], [5, 6]], SamplingOptions(max_new_tokens=1))
    assert bad.finish_reason == "error" and "not finite at token 1" in (bad.error or "")
    assert good.finish_reason == "length"


# --- when an answer ends -----------------------------------------------------------------------------


def scripted(
    scripts: dict[int, str], *, eos_ids: tuple[int, ...] = (0,), pieces: dict[int, bytes] | None = None
) -> Generator:
    """A generator whose answer to the prompt [key] is the text of that key."""

    def logits(text: list[int]) -> np.ndarray:
        values = np.zeros(VOCABULARY)
        values[ord(scripts[text[0]][len(text) - 1])] = 5.0
        return values

    return Generator(FunctionEngine(logits, VOCABULARY), ToyTokenizer(eos_ids, pieces))


def free(generator: Generator) -> bool:
    """Whether no slot is open."""
    assert isinstance(generator.engine, FunctionEngine | ReferenceEngine)
    return not generator.engine.texts


def test_several_end_tokens_and_leaving_rows() -> None:
    generator = scripted({10: "ab\x00", 11: "abcdef\x01", 12: "x\x01", 13: "long answer"}, eos_ids=(0, 1))
    options = SamplingOptions(max_new_tokens=9)
    finished: list[int] = []
    answers = generator.generate([[10], [11], [12], [13]], options, on_row=lambda index, _: finished.append(index))
    assert [a.text for a in answers] == ["ab", "abcdef", "x", "long answ"]
    assert [a.finish_reason for a in answers] == ["stop", "stop", "stop", "length"]
    assert [len(a.tokens) for a in answers] == [3, 7, 2, 9]
    assert finished == [2, 0, 1, 3]
    assert isinstance(generator.engine, FunctionEngine) and free(generator)
    sizes = [len(tokens) for _, tokens in generator.engine.calls]
    assert sizes == [4, 4, 3, 2, 2, 2, 2, 1, 1]
    assert generator.speed.prompt_tokens == 4
    assert generator.speed.decode_tokens == sum(sizes[1:])


def test_min_new_tokens_bans_end_tokens(model: Any) -> None:
    (prompt,) = prompts_of([10])
    plain = Generator(ReferenceEngine(FAMILY, model), ToyTokenizer())
    free = plain.generate([prompt], SamplingOptions(max_new_tokens=8))[0].tokens
    tokenizer = ToyTokenizer(eos_ids=(free[0], free[2]))
    ending = Generator(ReferenceEngine(FAMILY, model), tokenizer)
    assert len(ending.generate([prompt], SamplingOptions(max_new_tokens=8))[0].tokens) == 1
    answer = ending.generate([prompt], SamplingOptions(max_new_tokens=8, min_new_tokens=5))[0]
    assert len(answer.tokens) >= 5 and not set(answer.tokens[:5]) & {free[0], free[2]}


@pytest.mark.parametrize(
    ("script", "stop", "text", "tokens"),
    [
        ("one STOP two", ("STOP",), "one ", 8),
        ("one STOP two", ("TWO", "OP", "STOP"), "one ", 8),  # the earliest beginning wins
        ("aaab!", ("ab",), "aa", 4),
        ("no such word", ("words",), "no such word", 12),
        ("the end is ST", ("STOP",), "the end is ST", 13),  # what is held back comes out in the end
        ("a\x01b", ("<special>",), "a", 2),  # a special token that no text shows
    ],
)
def test_stop_words(script: str, stop: tuple[str, ...], text: str, tokens: int) -> None:
    options = SamplingOptions(max_new_tokens=len(script), stop=stop)
    answer = scripted({10: script}).generate([[10]], options)[0]
    assert (answer.text, len(answer.tokens)) == (text, tokens)
    assert "".join(scripted({10: script}).stream([10], options)) == text


def test_stop_word_begins_and_ends_inside_tokens() -> None:
    pieces = {ord("1"): b"hello wo", ord("2"): b"rld and", ord("3"): b" more"}
    answer = scripted({10: "123"}, pieces=pieces).generate(
        [[10]], SamplingOptions(max_new_tokens=3, stop=("o world",))
    )[0]
    assert answer.text == "hell" and len(answer.tokens) == 2 and answer.finish_reason == "stop"


def collect(generator: Generator, options: SamplingOptions) -> tuple[list[str], Completion]:
    stream, pieces = generator.stream([10], options), []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


def test_stream_gives_whole_characters_and_the_completion() -> None:
    text = "é中😀".encode()
    pieces = {i + 2: bytes([byte]) for i, byte in enumerate(text)}
    script = "".join(chr(i + 2) for i in range(len(text))) + "\x00"
    generator = scripted({10: script}, pieces=pieces)
    found, completion = collect(generator, SamplingOptions(max_new_tokens=50))
    assert found == ["é", "中", "😀"]
    assert completion.text == "é中😀" and completion.finish_reason == "stop"
    generator = scripted({10: script}, pieces=pieces)
    found, completion = collect(generator, SamplingOptions(max_new_tokens=len(text) - 1))
    assert found == ["é", "中", "\ufffd"] and completion.finish_reason == "length"


def test_stream_equals_generate(generator: Generator) -> None:
    options = SamplingOptions(max_new_tokens=20, top_k=0, seed=8)
    (prompt,) = prompts_of([10])
    stream = generator.stream(prompt, options)
    next(stream)
    stream.close()
    assert free(generator)
    assert "".join(generator.stream(prompt, options)) == generator.generate([prompt], options)[0].text
    assert list(generator.stream([], options)) == []


def test_engine_is_free_after_an_error_in_on_row(generator: Generator) -> None:
    prompts = prompts_of([3, 5])
    options = SamplingOptions(max_new_tokens=4)

    def stumble(index: int, completion: Completion) -> None:
        raise ArithmeticError

    with pytest.raises(ArithmeticError) as kept:
        generator.generate(prompts, options, on_row=stumble)
    assert free(generator) and len(generator.generate(prompts, options)) == 2
    assert kept.traceback  # still held here, with everything that it refers to


def test_speed_counts_real_tokens(generator: Generator) -> None:
    generator.speed = Speed()
    generator.generate(prompts_of([3, 9, 5]), SamplingOptions(max_new_tokens=4), batch_size=2)
    assert (generator.speed.prompt_tokens, generator.speed.decode_tokens) == (17, 9)
    assert len(generator.speed.first_token_seconds) == 2
    assert generator.speed.prefill_seconds > 0 and generator.speed.decode_seconds > 0
