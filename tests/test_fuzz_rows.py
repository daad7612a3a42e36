"""Random JSON and random Unicode in every format of rows, through every kind of tokenizer.

Each row is either right or named with file and line by one clear error; whatever is written is JSON again. Seconds
of it run with the suite, minutes with `-m slow`.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from family_cases import FIXTURES, WITH_TOKENIZER, case
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import LLAMA2, write_bpe, write_sentencepiece

from utils import errors
from utils.data import pretrain_build
from utils.data.dataset import tokenize
from utils.data.encode import IGNORED, DataReport, Example, encode_row, encode_source
from utils.data.lines import RowFault, read_lines
from utils.data.rows import Row, check_dataset, to_row
from utils.data.sources import FileSource
from utils.data.stream import StreamDataset
from utils.data.template import ChatTemplate
from utils.errors import UserError
from utils.families.tokenizers import Tokenizer, load_tokenizer
from utils.inference.batch import answer_file
from utils.inference.request import Completion
from utils.inference.sampling import SamplingOptions
from utils.parallel.process_group import ProcessGroup

QUICK = settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))
SLOW = settings(deadline=None, max_examples=2500, print_blob=True, suppress_health_check=list(HealthCheck))
LONG = 100_000
OPTIONS = SamplingOptions(max_new_tokens=1)

# --- tokenizers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kit:
    """A tokenizer with its folder, and the template that goes with it."""

    folder: Path
    config: dict[str, Any]
    tokenizer: Tokenizer
    template: ChatTemplate


FOLDER = tempfile.TemporaryDirectory()
KINDS = [*WITH_TOKENIZER, "bpe", "sentencepiece", "sentencepiece chat"]


@cache
def kit(kind: str) -> Kit:
    default = None
    if kind in WITH_TOKENIZER:
        checkpoint = case(kind).checkpoint
        folder, config, default = FIXTURES / kind, dict(checkpoint.config), checkpoint.family.chat_template
    else:
        folder = Path(FOLDER.name) / kind
        chat = {"chat_template": LLAMA2} if kind == "sentencepiece chat" else {}
        config = write_bpe(folder) if kind == "bpe" else write_sentencepiece(folder, **chat)
    return Kit(folder, config, load_tokenizer(folder, config), ChatTemplate.load(folder, default=default))


# --- texts, rows, files --------------------------------------------------------------------------------

MARKS = "<s> </s> <unk> <|im_start|> <|im_end|> <|endoftext|> <|extra_0|> [INST] [MASK] [gMASK] <sop> <eop> <n>"
WRITTEN = st.sampled_from(
    [*MARKS.split(), "<|tab|>", "<|blank_10|>", "<think>", "\u2581", "<0x0A>", "{{ x }}", "{% if %}"]
)
STRANGE = st.sampled_from(
    "\ud83d\udc00\0\x01\x1b\x1f\x7f\x85\u2028\u202e\u200f\u0301\ufeff\ufffe\U0001f600\u3000 \n\t\r<|>\u0627\u6211"
)
SOUND = st.lists(st.one_of(st.text(max_size=8), WRITTEN, st.sampled_from(" \n\t")), min_size=1, max_size=4).map("".join)
ANY = st.lists(st.one_of(st.text(max_size=8), st.text(STRANGE, max_size=6), WRITTEN), max_size=4).map("".join)
TEXT = st.one_of(SOUND, SOUND, SOUND, ANY)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY, inner, max_size=3),
    max_leaves=6,
)


KNOWN = "system system_prompt system_message context tools tool_calls reasoning_content weight train loss images input"
KEYS = st.sampled_from(KNOWN.split())


@st.composite
def rows(draw: st.DrawFn, text: st.SearchStrategy[str] = TEXT) -> dict[str, Any]:
    """A row of one of the formats, one to three rounds."""
    count = draw(st.integers(1, 3))
    pairs = [(draw(text), draw(text)) for _ in range(count)]
    system = {"system": draw(text)} if draw(st.integers(0, 3)) == 0 else {}
    kind = draw(st.sampled_from(["pair", "rounds", "messages", "alpaca", "sharegpt"]))
    if kind == "pair":
        return {"src": pairs[0][0], "tgt": pairs[0][1]}
    if kind == "rounds":
        return {"src": [question for question, _ in pairs], "tgt": [answer for _, answer in pairs]}
    if kind == "alpaca":
        more = {"input": draw(text)} if draw(st.booleans()) else {}
        history = {"history": [list(pair) for pair in pairs[:-1]]} if count > 1 else {}
        return {"instruction": pairs[-1][0], "output": pairs[-1][1], **more, **history, **system}
    key, who, what, asks, answers = (
        ("messages", "role", "content", "user", "assistant")
        if kind == "messages"
        else ("conversations", "from", "value", "human", "gpt")
    )
    turns = [{who: role, what: content} for pair in pairs for role, content in zip((asks, answers), pair, strict=True)]
    return {key: turns, **system}


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A row in which one place, at any depth, holds another value; or one more key."""
    row = json.loads(json.dumps(draw(rows())))
    here: Any = row
    while True:
        places = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not places or (isinstance(here, dict) and draw(st.integers(0, 4)) == 0):
            if isinstance(here, list):
                return row
            here[draw(ANY | KEYS)] = draw(JSON)
            return row
        place = draw(st.sampled_from(places))
        if not isinstance(here[place], dict | list) or draw(st.booleans()):
            here[place] = draw(JSON)
            return row
        here = here[place]


def written(value: Any, ascii_only: bool) -> bytes:
    """As JSON; halves of surrogate pairs escaped, or as bytes that are no UTF-8."""
    return json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


LONG_NUMBER = b'{"src": "a", "tgt": "b", "n": ' + b"1" * 5000 + b"}"
DEEP = b'{"src": "a", "tgt": "b", "n": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
LINES = st.one_of(
    st.builds(written, rows(), st.booleans()),
    st.builds(written, rows(), st.just(True)),
    st.builds(written, mutated(), st.booleans()),
    st.builds(written, JSON, st.booleans()),
    st.binary(max_size=12).map(lambda content: content.replace(b"\n", b"")),
    st.sampled_from(
        [b"", b"  ", LONG_NUMBER, DEEP, b'{"src": NaN, "tgt": 1e999}', b'{"src": "a", "tgt": "b", "n": NaN}']
    ),
)
FILES = st.one_of(
    st.lists(LINES, min_size=1, max_size=4).map(b"\n".join),
    st.lists(LINES, min_size=1, max_size=4).map(lambda lines: b"\xef\xbb\xbf" + b"\r\n".join(lines)),
    st.builds(
        lambda lines, behind: b"[" + b",\n".join(lines) + b"]" + behind,
        st.lists(st.builds(written, rows() | mutated(), st.booleans()) | LINES, max_size=3),
        st.sampled_from([b"", b"\n", b" ", b"[]", b"x"]),
    ),
)
LIMITS = st.sampled_from([(24, 40), (1 << 20, 1 << 21)])

# --- what must hold ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    before, errors.silent = errors.silent, True
    yield
    errors.silent = before


def named(faults: Sequence[str], file: Path) -> bool:
    """Whether each fault begins with the places of rows, or is of the file as a whole."""
    place = rf"{re.escape(str(file))} line \d+(, \d+)*"
    whole = rf"{re.escape(str(file))}: (empty|no row could be used|none of its|one JSON array)|.*more broken rows"
    return all(re.match(rf"{place}(, {place})*: |{whole}", fault) for fault in faults)


def good_rows(file: Path) -> tuple[list[Row], int]:
    """The rows of a file that can be used for training, and how many cannot."""
    good, broken = [], 0
    for line in read_lines(file):
        try:
            good.append(to_row(line, file))
        except RowFault as fault:
            assert str(fault)
            broken += 1
    return good, broken


def is_right(row: Row, example: Example, report: DataReport, own: Kit) -> None:
    """Ids that the model has, labels that are the ids shifted, special tokens of the template alone, the very texts."""
    ids, labels = example.input_ids.tolist(), example.labels.tolist()
    assert min(ids) >= 0 and max(ids) < own.tokenizer.vocabulary and len(ids) == len(labels)
    assert all(label in (IGNORED, following) for label, following in zip(labels, ids[1:], strict=False))
    assert labels[-1] != IGNORED
    if report.counts:  # cut, or only partly learned
        return
    learned = [label for label in labels if label != IGNORED]
    whole = [*ids, labels[-1]]
    if len(row.messages) == 2:
        prompt, _ = encode_source(row.question, own.tokenizer, own.template, 1 << 20)
        assert whole[: len(prompt)] == prompt and whole[len(prompt) :] == learned
    # what characters become that it does not have, and what people may write themselves
    free = {own.tokenizer.token_id(name) for name in ("<unk>", "[UNK]", *own.tokenizer.text_tokens)}
    special = set(own.tokenizer.special_tokens.values()) - free
    plain = Row(tuple({**message, "content": "a"} for message in row.messages), row.file, row.line, {})
    wanted = encode_row(plain, own.tokenizer, own.template, 1 << 20, 1 << 21)
    assert isinstance(wanted, Example)
    counts = [
        Counter(i for i in [*one.input_ids.tolist(), one.labels[-1]] if i in special) for one in (example, wanted)
    ]
    assert counts[0] == counts[1]


def check_training(kind: str, content: bytes, limits: tuple[int, int]) -> None:
    own = kit(kind)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "train.json"
        file.write_bytes(content)
        good, broken = good_rows(file)
        faults: list[str] = []
        examples: list[Example] = []
        for row in good:
            report = DataReport()
            try:
                found = encode_row(row, own.tokenizer, own.template, *limits, report)
            except UserError as error:
                faults += error.faults
                continue
            if isinstance(found, Example):
                is_right(row, found, report, own)
                examples.append(found)
        assert named(faults, file)
        source = FileSource([file], None)
        try:
            check_dataset(name, ["train"])
            tokenized = tokenize(source, own.tokenizer, own.template, *limits, progress=False)
        except UserError as error:
            assert (broken or faults or not examples) and named(error.faults, file)
        else:
            assert not broken and not faults and tokenized.report.kept == len(examples)
            assert tokenized.input_ids.tolist() == [i for one in examples for i in one.input_ids.tolist()]
        try:
            stream = StreamDataset(source, own.tokenizer, own.template, src_length=limits[0], max_length=limits[1])
            items = list(islice(stream, max(len(examples), 1)))
        except UserError as error:
            assert content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[" or not examples
            assert named(error.faults, file)
        else:
            assert sorted(i["input_ids"].tolist() for i in items) == sorted(e.input_ids.tolist() for e in examples)


class Echo:
    """Answers each prompt with its own text."""

    speed = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def generate(self, prompts: Any, options: Any, batch_size: int, on_row: Any, numbers: Any) -> None:
        for index, prompt in enumerate(prompts):
            on_row(index, Completion(self.tokenizer.decode(prompt), (), "stop", len(prompt)))


def no_constants(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def check_prediction(kind: str, content: bytes, src_length: int) -> None:
    own = kit(kind)
    prepared: Any = SimpleNamespace(
        checkpoint=SimpleNamespace(files=[]),
        lora=None,
        prefix=None,
        dtype="float32",
        processes=ProcessGroup(),
        tokenizer=own.tokenizer,
        template=own.template,
        encode=lambda messages, limit: encode_source(messages, own.tokenizer, own.template, limit),
    )
    with tempfile.TemporaryDirectory() as name:
        file, output = Path(name) / "dev.json", Path(name) / "output.json"
        file.write_bytes(content)
        lines = list(read_lines(file))
        try:
            answer_file(
                file,
                output,
                prepared,
                lambda: Echo(own.tokenizer),  # type: ignore[arg-type,return-value]
                OPTIONS,
                src_length=src_length,
                batch_size=2,
                resume=True,
            )
        except UserError as error:
            assert named(error.faults, file) and not output.exists()
            return
        answers = [json.loads(line, parse_constant=no_constants) for line in output.read_bytes().split(b"\n")[:-1]]
        assert len(answers) == len(lines)
        for line, answer in zip(lines, answers, strict=True):
            if answer["output"] is None:
                assert named([answer["error"]], file) and f"line {line.number}: " in answer["error"]
                continue
            row = to_row(line, file, require_answer=False)
            if "src" in row.raw:
                assert (answer["src"], answer["tgt"]) == (row.raw["src"], row.raw.get("tgt"))
            ids, _ = encode_source(row.question, own.tokenizer, own.template, src_length)
            assert answer["output"] == own.tokenizer.decode(ids)


def check_token_file(kind: str, content: bytes, split: bool) -> None:
    own = kit(kind)
    lines = content.split(b"\n")
    options = pretrain_build.BuildOptions(append_eos=True, split_sentences=split)
    pretrain_build._Worker.tokenizer, pretrain_build._Worker.options = own.tokenizer, options
    file = Path("text.jsonl")
    try:
        encoded = pretrain_build.encode_block(pretrain_build.Block(str(file), 1, lines))
    except UserError as error:
        assert named(error.faults, file)
        return
    texts = [
        json.loads(line.removeprefix(b"\xef\xbb\xbf"))["text"] for line in lines if line.strip(b"\xef\xbb\xbf \t\r\n")
    ]
    ids = np.frombuffer(encoded.ids, dtype=np.dtype(pretrain_build.id_type(own.tokenizer)))
    sizes, sequences = (np.frombuffer(part, dtype=np.int32) for part in (encoded.sizes, encoded.sequences))
    assert len(sequences) + encoded.empty == len(texts) and sequences.sum() == len(sizes) and sizes.sum() == len(ids)
    assert not len(ids) or (
        ids.max() < own.tokenizer.vocabulary and int((ids == own.tokenizer.eos_id).sum()) == len(sequences)
    )
    if not split:
        whole = [[*found, own.tokenizer.eos_id] for text in texts if (found := own.tokenizer.encode_text(text))]
        assert ids.tolist() == [i for one in whole for i in one]


BLOCKS = st.lists(
    st.one_of(
        st.builds(lambda text, flag: written({"text": text}, flag), SOUND, st.booleans()),
        st.builds(lambda text, flag: written({"text": text}, flag), ANY, st.booleans()),
        st.builds(written, JSON | st.builds(lambda value: {"text": value}, JSON), st.booleans()),
        LINES,
    ),
    min_size=1,
    max_size=4,
).map(b"\n".join)

# --- the tests -------------------------------------------------------------------------------------------

TRAINING = given(kind=st.sampled_from(KINDS), content=FILES, limits=LIMITS)
PREDICTION = given(kind=st.sampled_from(KINDS), content=FILES, src_length=st.sampled_from([24, 1 << 20]))
TOKEN_FILES = given(kind=st.sampled_from(KINDS), content=BLOCKS, split=st.booleans())


@QUICK
@TRAINING
def test_training_rows(kind: str, content: bytes, limits: tuple[int, int]) -> None:
    check_training(kind, content, limits)


@QUICK
@PREDICTION
def test_questions(kind: str, content: bytes, src_length: int) -> None:
    check_prediction(kind, content, src_length)


@QUICK
@TOKEN_FILES
def test_token_files(kind: str, content: bytes, split: bool) -> None:
    check_token_file(kind, content, split)


@pytest.mark.slow
@SLOW
@TRAINING
def test_many_training_rows(kind: str, content: bytes, limits: tuple[int, int]) -> None:
    check_training(kind, content, limits)


@pytest.mark.slow
@SLOW
@PREDICTION
def test_many_questions(kind: str, content: bytes, src_length: int) -> None:
    check_prediction(kind, content, src_length)


@pytest.mark.slow
@SLOW
@TOKEN_FILES
def test_many_token_files(kind: str, content: bytes, split: bool) -> None:
    check_token_file(kind, content, split)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(SLOW, max_examples=2)
@example(character=" ")
@example(character="\n")
@example(character="7")
@example(character="\u6211")
@example(character="\ud83d")
@given(character=st.characters())
def test_a_hundred_thousand_of_one_character(kind: str, character: str) -> None:
    """In a question, in an answer, and in a document."""
    long = character * LONG
    content = b"\n".join(written(row, True) for row in ({"src": long, "tgt": "b"}, {"src": "a", "tgt": f"x{long}"}))
    check_training(kind, content, (1 << 20, 1 << 21))
    check_prediction(kind, content, 1 << 20)
    check_prediction(kind, content, 64)
    check_token_file(kind, written({"text": long}, True), False)
