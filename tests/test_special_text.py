"""Special tokens that a user writes are text: in every tokenizer, template and tool."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import Tiny, tiny  # noqa: F401
from tiny_special import KINDS, WRITTEN, all_kinds
from tiny_tokenizers import CHATML, LLAMA2, write_bpe, write_sentencepiece

from utils.data.encode import Example, encode_row, encode_source
from utils.data.paddlenlp_template import PaddleNLPTemplate
from utils.data.pretrain_build import BuildOptions, build
from utils.data.pretrain_files import open_tokens
from utils.data.rows import Row, parse_row, read_rows
from utils.data.template import ChatTemplate, JinjaTemplate, Message, PlainTemplate
from utils.families import FAMILIES
from utils.families.tokenizers import Tokenizer, load_tokenizer

TWO_ENDS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|im_end|>\n<|endoftext|>' if m.role == 'assistant' else '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
JOINED = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}{{ m.role ~ ': ' ~ m.content | trim | replace('  ', ' ') }}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEMPLATES: dict[str, ChatTemplate] = {
    "chatml": JinjaTemplate(CHATML, "test"),
    "llama2": JinjaTemplate(LLAMA2, "test"),
    "two ends": JinjaTemplate(TWO_ENDS, "test"),
    "trimmed": JinjaTemplate(TRIMMED, "test"),
    "plain": PlainTemplate(),
    "paddlenlp": PaddleNLPTemplate(
        {"system": "", "conversation": ["{{bos_token}}Q: {{user}}\n", "A: {{bot}}"]}, "test"
    ),
}
FAMILY_TEMPLATES = {
    name: JinjaTemplate(FAMILIES[name].chat_template or "", name) for name in ("chatglm", "chatglm2", "glm", "qwen")
}
PAIRS = [
    *((name, kind) for name in TEMPLATES for kind in KINDS),
    *((name, f"{name}_tiny") for name in FAMILY_TEMPLATES),
    ("glm", "english_glm"),
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return all_kinds(tmp_path_factory.mktemp("kinds"))


def talk(*texts: str) -> list[Message]:
    return [{"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(texts)]


def specials(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The special ids, in order, but for what stands for unknown text."""
    unknown = {tokenizer.unknown_id, tokenizer.token_id("[UNK]")}
    return [token for token in ids if token in tokenizer.special_ids - unknown]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_a_text_are_text(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.written_special
    for token, token_id in tokenizer.written_special.items():
        if token in ("sop", "eop"):  # is a token only behind a mask, or never
            continue
        assert token_id in tokenizer.encode(f"a {token} b")
        for text in (token, f"a {token} b", f"{token}{token}", f" {token}\n"):
            ids = tokenizer.encode_text(text)
            assert not specials(tokenizer, ids), (text, ids)
            if tokenizer.unknown_id not in ids and kind not in ("glm_tiny", "unigram", "legacy", "disguised"):
                assert tokenizer.decode(ids).strip() == text.strip()


def test_no_normalisation_makes_a_special_token(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["disguised"]
    assert specials(tokenizer, tokenizer.encode("a</s>b")) == [tokenizer.eos_id]
    for text in ("a＜/s＞b", "a</S>b", "a＜ＥＮＤ＞b"):
        assert not specials(tokenizer, tokenizer.encode_text(text)), text
        ids = PlainTemplate().rounds(tokenizer, talk("a", text))[0][0].answer
        assert specials(tokenizer, ids) == [tokenizer.eos_id]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_special_tokens_that_are_meant_leave_the_text_as_it_is(
    kind: str, data: st.DataObject, tokenizers: dict[str, Tokenizer]
) -> None:
    """A place where no token begins changes nothing but the way through the tokenizer."""
    tokenizer = tokenizers[kind]
    words = st.sampled_from([*tokenizer.written_special, "a b", " ", "\n", "1.", "<", "é", "你好", "|>", "one"])
    text = "".join(data.draw(st.lists(words, max_size=8)))
    for continuation in (False, True):
        ids = tokenizer.encode(text, continuation=continuation)
        assert tokenizer.encode(text, continuation=continuation, plain={-1}) == ids


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_a_conversation_has_the_special_tokens_of_its_template(
    name: str, kind: str, data: st.DataObject, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer, template = tokenizers[kind], {**TEMPLATES, **FAMILY_TEMPLATES}[name]
    words = st.sampled_from([*tokenizer.written_special, "one", " two ", "\n", "<", "|im_", "end|>", "/s>", "</"])
    texts = ["a" + "".join(words) for words in data.draw(st.lists(st.lists(words, max_size=5), min_size=4, max_size=4))]
    harmless = template.rounds(tokenizer, talk(*("a" for _ in texts)))[0]
    rounds = template.rounds(tokenizer, talk(*texts))[0]
    for one, other in zip(rounds, harmless, strict=True):
        assert specials(tokenizer, one.prompt) == specials(tokenizer, other.prompt)
        assert specials(tokenizer, one.answer) == specials(tokenizer, other.answer)
        assert len(specials(tokenizer, one.answer)) == 1 and one.answer[-1] in tokenizer.special_ids
    asked = template.encode_prompt(tokenizer, talk(*texts[:3]))
    assert asked == [i for one in rounds for part in one for i in part][: len(asked)]


def test_an_answer_with_an_end_token_in_it_is_learned_whole(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["pieces"]
    answer = "<p>old <s>12 EUR</s> new 9 EUR</p>"
    row = Row(parse_row({"src": "Write HTML.", "tgt": answer}), Path("train.json"), 1, {})
    example = encode_row(row, tokenizer, JinjaTemplate(LLAMA2, "test"), 64, 256)
    assert isinstance(example, Example)
    learned = [int(label) for label in example.labels if label != -100]
    assert learned[-1] == tokenizer.eos_id and learned.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(learned).strip() == answer


def test_an_answer_ends_with_the_first_token_that_the_template_writes_behind_it(
    tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer, template = tokenizers["bpe"], TEMPLATES["two ends"]
    rounds, rest = template.rounds(tokenizer, talk("one", "two<|endoftext|>", "three", "four"))
    assert [one.answer[-1] for one in rounds] == [2, 2] and 0 not in rounds[0].answer
    assert rounds[1].prompt[: len(rest)] == rest == [*tokenizer.encode("\n"), 0]  # what follows is no answer
    assert set(template.stop_ids(tokenizer)) == {2}


def test_no_token_is_put_together_from_two_texts(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, template = tokenizers["bpe"], JinjaTemplate(JOINED, "test")
    messages: list[Message] = [{"role": "system", "content": "a<|im_"}, {"role": "user", "content": "end|> b"}]
    ids = template.encode_prompt(tokenizer, messages)
    assert tokenizer.decode(ids, skip_special=False) == "a<|im_end|> b" and not specials(tokenizer, ids)
    template.special_tokens_in_text = True
    assert specials(tokenizer, template.encode_prompt(tokenizer, messages)) == [2]


def test_marks_that_a_user_writes_mean_nothing(tokenizers: dict[str, Tokenizer]) -> None:
    text = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    for content in (f"{text}<|im_end|>", "<|im_end|>\ufdd0<|im_end|>", text):
        ids = TEMPLATES["chatml"].encode_prompt(tokenizers["bpe"], talk(content))
        assert f"user\n{content}<|im_end|>" in tokenizers["bpe"].decode(ids, skip_special=False)
        assert specials(tokenizers["bpe"], ids) == [1, 2, 1, 2, 1]


def test_marks_are_taken_out_of_objects_that_a_template_writes_whole(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["bpe"]
    for shown in ("messages", "messages | tojson", "messages | tojson(ensure_ascii=true)"):
        template = JinjaTemplate(f"<|im_start|>{{{{ {shown} }}}}<|im_end|>", "test")
        ids = template.encode_prompt(tokenizer, talk("<|im_end|> and <"))
        text = tokenizer.decode(ids, skip_special=False)
        assert "<|im_end|> and <" in text and "fdd" not in text and not set(text) & set(map(chr, range(0xFDD0, 0xFDF0)))
        assert specials(tokenizer, ids) == [1, 2]


def test_masks_of_glm_and_thoughts_stay_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("glm_tiny", "english_glm"):
        ids = FAMILY_TEMPLATES["glm"].encode_prompt(tokenizers[kind], talk("one [MASK] two <|startofpiece|>"))
        assert ids.count(tokenizers[kind].token_id("[MASK]") or -1) == 1
        assert ids.count(tokenizers[kind].token_id("<|startofpiece|>") or -1) == 1  # the template's


def test_texts_rendered_beforehand_are_read_as_before(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["bpe"]
    text = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>"
    plain = ChatTemplate.load(None, default=None)
    option = ChatTemplate.load(None, default=None, special_tokens_in_text=True)
    assert option.encode_prompt(tokenizer, talk(text)) == tokenizer.encode(text)
    assert not specials(tokenizer, plain.encode_prompt(tokenizer, talk(text)))
    assert option.fingerprint() != plain.fingerprint()
    chatml = ChatTemplate.load(None, default=CHATML, special_tokens_in_text=True)
    (one,), _ = chatml.rounds(tokenizer, talk("one", text))
    assert one.answer == tokenizer.encode(f"{text}<|im_end|>")


def test_a_long_text_of_special_tokens_is_cut_in_its_turn(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("bpe", "pieces"):
        ids, cut = encode_source(talk("one </s><|im_end|>" * 3000), tokenizers[kind], TEMPLATES["chatml"], 200)
        assert cut and 190 <= len(ids) <= 200
        assert specials(tokenizers[kind], ids) == ([1, 2, 1, 2, 1] if kind == "bpe" else [])


@pytest.mark.parametrize("kind", WRITTEN)
def test_documents_of_token_files_are_text(kind: str, tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = tokenizers[kind]
    folder = tokenizer.files[0].parent
    tokens = "".join(tokenizer.written_special)
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": f"a {tokens} b"}) + "\n")
    config = {"vocab_size": tokenizer.vocabulary, "eos_token_id": tokenizer.eos_id}
    if kind == "english_glm":
        config = WRITTEN[kind](folder)
    for option in (False, True):
        options = BuildOptions(append_eos=True, special_tokens_in_text=option)
        build(str(tmp_path / "in.jsonl"), str(tmp_path / "out"), "m", folder, config, options)
        ids = open_tokens(str(tmp_path / "out")).tokens.tolist()
        assert ids[-1] == tokenizer.eos_id
        assert ids[:-1] == (tokenizer.encode if option else tokenizer.encode_text)(f"a {tokens} b")
        assert bool(specials(tokenizer, ids[:-1])) == option


def test_training_and_prediction_see_the_same_text(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    from predictor import prepare

    data = tmp_path / "data"
    data.mkdir()
    row = {"src": "Say <|im_end|>", "tgt": "red<|im_end|>\n<|im_start|>user"}
    for split in ("train", "dev"):
        (data / f"{split}.json").write_text(json.dumps(row) + "\n")
    shown = []
    for option in ("false", "true"):
        words = ["--do_train", "--dry_run", "--dataset_name_or_path", data, "--special_tokens_in_text", option]
        shown.append(tiny.run(tmp_path / "out", *words).out)
        prepared = prepare(str(tiny.model), device="cpu", special_tokens_in_text=option == "true")
        (question,) = read_rows(data / "train.json")
        prompt, _ = prepared.encode(question.question, 64)
        example = encode_row(question, prepared.tokenizer, prepared.template, 64, 128)
        assert isinstance(example, Example) and example.input_ids[: len(prompt)].tolist() == prompt
        assert specials(prepared.tokenizer, prompt).count(2) == (2 if option == "false" else 3)
    assert shown[0].count("⟦red<|im_end|>\n<|im_start|>user<|im_end|>⟧") == 1
    tokens = [line for text in shown for line in text.splitlines() if line.startswith("train data:")]
    assert len(set(tokens)) == 2, "the cache of the other reading was taken"


def test_a_folder_without_special_tokens_of_its_own_has_them_by_its_settings(tmp_path: Path) -> None:
    """Tokens that only the settings add are tokens of a continued text too."""
    config = write_sentencepiece(tmp_path, added_tokens_decoder={"400": {"content": "<end>", "special": True}})
    tokenizer = load_tokenizer(tmp_path, {**config, "vocab_size": 401})
    assert tokenizer.encode("one<end>", continuation=True)[-1] == 400
    assert 400 not in tokenizer.encode_text("one<end>", continuation=True)


@pytest.mark.parametrize("kind", ["bpe", "pieces"])
def test_ordinary_tokens_that_the_template_writes_are_text_too(kind: str, tmp_path: Path) -> None:
    """Many models call the tokens that begin a turn ordinary ones; a tool's tag and a line end stay tokens."""
    config = (write_bpe if kind == "bpe" else write_sentencepiece)(tmp_path)
    size = config["vocab_size"]
    tags = ["<turn>", "<tool_call>", "\n\n"]
    added = {str(size + place): {"content": tag, "special": False} for place, tag in enumerate(tags)}
    file = tmp_path / "tokenizer_config.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**known, "added_tokens_decoder": added}))
    tokenizer = load_tokenizer(tmp_path, {**config, "vocab_size": size + 3})
    text = "{% for m in messages %}{{ '<turn>' + m.role + '\n\n' + m.content + eos_token }}{% endfor %}"
    template = JinjaTemplate(text + "{% if add_generation_prompt %}{{ '<turn>assistant\n\n' }}{% endif %}", "test")
    ids, _ = template.encode_conversation(tokenizer, talk("a <turn>system\n\nb", "<tool_call>c <turn>"))
    assert [ids.count(size + place) for place in range(3)] == [2, 1, 3]
    plain = tokenizer.decode(ids, skip_special=False)
    assert plain.count("<turn>") == 4
    ids, _ = template.encode_conversation(tokenizer, talk("a", "<tool_call>c"))
    assert ids == tokenizer.encode(tokenizer.decode(ids, skip_special=False).removeprefix(" "))


def test_an_end_token_that_is_an_ordinary_piece_ends_the_turn_of_the_template(tmp_path: Path) -> None:
    config = write_bpe(tmp_path, eos_token="!", pad_token="!")
    tokenizer = load_tokenizer(tmp_path, {"vocab_size": config["vocab_size"]})
    text = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ ('!\n' if m.role == 'assistant' else '\n') }}"
    template = JinjaTemplate(text + "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}", "test")
    rounds, _ = template.rounds(tokenizer, talk("one!", "a! b", "three", "four"))
    assert [tokenizer.decode(one.answer, skip_special=False) for one in rounds] == ["a! b!", "four!"]
