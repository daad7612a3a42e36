"""Templates that ask with an opened <think>, as the distillates of DeepSeek-R1 and QwQ do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import Tiny, tiny  # noqa: F401
from tiny_tokenizers import write_bpe

from utils.data.encode import Example, encode_row
from utils.data.rows import Row
from utils.data.template import JinjaTemplate, Message
from utils.errors import UserError
from utils.families.tokenizers import Tokenizer, load_tokenizer
from utils.inference.chat import Chat
from utils.inference.loading import load, prepare
from utils.inference.sampling import SamplingOptions

# Written here after the behaviour of the published ones: earlier answers lose their reasoning.
R1 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<|im_start|>User: ' + m.content }}"
    "{% elif m.role == 'assistant' %}"
    "{% set content = m.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>Assistant: ' + content + '<|im_end|>' }}"
    "{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>Assistant: <think>\n' }}{% endif %}"
)
QWQ = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "{% set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# Shows the reasoning of answers behind the last question, and asks without a tag.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content if m.reasoning_content is defined else '' %}"
    "{% set content = m.content %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content }}"
    "{% else %}{{ '<|im_start|>assistant\n' + content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENED = {"r1": R1, "qwq": QWQ}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bpe")
    return load_tokenizer(folder, write_bpe(folder))


def question(*texts: str) -> list[Message]:
    return [{"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(texts)]


def learned(tokenizer: Tokenizer, template: JinjaTemplate, messages: list[Message]) -> tuple[str, str]:
    """Prompt and what is learned, as text; the prompt is what prediction asks with."""
    ids, supervised = template.encode_conversation(tokenizer, messages)
    prompt = template.encode_prompt(tokenizer, messages[:-1])
    assert ids[: len(prompt)] == prompt and supervised == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    return tokenizer.decode(prompt, skip_special=False), tokenizer.decode(ids[len(prompt) :], skip_special=False)


@pytest.mark.parametrize("name", OPENED)
def test_a_question_is_asked_with_an_opened_tag(name: str, tokenizer: Tokenizer) -> None:
    template = JinjaTemplate(OPENED[name], "test")
    assert template.stop_ids(tokenizer) == (2,)
    one = tokenizer.decode(template.encode_prompt(tokenizer, question("one")), skip_special=False)
    assert one.endswith("<think>\n") and one.count("one") == 1
    talk = question("one", "<think>\nhm\n</think>\n\ntwo", "three", "four", "five")
    several = tokenizer.decode(template.encode_prompt(tokenizer, talk), skip_special=False)
    assert several.endswith("<think>\n") and several.count("think") == 1 and "hm" not in several


@pytest.mark.parametrize("name", OPENED)
@pytest.mark.parametrize("begins", ["<think>\n", "<think>", ""])
def test_an_answer_with_its_reasoning_is_learned(name: str, begins: str, tokenizer: Tokenizer) -> None:
    template = JinjaTemplate(OPENED[name], "test")
    answer = f"{begins}It is <|im_end|> 2.\n</think>\n\ntwo"
    prompt, said = learned(tokenizer, template, question("one", answer))
    assert prompt.endswith("<think>\n")
    assert said == "It is <|im_end|> 2.\n</think>\n\ntwo<|im_end|>"
    ids, _ = template.encode_conversation(tokenizer, question("one", answer))
    assert ids.count(2) == (1 if name == "r1" else 2)
    apart = question("one", "two")
    apart[1]["reasoning_content"] = "It is 2."
    assert learned(tokenizer, template, apart)[1] == "It is 2.\n</think>\n\ntwo<|im_end|>"
    twice = question("one", answer)
    twice[1]["reasoning_content"] = "It is 3."
    with pytest.raises(UserError, match="keep one"):
        learned(tokenizer, template, twice)


@pytest.mark.parametrize("name", OPENED)
def test_of_several_rounds_the_last_is_learned(name: str, tokenizer: Tokenizer) -> None:
    template = JinjaTemplate(OPENED[name], "test")
    prompt, said = learned(tokenizer, template, question("one", "two", "three", "<think>\nhm\n</think>\n\nfour"))
    assert "two" in prompt and prompt.endswith("<think>\n") and said == "hm\n</think>\n\nfour<|im_end|>"


@pytest.mark.parametrize("name", OPENED)
def test_an_answer_without_reasoning_is_told_what_to_do(name: str, tokenizer: Tokenizer) -> None:
    row = Row(tuple(question("one", "two")), Path("train.json"), 7, {})
    with pytest.raises(UserError, match=r"train\.json line 7: test: .*<think>.*reasoning_content.*--chat_template"):
        encode_row(row, tokenizer, JinjaTemplate(OPENED[name], "test"), 64, 128)


def test_reasoning_that_the_template_itself_shows(tokenizer: Tokenizer) -> None:
    template = JinjaTemplate(QWEN3, "test")
    with_text = question("one", "<think>\nhm\n</think>\n\ntwo")
    apart = question("one", "two")
    apart[1]["reasoning_content"] = "hm"
    for messages in (with_text, apart):
        prompt, said = learned(tokenizer, template, messages)
        assert prompt.endswith("<|im_start|>assistant\n")
        assert said == "<think>\nhm\n</think>\n\ntwo<|im_end|>"
    prompt, said = learned(tokenizer, template, [*with_text, *question("three", "four")])
    assert "hm" not in prompt and said == "<think>\n\n</think>\n\nfour<|im_end|>"


def test_chat_prediction_and_training_with_such_a_template(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "r1.jinja"
    file.write_text(R1)
    prepared = prepare(str(tiny.model), device="cpu", chat_template=str(file))
    chat = Chat(prepared, load(prepared, "cpu"), SamplingOptions(max_new_tokens=3), 200)
    for text in ("one", "two"):
        assert chat.say(text, lambda _: None).error is None
    data = tmp_path / "data"
    data.mkdir()
    for answer, code in (("<think>\nhm\n</think>\n\nred", 0), ("red", 2)):
        (data / "train.json").write_text(json.dumps({"src": "Say red", "tgt": answer}) + "\n")
        words = ["--do_train", "--dry_run", "--dataset_name_or_path", data, "--chat_template", file]
        run = tiny.run(tmp_path / "out", *words, expect=code)
        assert "⟦hm\n</think>\n\nred<|im_end|>⟧" in run.out if code == 0 else "train.json line 1: " in run.err


def test_an_example_of_the_tokens(tokenizer: Tokenizer) -> None:
    row = Row(tuple(question("one", "<think>\nhm\n</think>\n\ntwo")), Path("train.json"), 7, {})
    example = encode_row(row, tokenizer, JinjaTemplate(R1, "test"), 64, 128)
    assert isinstance(example, Example)
    assert [int(label) for label in example.labels if label != -100] == [
        *tokenizer.encode("hm\n</think>\n\ntwo"),
        2,
    ]
