"""Long conversations: what is known of their beginning changes no id, and less is written anew."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
from tiny_tokenizers import CHATML, LLAMA2, write_bpe

from utils.data.encode import encode_source
from utils.data.history import CHARACTERS, SHORTEST, History, Told
from utils.data.marks import Rendered
from utils.data.talk import Talk
from utils.data.template import JinjaTemplate, Message
from utils.families.tokenizers import Tokenizer, load_tokenizer

# writes earlier answers in another way than the last one
FORGETFUL = (
    "{% for m in messages %}{% set said = m['content'] if loop.last else m['content'][:1] %}"
    "{{ m['role'] + ': ' + said + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("bpe")
    return load_tokenizer(folder, write_bpe(folder))


def conversation(rounds: int, seed: int) -> list[Message]:
    dice = random.Random(seed)
    texts = [
        "".join(dice.choices(["one ", "你好", "<|im_end|>", "\n", " two"], k=3)) + "." for _ in range(2 * rounds + 1)
    ]
    return [{"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(texts)]


@pytest.mark.parametrize("text", [CHATML, LLAMA2, FORGETFUL], ids=["chatml", "llama2", "forgetful"])
def test_a_growing_conversation_has_the_ids_of_one_that_is_new(text: str, tokenizer: Tokenizer) -> None:
    template, messages = JinjaTemplate(text, "test"), conversation(2 * SHORTEST, 1)
    for end in range(1, len(messages) + 1, 2):
        new = JinjaTemplate(text, "test").rounds(tokenizer, messages[:end])
        assert template.rounds(tokenizer, messages[:end]) == new
    changed = [*messages[:4], {"role": "user", "content": "other"}, *messages[5:]]
    assert template.rounds(tokenizer, changed) == JinjaTemplate(text, "test").rounds(tokenizer, changed)


def test_what_is_known_is_not_written_again(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    render = Talk.render
    monkeypatch.setattr(Talk, "render", lambda *words, **options: written.append(1) or render(*words, **options))
    template, messages = JinjaTemplate(CHATML, "test"), conversation(30, 2)
    template.encode_prompt(tokenizer, messages[:-2])
    written.clear()
    template.encode_prompt(tokenizer, messages)
    assert len(written) == 3  # the new answer's question, the answer, what asks for the next
    template.with_values({"think": False}).encode_prompt(tokenizer, messages)
    assert len(written) > 60


def test_known_texts_have_a_bound(tokenizer: Tokenizer) -> None:
    history, size = History(), CHARACTERS // 4
    talks = [conversation(SHORTEST, seed)[:-1] for seed in range(8)]
    for messages in talks:
        history.add(tokenizer, messages, None, Told(len(messages), (), (), Rendered("x" * size)))
    known = [history.longest(tokenizer, messages, None).length > 0 for messages in talks]
    assert known == [False] * 4 + [True] * 4
    assert not history.longest(tokenizer, talks[-1], "other").length


def test_a_template_goes_to_other_processes(tokenizer: Tokenizer) -> None:
    history = pickle.loads(pickle.dumps(History()))
    assert history.longest(tokenizer, conversation(9, 3), None) == Told()


def test_a_long_conversation_is_cut_in_few_tries(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    rounds = JinjaTemplate.rounds
    monkeypatch.setattr(JinjaTemplate, "rounds", lambda *words: tried.append(1) or rounds(*words))
    template, messages = JinjaTemplate(CHATML, "test"), conversation(100, 4)
    whole = template.encode_prompt(tokenizer, messages)
    tried.clear()
    ids, was_cut = encode_source(messages, tokenizer, template, len(whole) // 2)
    assert was_cut and len(ids) <= len(whole) // 2 < len(ids) + 200
    assert len(tried) < 25
