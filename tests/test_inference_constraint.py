"""Answers of a given form: an independent validator finds them valid, and hostile forms are refused."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from dice import MORE, dice, generator_of
from family_cases import WITH_TOKENIZER, case
from numpy.typing import NDArray
from schemas import SCHEMAS
from tiny_tokenizers import write_bpe, write_sentencepiece

from utils.checkpoints.embedded import NAME as EMBEDDED
from utils.checkpoints.locate import locate
from utils.errors import UserError
from utils.families.token_bytes import token_bytes
from utils.families.tokenizers import Tokenizer, load_tokenizer
from utils.inference.constraint import MOST_CHARACTERS, MOST_OF_CHOICE, Constrainer, check
from utils.inference.digits import MOST_DIGITS
from utils.inference.generator import Completion, Generator
from utils.inference.grammar import Grammar
from utils.inference.sampling import SamplingOptions

# Their tiny vocabularies have no braces and no bytes.
CANNOT = {"chatglm_tiny", "glm_tiny"}
GREEDY = SamplingOptions(max_new_tokens=300)
SAMPLED = replace(GREEDY, top_k=0, temperature=1.5, seed=3)


def tokenizer_of(name: str, folder: Path) -> Tokenizer:
    if name == EMBEDDED:
        checkpoint = locate(EMBEDDED)
        return load_tokenizer(checkpoint.folder, checkpoint.config)
    if name in ("bpe", "sentencepiece"):
        write = write_bpe if name == "bpe" else write_sentencepiece
        return load_tokenizer(folder, write(folder))
    return load_tokenizer(case(name).folder, case(name).checkpoint.config)


def fits(schema: Any, text: str) -> bool:
    """Whether a validator finds a text valid. It takes second 60 only where a leap second may be."""
    text = re.sub(r"(\d\d:\d\d):60", r"\1:59", text)
    return bool(jsonschema_rs.validator_for(schema, validate_formats=True).is_valid(json.loads(text)))


def of_schema(schema: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_of("bpe", tmp_path_factory.mktemp("bpe"))


def answer(tokenizer: Tokenizer, options: SamplingOptions, seed: int = 1) -> Completion:
    (found,) = generator_of(tokenizer, dice(tokenizer, seed)).generate([[5, 6]], options)
    assert found.error is None
    return found


# --- valid answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bpe", "sentencepiece", *WITH_TOKENIZER])
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers_of_fifty_schemas_are_valid(name: str, options: SamplingOptions, tmp_path: Path) -> None:
    assert len(SCHEMAS) == 50
    tokenizer = tokenizer_of(name, tmp_path)
    generator = generator_of(tokenizer, dice(tokenizer))
    each = [replace(options, grammar=of_schema(schema)) for schema in SCHEMAS.values()]
    for (key, schema), found in zip(SCHEMAS.items(), generator.generate([[5, 6]] * 50, each), strict=True):
        if name in CANNOT and found.finish_reason == "error":
            assert found.error and "signs that the model's tokens lack" in found.error
            continue
        assert found.finish_reason == "stop", (key, found)
        assert fits(schema, found.text), (key, found.text)


@pytest.mark.matrix
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers_of_a_real_model_are_valid(options: SamplingOptions) -> None:
    from utils.inference.loading import load, prepare

    prepared = prepare(EMBEDDED, device="cpu")
    generator = load(prepared, "cpu")
    ids = prepared.encode([{"role": "user", "content": "Give me an example as JSON."}], 512)[0]
    each = [replace(options, grammar=of_schema(schema)) for schema in SCHEMAS.values()]
    for (key, schema), found in zip(SCHEMAS.items(), generator.generate([ids] * 50, each), strict=True):
        if found.finish_reason == "length" and key in ("tree", "chain"):
            continue  # these may go on without end, and this model does
        assert found.finish_reason == "stop", (key, found.text)
        assert fits(schema, found.text), (key, found.text)


@pytest.mark.parametrize("name", ["bpe", "sentencepiece", *sorted(set(WITH_TOKENIZER) - CANNOT)])
def test_patterns_choices_objects_and_grammars(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(name, tmp_path)
    generator = generator_of(tokenizer, dice(tokenizer))
    choices = ["yes", " no", "vielleicht später", "はい\n", '"quoted" \\ back', "/slash/"]
    pattern = r"(/[a-z]{1,3}){2}\n( x|[0-9])\.\\/?"
    lark = 'start: "<" NAME ">" item "end"\nNAME: /[a-z]{2}/\nitem: "(" item ")" | "x"'
    options = [
        replace(SAMPLED, grammar=grammar)
        for grammar in (
            Grammar("choice", json.dumps(choices)),
            Grammar("regex", pattern),
            Grammar("json_object"),
            Grammar("lark", lark),
        )
        for _ in range(8)
    ]
    texts = [found.text for found in generator.generate([[5]] * len(options), options) if not found.error]
    assert len(texts) == len(options)
    assert set(texts[:8]) <= set(choices)
    assert all(re.fullmatch(pattern, text) for text in texts[8:16]), texts[8:16]
    assert all(isinstance(json.loads(text), dict) for text in texts[16:24])
    nested = [re.fullmatch(r"<[a-z]{2}>(\(*)x(\)*)end", text) for text in texts[24:]]
    assert all(found and len(found[1]) == len(found[2]) for found in nested), texts[24:]


# --- how answers begin, go on and end -------------------------------------------------------------------


def test_special_tokens_are_in_no_form_unless_a_grammar_names_them(tokenizer: Tokenizer) -> None:
    constrainer = Constrainer(tokenizer, tokenizer.vocabulary + MORE, tokenizer.eos_ids)
    free = constrainer.start(Grammar("regex", "(?s:.*)")).mask()
    allowed = set(np.flatnonzero(free).tolist())
    assert allowed & tokenizer.special_ids == set(tokenizer.eos_ids)
    assert max(allowed) < tokenizer.vocabulary and len(free) == tokenizer.vocabulary + MORE
    named = constrainer.start(Grammar("lark", 'start: <[1]> "x"'))
    assert np.flatnonzero(named.mask()).tolist() == [1]
    named.accept(1)
    x = tokenizer.encode_text("x")[0]
    assert np.flatnonzero(named.mask()).tolist() == [x]
    named.accept(x)
    assert named.ended


def test_an_answer_ends_where_nothing_may_follow(tokenizer: Tokenizer) -> None:
    """The model never says an end token; where more may come, it goes on."""
    function = dice(tokenizer)
    ends = list(tokenizer.eos_ids)

    def endless(text: list[int]) -> NDArray[np.float64]:
        values = function(text)
        values[ends] = -1e9
        return values

    generator = generator_of(tokenizer, endless)
    closed, opened = generator.generate(
        [[5]] * 2,
        [replace(GREEDY, max_new_tokens=40, grammar=Grammar("regex", pattern)) for pattern in ("ab{3}c", "ab{3}c*")],
    )
    assert (closed.text, closed.finish_reason) == ("abbbc", "stop")
    assert opened.finish_reason == "length" and re.fullmatch("ab{3}c+", opened.text)


def test_end_tokens_compete_where_the_answer_may_go_on(tokenizer: Tokenizer) -> None:
    grammar = Grammar("regex", "[a-z]+")
    lengths = set()
    for seed in range(6):
        found = answer(tokenizer, replace(SAMPLED, seed=seed, grammar=grammar))
        assert found.finish_reason == "stop" and found.tokens[-1] in tokenizer.eos_ids
        lengths.add(len(found.tokens))
    assert len(lengths) > 1


@pytest.mark.parametrize(
    "more",
    [
        {"repetition_penalty": 2.0, "presence_penalty": 1.0, "frequency_penalty": 1.0},
        {"no_repeat_ngram_size": 2},
        {"logit_bias": ((2, 100.0), (7, -100.0))},
        {"min_new_tokens": 40},
        {"ignore_eos": True},
        {"prompt_lookup_num_tokens": 4},
        {"logprobs": True, "top_logprobs": 3},
        {"top_p": 0.5, "min_p": 0.2},
    ],
    ids=lambda more: next(iter(more)),
)
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_form_holds_whatever_else_is_asked(tokenizer: Tokenizer, options: SamplingOptions, more: dict) -> None:
    schema = SCHEMAS["list of objects"]
    found = answer(tokenizer, replace(options, **more, grammar=of_schema(schema)))
    assert found.finish_reason == "stop" and fits(schema, found.text)
    if "prompt_lookup_num_tokens" in more:
        assert found == answer(tokenizer, replace(options, grammar=of_schema(schema)))


def test_an_answer_that_is_cut_is_a_beginning(tokenizer: Tokenizer) -> None:
    options = replace(SAMPLED, grammar=of_schema(SCHEMAS["invoice"]))
    whole = answer(tokenizer, options)
    for length in range(1, len(whole.tokens), 7):
        cut = answer(tokenizer, replace(options, max_new_tokens=length))
        assert cut.finish_reason == "length" and whole.text.startswith(cut.text.rstrip("\ufffd"))


def test_answers_side_by_side_have_their_own_place_in_a_form(tokenizer: Tokenizer) -> None:
    grammar = of_schema(SCHEMAS["reasoning steps"])
    generator = generator_of(tokenizer, dice(tokenizer))
    options = replace(SAMPLED, grammar=grammar)
    together = generator.generate([[5]] * 8, options)
    alone = [generator.generate([[5]], options, numbers=[number])[0] for number in range(8)]
    assert together == alone and len({found.text for found in together}) == 8


# --- what a model would go on with for ever --------------------------------------------------------------

NUMBERS: dict[str, Any] = {
    "any": {"type": "number"},
    "in bounds": {"type": "number", "minimum": 0, "maximum": 1},
    "more than nothing": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "less than one": {"type": "number", "exclusiveMaximum": 1},
    "whole": {"type": "integer"},
    "tens": {"type": "integer", "multipleOf": 10},
    "several": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 3},
    "named": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"], "maxProperties": 1},
}


def eager(tokenizer: Tokenizer, signs: bytes) -> Generator:
    """A model that prefers tokens of certain signs to all others, and otherwise says as `dice` does."""
    function = dice(tokenizer)
    tokens = (token_bytes(tokenizer, place) for place in range(tokenizer.vocabulary))
    bonus = np.array([30.0 * (bool(token) and not token.strip(signs)) for token in tokens] + [0.0] * MORE)
    return generator_of(tokenizer, lambda text: function(text) + bonus)


@pytest.mark.parametrize("name", ["bpe", "sentencepiece", EMBEDDED])
@pytest.mark.parametrize("signs", [b"0", b"9", b"0123456789", b"0123456789.eE+-"])
def test_numbers_end(name: str, signs: bytes, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(name, tmp_path)
    each = [replace(SAMPLED, grammar=of_schema(schema)) for schema in NUMBERS.values()]
    for (key, schema), found in zip(
        NUMBERS.items(), eager(tokenizer, signs).generate([[5]] * len(each), each), strict=True
    ):
        assert found.finish_reason == "stop", (key, found.text)
        assert fits(schema, found.text), (key, found.text)
        assert max(map(len, re.findall(r"\d+", found.text))) <= MOST_DIGITS + 1, (key, found.text)


def test_digits_that_are_text_or_must_be_stay(tokenizer: Tokenizer) -> None:
    long = "1" * 50
    forms = [
        of_schema({"type": "string", "pattern": "^[0-9]+$", "minLength": 40, "maxLength": 50}),
        of_schema({"const": {'"1\\': ["\\", long]}}),
        Grammar("calls", f'start: "{long}"'),
        Grammar("regex", "[0-9]{40,50}"),
        Grammar("lark", "start: /[0-9]{40,50}/"),
    ]
    options = [replace(SAMPLED, grammar=form) for form in forms]
    text, inside, *others = [found.text for found in eager(tokenizer, b"1").generate([[5]] * len(forms), options)]
    assert json.loads(text) == long and json.loads(inside) == {'"1\\': ["\\", long]}
    assert others == [long, long, long]


def test_numbers_of_calls_end(tokenizer: Tokenizer) -> None:
    grammar = Grammar("calls", 'start: "<f 1>" %json {"type": "array", "items": {"type": "number"}, "maxItems": 1} "<"')
    (found,) = eager(tokenizer, b"1").generate([[5]], replace(SAMPLED, grammar=grammar))
    assert found.finish_reason == "stop" and re.fullmatch(r"<f 1>\s*\[\s*1{20}\D+", found.text), found.text


@pytest.mark.parametrize("signs", [b" ", b"\n", b" \n\t\r"])
def test_blanks_end(tokenizer: Tokenizer, signs: bytes) -> None:
    for key in ("invoice", "list of objects", "several types"):
        schema = SCHEMAS[key]
        options = replace(SAMPLED, max_new_tokens=4000, grammar=of_schema(schema))
        (found,) = eager(tokenizer, signs).generate([[5]], options)
        assert found.finish_reason == "stop" and fits(schema, found.text), (key, found.text)


# --- what is refused ------------------------------------------------------------------------------------


def nested(depth: int) -> Any:
    schema: Any = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def chain(length: int) -> Any:
    links = {str(place): {"$ref": f"#/$defs/{place + 1}"} for place in range(length)}
    return {"$defs": {**links, str(length): {"type": "null"}}, "$ref": "#/$defs/0"}


HOSTILE: dict[str, Grammar] = {
    "deep": of_schema(nested(150)),
    "very deep": Grammar("json_schema", '{"items":' * 400 + "{}" + "}" * 400),
    "long": of_schema({"enum": [f"{place:09}" for place in range(MOST_CHARACTERS // 9)]}),
    "references": of_schema(chain(1500)),
    "patterns that meet": of_schema({"allOf": [{"type": "string", "pattern": f".*a.{{{n}}}b"} for n in range(5, 30)]}),
    "alternatives that multiply": of_schema(
        {"allOf": [{"anyOf": [{"required": [f"{n}{m}"]} for m in range(3)]} for n in range(20)]}
    ),
    "large multiple": of_schema({"type": "integer", "multipleOf": 7919 * 7907}),
    "itself": of_schema({"$ref": "#"}),
    "another machine": of_schema({"$ref": "http://localhost/schema.json"}),
    "a file": of_schema({"$ref": "file:///etc/passwd"}),
    "unknown keyword": of_schema({"type": "array", "uniqueItems": True}),
    "unknown type": of_schema({"type": "text"}),
    "nothing fits": of_schema({"type": "integer", "minimum": 2, "maximum": 1}),
    "no schema": Grammar("json_schema", "[1]"),
    "no JSON": Grammar("json_schema", "{"),
    "deep JSON": Grammar("json_schema", '{"a":' * 5000),
    "false": Grammar("json_schema", "false"),
    "look-ahead": Grammar("regex", "(?=a)b"),
    "open group": Grammar("regex", "(" * 2000),
    "a long count": Grammar("regex", "a{1000000}"),
    "too much from the second step on": Grammar("regex", "(a?){500}a{500}"),
    "open escape": Grammar("regex", "a\\"),
    "no choices": Grammar("choice", "[]"),
    "long choice": Grammar("choice", json.dumps(["a", "b" * (MOST_OF_CHOICE + 1)])),
    "no start": Grammar("lark", 'begin: "a"'),
    "endless": Grammar("lark", "start: start"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_form_that_cannot_be_followed_is_refused_soon(name: str) -> None:
    started = time.monotonic()
    with pytest.raises(UserError) as found:
        check(HOSTILE[name])
    assert time.monotonic() - started < 20  # one second of work on a machine that does nothing else
    message = str(found.value)
    assert "\n" not in message and len(message) < 400 and message.startswith("the ")


@pytest.mark.parametrize(
    "grammar",
    [
        of_schema({"type": "string", "minLength": 10**6}),
        of_schema({"type": "array", "minItems": 10**9}),
        of_schema({"type": "string", "pattern": "^((a+)+)+b$"}),
        of_schema({"type": "object", "properties": {"child": {"$ref": "#"}}}),
        of_schema(nested(40)),
        Grammar("regex", "(a?){200}a{200}"),
        Grammar("choice", json.dumps(["a" * MOST_OF_CHOICE, "b" * MOST_OF_CHOICE])),
        Grammar("regex", "(((a{1,100}){1,100}){1,100}){1,100}"),
        Grammar("json_object"),
    ],
)
def test_large_forms_are_fine_and_each_step_is_short(tokenizer: Tokenizer, grammar: Grammar) -> None:
    check(grammar)
    walk = Constrainer(tokenizer, tokenizer.vocabulary, tokenizer.eos_ids).start(grammar)
    random = np.random.default_rng(0)
    started = time.monotonic()
    for _ in range(50):
        if walk.ended:
            break
        walk.accept(int(random.choice(np.flatnonzero(walk.mask()))))
    assert time.monotonic() - started < 20


def test_every_schema_of_the_list_passes_the_check() -> None:
    for schema in list(SCHEMAS.values())[::7]:
        check(of_schema(schema))


def test_a_form_that_nobody_checked_is_an_error_of_its_request(tokenizer: Tokenizer) -> None:
    options = [
        replace(GREEDY, grammar=HOSTILE["unknown keyword"]),
        replace(GREEDY, grammar=of_schema({"type": "null"})),
    ]
    bad, good = generator_of(tokenizer, dice(tokenizer)).generate([[5]] * 2, options)
    assert bad.error and "uniqueItems" in bad.error
    assert good.text == "null"
