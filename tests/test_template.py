"""The one path from a conversation to ids: training and inference see the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, LLAMA2, write_bpe, write_sentencepiece

from utils.data.paddlenlp_template import PaddleNLPTemplate
from utils.data.template import ChatTemplate, JinjaTemplate, Message, PlainTemplate
from utils.errors import UserError
from utils.families.tokenizers import Tokenizer, load_tokenizer

PADDLENLP = {
    "system": "Be kind. ",
    "conversation": ["{{bos_token}}Human: {{user}}\n", "Bot: ", "{{bot}}\n"],
    "query": "something else: {{query}}",
}
TEMPLATES: dict[str, ChatTemplate] = {
    "chatml": JinjaTemplate(CHATML, "test"),
    "llama2": JinjaTemplate(LLAMA2, "test"),
    "plain": PlainTemplate(),
    "paddlenlp": PaddleNLPTemplate(PADDLENLP, "test"),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    bpe, pieces = tmp_path_factory.mktemp("bpe"), tmp_path_factory.mktemp("pieces")
    return {
        "bpe": load_tokenizer(bpe, write_bpe(bpe)),
        "pieces": load_tokenizer(pieces, write_sentencepiece(pieces)),
    }


def talk(*texts: str, system: str | None = None) -> list[Message]:
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for number, text in enumerate(texts):
        messages.append({"role": "assistant" if number % 2 else "user", "content": text})
    return messages


TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=30),
    st.lists(st.sampled_from(["one ", "\n", " ", "你好", "<|im_end|>", "</s>", "{{", "assistant"]), max_size=6).map(
        "".join
    ),
)


@pytest.mark.parametrize("kind", ["bpe", "pieces"])
@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=40)
@given(texts=st.lists(TEXTS, min_size=2, max_size=8).filter(lambda texts: len(texts) % 2 == 0))
def test_training_ids_begin_with_the_prompt_of_every_turn(
    name: str, kind: str, texts: list[str], tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer, template = tokenizers[kind], TEMPLATES[name]
    messages = talk(*texts)
    ids, supervised = template.encode_conversation(tokenizer, messages)
    assert len(ids) == len(supervised)
    for turn in range(0, len(messages), 2):
        prompt = template.encode_prompt(tokenizer, messages[: turn + 1])
        assert ids[: len(prompt)] == prompt
        assert supervised[len(prompt)]
    assert supervised[-1] and ids[-1] in tokenizer.special_ids


def test_chatml_ids_are_those_of_the_whole_text(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, template = tokenizers["bpe"], TEMPLATES["chatml"]
    text = (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nfive six<|im_end|>\n"
        "<|im_start|>assistant\nseven eight<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
        "<|im_start|>assistant\nten<|im_end|>"
    )
    ids, supervised = template.encode_conversation(tokenizer, talk("five six", "seven eight", "你好", "ten"))
    assert ids == tokenizer.encode(text)
    learned = tokenizer.decode([i for i, flag in zip(ids, supervised, strict=True) if flag], skip_special=False)
    assert learned == "seven eight<|im_end|>ten<|im_end|>"


def test_llama2_ids_are_those_of_the_published_code(tokenizers: dict[str, Tokenizer]) -> None:
    """LLaMA 2 encodes each finished round as one text between begin and end token."""
    tokenizer, template = tokenizers["pieces"], TEMPLATES["llama2"]
    rounds = [("What is the capital of France?", "Paris"), ("one", "two")]
    expected: list[int] = []
    for question, answer in rounds:
        expected += [1, *tokenizer.encode(f"[INST] {question} [/INST] {answer} "), 2]
    ids, supervised = template.encode_conversation(tokenizer, talk(*(text for pair in rounds for text in pair)))
    assert ids == expected
    assert sum(supervised) == sum(len(tokenizer.encode(f" {a} ", continuation=True)) + 1 for _, a in rounds)


# Numbers the rounds once there are several, and asks for the answer only at the end of the text.
REWRITING = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}"
    "{% if messages | length > 2 %}{{ 'Round ' ~ loop.index0 ~ ': ' }}{% endif %}{{ m.content }}"
    "{% if loop.last %}{{ '<|im_start|>' }}{% endif %}"
    "{% elif loop.last %}{{ '<|im_start|>' + m.content + eos_token }}"
    "{% else %}{{ '\n' + m.content + '\n' }}{% endif %}"
    "{% endfor %}"
)


def test_a_template_that_rewrites_history_learns_the_last_answer(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, template = tokenizers["bpe"], JinjaTemplate(REWRITING, "test")
    messages = talk("one", "two", "three", "four")
    ids, supervised = template.encode_conversation(tokenizer, messages)
    prompt = template.encode_prompt(tokenizer, messages[:3])
    assert prompt == tokenizer.encode("Round 0: one\ntwo\nRound 2: three<|im_start|>")
    assert ids == [*prompt, *tokenizer.encode("four"), tokenizer.eos_id]
    assert supervised == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    assert template.encode_prompt(tokenizer, messages[:1]) == tokenizer.encode("one<|im_start|>")


def test_plain_joins_begin_token_prompt_answer_and_end_token(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, template = tokenizers["pieces"], TEMPLATES["plain"]
    ids, supervised = template.encode_conversation(tokenizer, talk("one", "two"))
    assert ids == [1, *tokenizer.encode("one"), *tokenizer.encode("two"), 2]
    assert supervised == [False] * (1 + len(tokenizer.encode("one"))) + [True] * (len(tokenizer.encode("two")) + 1)
    assert template.encode_prompt(tokenizer, talk("one")) == [1, *tokenizer.encode("one")]


def test_paddlenlp_template(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, template = tokenizers["bpe"], TEMPLATES["paddlenlp"]
    ids, supervised = template.encode_conversation(tokenizer, talk("one", "two", "three", "four"))
    assert tokenizer.decode(ids, skip_special=False) == (
        "Be kind. <|im_start|>Human: one\nBot: two\n<|im_end|><|im_start|>Human: three\nBot: four\n<|im_end|>"
    )
    assert tokenizer.decode([i for i, flag in zip(ids, supervised, strict=True) if flag]) == "two\nfour\n"


def test_a_system_message_reaches_the_model(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["bpe"]
    for name in ("chatml", "plain", "paddlenlp"):
        ids = TEMPLATES[name].encode_prompt(tokenizer, talk("one", system="seven"))
        assert "seven" in tokenizer.decode(ids), name


def test_a_template_without_end_token_still_teaches_to_stop(tokenizers: dict[str, Tokenizer]) -> None:
    template = JinjaTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "test")
    ids, supervised = template.encode_conversation(tokenizers["bpe"], talk("one", "two"))
    assert ids[-1] == tokenizers["bpe"].eos_id and supervised[-1]


def test_the_end_of_turn_of_the_template_stops_generation(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path, {**write_bpe(tmp_path, eos_token="<|endoftext|>"), "eos_token_id": 0})
    assert tokenizer.eos_ids == (0,)
    assert TEMPLATES["chatml"].stop_ids(tokenizer) == (0, 2)


def test_order_in_which_templates_are_looked_for(tmp_path: Path) -> None:
    assert ChatTemplate.load(None, default=None).source == "plain"
    assert ChatTemplate.load(tmp_path, default=None).source == "plain"
    assert ChatTemplate.load(tmp_path, default="family").fingerprint() == JinjaTemplate("family", "").fingerprint()
    (tmp_path / "chat_template.json").write_text(json.dumps(PADDLENLP))
    assert ChatTemplate.load(tmp_path, default="family").source == "paddlenlp"
    for entry in ("settings", [{"name": "tools", "template": "x"}, {"name": "default", "template": "settings"}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
        loaded = ChatTemplate.load(tmp_path, default="family")
        assert loaded.fingerprint() == JinjaTemplate("settings", "").fingerprint()
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.load(tmp_path, default="f").fingerprint() == JinjaTemplate("file", "").fingerprint()
    (tmp_path / "mine.jinja").write_text("mine")
    loaded = ChatTemplate.load(tmp_path, default="f", override=tmp_path / "mine.jinja")
    assert loaded.fingerprint() == JinjaTemplate("mine", "").fingerprint()


OTHER_TYPES = [5, True, {"a": 1}, [], [1], [{"name": "default", "template": 5}], [{"name": [1], "template": "x"}]]


@pytest.mark.parametrize("found", OTHER_TYPES, ids=json.dumps)
def test_a_template_of_another_type_is_named(found: object, tmp_path: Path) -> None:
    """It may not be taken for none: the model would be asked and trained without its template."""
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({"chat_template": found}))
    with pytest.raises(UserError) as raised:
        ChatTemplate.load(tmp_path, default="family")
    [fault] = raised.value.faults
    assert fault.startswith(f"{file}: chat_template: expected a text, or a list")
    file.write_text('{"chat_template": null}')
    assert ChatTemplate.load(tmp_path, default=None).source == "plain"


def test_named_templates_without_a_default_ask_for_a_choice(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({"chat_template": [{"name": name, "template": "x"} for name in ("rag", "tools")]}))
    with pytest.raises(UserError, match=': has templates named "rag", "tools" and none named default'):
        ChatTemplate.load(tmp_path, default="family")
    (tmp_path / "mine.jinja").write_text("mine")
    assert ChatTemplate.load(tmp_path, default=None, override=tmp_path / "mine.jinja").source == "jinja"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.load(tmp_path, default=None).fingerprint() == JinjaTemplate("file", "").fingerprint()


@pytest.mark.parametrize("name", TEMPLATES)
def test_saved_template_is_found_again(name: str, tmp_path: Path) -> None:
    TEMPLATES[name].save(tmp_path)
    assert ChatTemplate.load(tmp_path, default=None).fingerprint() == TEMPLATES[name].fingerprint()


def test_saving_replaces_the_template_that_came_with_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old", "eos_token": "x"}))
    JinjaTemplate("new", "").save(tmp_path)
    settings_of = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings_of == {"chat_template": "new", "eos_token": "x"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% for %}", "line 1"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[3].content }}", "refuses this conversation"),
        ("{{ messages[-1].content }}", "rewrites earlier turns"),
    ],
)
def test_a_faulty_template_is_a_user_error(text: str, said: str, tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(UserError, match=said) as caught:
        JinjaTemplate(text, "mine.jinja").encode_conversation(tokenizers["bpe"], talk("one", "two"))
    assert "mine.jinja" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("system", 5, '"system" must be a string or null'),
        ("system", ["x"], '"system" must be a string or null'),
        ("system", "a\ud800", '"system" holds half of a surrogate pair'),
        ("conversation", ["{{user}}\udc00", "{{bot}}"], '"conversation" holds half of a surrogate pair'),
        ("query", "\ud800{{query}}", '"query" holds half of a surrogate pair'),
        ("note", {"by": "\ud800"}, '"note" holds half of a surrogate pair'),
    ],
)
def test_a_text_of_paddlenlp_that_is_none_names_its_key(tmp_path: Path, key: str, value: Any, said: str) -> None:
    file = tmp_path / "chat_template.json"
    file.write_text(json.dumps({**PADDLENLP, key: value}))
    with pytest.raises(UserError) as caught:
        ChatTemplate.load(tmp_path, default=None)
    assert caught.value.faults == (f"{file}: {said}",)


@pytest.mark.parametrize("content", ["[]", '{"conversation": ["one"]}', "{}", "{"])
def test_a_faulty_paddlenlp_file_is_a_user_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(content)
    with pytest.raises(UserError, match=r"chat_template\.json"):
        ChatTemplate.load(tmp_path, default=None)


def test_functions_that_published_templates_call(tokenizers: dict[str, Tokenizer]) -> None:
    text = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m | tojson }}{% continue %}{% endif %}"
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}"
    )
    ids, _ = JinjaTemplate(text, "test").encode_conversation(tokenizers["bpe"], talk("<a>", "two"))
    decoded = tokenizers["bpe"].decode(ids, skip_special=False)
    assert decoded == '{"role": "user", "content": "<a>"}two<|im_end|>'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 300,000 steps"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "calls itself again and again"),
        ("{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}", "calls itself again and again"),
        ("{{ 'a' * 10**10 }}", "more than 20,000,000 characters"),
        ("{{ 'a'.center(10**10) ~ 'a' | center(10**10) }}", "more than 20,000,000 characters"),
        ("{{ '%9999999999d' % 3 }}", "more than 20,000,000 characters"),
        ("{{ '{:>9999999999}'.format(3) }}", "more than 20,000,000 characters"),
        ("{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}", "more than 20,000,000 characters"),
        ("{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "20,000,000"),
        ("{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}", "20,000,000"),
        ("{% set x %}{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}{% endset %}", "500,000,000 characters"),
        ("{{ range(99999) | map('center', 10**7) | list | length }}", "500,000,000 characters"),
        ("{{ 9 ** (9 ** 9) }}", "thousands of digits"),
        ("{{ range(10**9) }}", "Range too big"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
        ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "nested too deeply"),
    ],
)
def test_a_template_without_end_is_a_user_error(text: str, said: str, tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(UserError, match=said) as caught:
        JinjaTemplate(text, "mine.jinja").encode_prompt(tokenizers["bpe"], talk("one"))
    assert str(caught.value).startswith("mine.jinja: the chat template ")


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "chat_template.json"])
def test_files_of_templates_with_a_byte_order_mark_or_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    text = "{% for message in messages %}{{ message.content }}{% endfor %}"
    content = text if name.endswith(".jinja") else json.dumps({"chat_template": text})
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    template = ChatTemplate.load(tmp_path, default=None)
    assert isinstance(template, JinjaTemplate) and template.text == text
    template.save(tmp_path)  # beside a settings file with such a mark, too
    for written in (None, b"\xff", b"[" * 100_000):
        for file in tmp_path.iterdir():
            file.unlink()
        if written is None:
            (tmp_path / name).symlink_to("/proc/self/mem")  # is there, and gives an error even to root
        else:
            (tmp_path / name).write_bytes(written)
        if written == b"[" * 100_000 and name.endswith(".jinja"):
            continue  # is a template, of brackets
        with pytest.raises(UserError, match=re.escape(f"{tmp_path / name}: ")):
            ChatTemplate.load(tmp_path, default=None)


def test_half_a_surrogate_pair_in_a_settings_file(tmp_path: Path) -> None:
    """Other keys may hold one, and are written back as they were; a template with one is no text."""
    text = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(r'{"other": "a\ud83d"}', "utf-8")
    JinjaTemplate(text, "here").save(tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert written == {"other": "a\ud83d", "chat_template": text}
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(r'{"chat_template": "a\ud83d"}', "utf-8")
    with pytest.raises(UserError, match=r"tokenizer_config.json: .*half of a surrogate pair at character 2"):
        ChatTemplate.load(tmp_path, default=None)


def test_a_template_may_be_given_more_values_but_not_in_place_of_its_own(tokenizers: dict[str, Tokenizer]) -> None:
    text = (
        "{% if loud %}!{% endif %}"
        "{% for m in messages %}{{ m.role + m.content + (m.name or '') }}{% endfor %}"
        "{{ note }}"
    )
    template, tokenizer = JinjaTemplate(text, "test"), tokenizers["bpe"]
    given = template.with_values({"loud": True, "note": "<|im_end|>", "messages": [], "template": 1, "self": 2})
    message: list[Message] = [{"role": "user", "content": "one", "name": "Ann"}]
    assert tokenizer.decode(given.encode_prompt(tokenizer, message), skip_special=False) == "!useroneAnn<|im_end|>"
    assert tokenizer.token_id("<|im_end|>") not in given.encode_prompt(tokenizer, message)
    assert tokenizer.decode(template.encode_prompt(tokenizer, message), skip_special=False) == "useroneAnn"
