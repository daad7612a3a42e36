"""What is special about ChatGLM-6B and ChatGLM2-6B: attention, positions, heads, prompts, tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from family_cases import plain_engine

from utils.adapters.prefix import PrefixTuning
from utils.checkpoints.load import load_model
from utils.checkpoints.locate import Checkpoint, locate
from utils.data.collate import Collator
from utils.data.template import ChatTemplate, Message
from utils.errors import UserError
from utils.families import FAMILIES, family_of
from utils.families.chatglm_input import PromptAndAnswer, prefix_lm
from utils.families.tokenizers import Tokenizer, load_tokenizer
from utils.training.model import TrainingModel

FIXTURES = Path(__file__).parent / "fixtures"
ONE, TWO = FAMILIES["chatglm"], FAMILIES["chatglm2"]
CASES = ("chatglm_tiny", "chatglm2_tiny", "chatglm2_wide")


@pytest.fixture(scope="module")
def checkpoints() -> dict[str, Checkpoint]:
    return {name: locate(FIXTURES / name) for name in CASES}


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, Checkpoint]) -> dict[str, Any]:
    return {name: load_model(checkpoint, "float32") for name, checkpoint in checkpoints.items()}


@pytest.fixture(scope="module")
def tokenizers(checkpoints: dict[str, Checkpoint]) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(one.folder, one.config) for name, one in checkpoints.items()}


def talk(*texts: str) -> list[Message]:
    return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)]


def vectors(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / name / "vectors.json").read_text("utf-8"))


# --- which family ------------------------------------------------------------------------------------


def test_the_generations_are_told_apart_though_they_share_names(checkpoints: dict[str, Checkpoint]) -> None:
    first, second = checkpoints["chatglm_tiny"].config, checkpoints["chatglm2_tiny"].config
    assert first["model_type"] == second["model_type"] and first["architectures"] == second["architectures"]
    assert checkpoints["chatglm_tiny"].family is ONE
    assert checkpoints["chatglm2_tiny"].family is TWO
    assert family_of({"model_type": "chatglm"}) is ONE  # PaddleNLP leaves out what is as by default
    assert family_of({"model_type": "chatglm_v2", "hidden_size": 64}) is TWO


def test_sizes_of_the_published_models() -> None:
    shape = ONE.shape({"model_type": "chatglm", "num_layers": 28})
    assert (shape.vocabulary, shape.hidden, shape.intermediate, shape.positions) == (130528, 4096, 16384, 2048)
    shape = TWO.shape({"num_layers": 28, "padded_vocab_size": 65024, "seq_length": 32768})
    assert (shape.kv_heads, shape.head_dim, shape.vocabulary, shape.positions) == (2, 128, 65024, 32768)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"multi_query_attention": False}, "multi_query_attention is False"),
        ({"rmsnorm": False}, "rmsnorm is False"),
        ({"multi_query_group_num": 3}, "does not divide"),
    ],
)
def test_what_no_chatglm2_has_is_refused(change: dict[str, Any], said: str, checkpoints: dict[str, Checkpoint]) -> None:
    with pytest.raises(UserError, match=said):
        TWO.read_config({**checkpoints["chatglm2_tiny"].config, **change})


def test_the_residual_factor_is_that_of_the_published_code(checkpoints: dict[str, Checkpoint]) -> None:
    """28 layers' in published files whatever they have, the model's own in PaddleNLP's; ours keep theirs."""
    published = checkpoints["chatglm_tiny"].config
    assert published["num_layers"] == 2
    assert ONE.paddle_config(published)["residual_layers"] == 28
    paddles = {**published, "num_hidden_layers": 2}
    del paddles["num_layers"]
    assert ONE.paddle_config(paddles)["residual_layers"] == 2
    there_and_back = ONE.paddle_config(ONE.published_config(ONE.paddle_config(paddles)))
    assert there_and_back["residual_layers"] == 2 and there_and_back["num_hidden_layers"] == 2


def mask_and_start(checkpoint: Checkpoint) -> tuple[int, int]:
    """The ids of [gMASK] and <sop>."""
    config = ONE.paddle_config(checkpoint.config)
    return config["gmask_token_id"], config["bos_token_id"]


# --- attention and positions --------------------------------------------------------------------------


def test_positions_and_sight_of_a_packed_row(checkpoints: dict[str, Checkpoint]) -> None:
    config = ONE.paddle_config(checkpoints["chatglm_tiny"].config)
    gmask, sop = config["gmask_token_id"], config["bos_token_id"]
    ids = np.array([[90, 91, gmask, sop, 92, 93, 94, gmask, sop, 95, 96, 97]])
    ends = np.array([[6, 6, 6, 6, 6, 6, 10, 10, 10, 10, 12, 12]], dtype=np.int32)
    positions, seen = prefix_lm(config, ids, ends)
    assert positions[:, 0].tolist() == [[0, 1, 2, 2, 2, 2, 0, 1, 1, 1, 0, 1], [0, 0, 0, 1, 2, 3, 0, 0, 1, 2, 0, 0]]
    rows = ["111000", "111000", "111000", "111100", "111110", "111111"]
    rows = [row + "000000" for row in rows]
    rows += ["0" * 6 + row + "00" for row in ("1100", "1100", "1110", "1111")]
    rows += ["0" * 10 + row for row in ("10", "11")]  # without <sop>: plain causal
    assert ["".join(map(str, row.astype(int))) for row in seen[0, 0]] == rows


def test_positions_of_a_text_while_it_is_written(checkpoints: dict[str, Checkpoint]) -> None:
    """The same as of a training row, also of texts without <sop>, without a mask, or with [MASK]."""
    config = ONE.paddle_config(checkpoints["chatglm_tiny"].config)
    gmask, mask, sop = config["gmask_token_id"], config["mask_token_id"], config["bos_token_id"]
    prompts = {(90, 91, gmask, sop): 3, (mask, 90, sop): 2, (90, 91, sop): 2, (90, 91, 92): 0}
    for two in (True, False):
        known = {**config, "position_encoding_2d": two}
        for prompt, context in prompts.items():
            text = PromptAndAnswer(prompt, known)
            assert text.context == context
            wanted = prefix_lm(known, np.array([[*prompt, 93, 94, 95, 96]]))[0][:, 0]
            parts = [text.positions(), text.append([93]), text.append([94, 95, 99])]
            text.truncate(len(prompt) + 3)
            parts[-1] = parts[-1][:, :-1]
            parts.append(text.append([96]))
            assert np.concatenate(parts, axis=1).tolist() == wanted.tolist()
            assert text.context == context and text.positions().tolist() == wanted.tolist()


def test_beginnings_are_shared_only_where_prompts_are_read_from_left_to_right(
    checkpoints: dict[str, Checkpoint],
) -> None:
    shared = {name: one.family.shares_prefixes(one.config) for name, one in checkpoints.items()}
    assert shared == {"chatglm_tiny": False, "chatglm2_tiny": True, "chatglm2_wide": True}


@paddle.no_grad()
def test_a_prompt_is_read_in_both_directions_and_an_answer_is_not(
    checkpoints: dict[str, Checkpoint], models: dict[str, Any]
) -> None:
    model, (gmask, sop) = models["chatglm_tiny"], mask_and_start(checkpoints["chatglm_tiny"])

    def hidden(ids: list[int]) -> np.ndarray:
        return model.hidden({"input_ids": paddle.to_tensor([ids])}).numpy()[0]

    text = [90, 91, gmask, sop, 92, 93]
    before, prompt, answer = hidden(text), hidden([90, 99, *text[2:]]), hidden([*text[:5], 99])
    assert np.abs(before[0] - prompt[0]).max() > 1e-3
    assert np.array_equal(before[:5], answer[:5])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_prefix", [False, True])
def test_packed_rows_are_as_each_alone(
    name: str, with_prefix: bool, checkpoints: dict[str, Checkpoint], models: dict[str, Any]
) -> None:
    checkpoint, model = checkpoints[name], models[name]
    family = checkpoint.family
    start = [90, 91, *(mask_and_start(checkpoint) if family is ONE else ())]
    texts = [[*start, 92, 93], [*start[1:], 94], [95, 96]]
    items = [{"input_ids": text, "labels": [*text[1:], 90]} for text in texts]
    together = {key: np.concatenate([item[key] for item in items]) for key in ("input_ids", "labels")}
    prefix = None
    if with_prefix:
        paddle.seed(3)
        prefix = PrefixTuning(family, family.shape(checkpoint.config), 3)
        prefix.encoder[0].weight.set_value(paddle.randn(prefix.encoder[0].weight.shape))
    training = TrainingModel(family, model, prefix=prefix)

    def loss(items: list[dict[str, Any]]) -> float:
        batch = {key: paddle.to_tensor(value) for key, value in Collator(0)(items).items()}
        return float(training.score(**batch)[0])

    packed = loss([{**together, "lengths": [len(text) for text in texts]}])
    assert packed == pytest.approx(sum(loss([item]) for item in items), rel=1e-5)
    assert packed == pytest.approx(loss(items), rel=1e-5)  # padded on the right instead


@pytest.mark.parametrize("name", ["chatglm_tiny", "chatglm2_tiny"])
def test_recomputation_keeps_the_gradients_of_a_prefix(name: str, checkpoints: dict[str, Checkpoint]) -> None:
    gradients = []
    for recompute in (False, True):
        family = checkpoints[name].family
        model = load_model(checkpoints[name], "float32")
        model.enable_recompute = recompute
        paddle.seed(3)
        prefix = PrefixTuning(family, family.shape(checkpoints[name].config), 3)
        training = TrainingModel(family, model, prefix=prefix, inputs_need_gradient=recompute)
        training.train()
        middle = mask_and_start(checkpoints[name]) if family is ONE else (94, 95)
        ids = np.array([[90, 91, *middle, 92, 93]])
        training(labels=paddle.to_tensor(np.roll(ids, -1)), input_ids=paddle.to_tensor(ids)).backward()
        gradients.append(prefix.encoder[0].weight.grad.numpy())
    assert np.abs(gradients[0]).max() > 1e-3
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_prompts_is_as_each_alone(
    name: str, checkpoints: dict[str, Checkpoint], models: dict[str, Any], tokenizers: dict[str, Tokenizer]
) -> None:
    checkpoint, tokenizer = checkpoints[name], tokenizers[name]
    template = ChatTemplate.load(checkpoint.folder, default=checkpoint.family.chat_template)
    questions = [talk("the model"), talk("你好", "世界", "a question with few words"), talk("a")]
    prompts = [template.encode_prompt(tokenizer, question) for question in questions]
    said = np.random.default_rng(1).integers(90, 150, (6, 3))

    def logits(rows: list[int]) -> np.ndarray:
        engine = plain_engine(checkpoint, models[name])
        slots, first = engine.open([prompts[row] for row in rows])
        found = [first.numpy()]
        found += [engine.advance(slots, tokens[rows, None].tolist()).numpy() for tokens in said]
        return np.stack(found, axis=1)

    together = logits([0, 1, 2])
    for row in range(3):
        np.testing.assert_allclose(logits([row])[0], together[row], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.1


# --- prompts ------------------------------------------------------------------------------------------


def test_chatglm_prompts(checkpoints: dict[str, Checkpoint], tokenizers: dict[str, Tokenizer]) -> None:
    """The first question as it is; with history all rounds are numbered from 0; [gMASK] and <sop> end it."""
    tokenizer, checkpoint = tokenizers["chatglm_tiny"], checkpoints["chatglm_tiny"]
    template = ChatTemplate.load(checkpoint.folder, default=ONE.chat_template)
    end = [checkpoint.config["gmask_token_id"], checkpoint.config["bos_token_id"]]
    assert template.encode_prompt(tokenizer, talk("你好")) == [*tokenizer.encode("你好"), *end]
    several = talk("the question", "few words", "a question")
    text = "[Round 0]\n问：the question\n答：few words\n[Round 1]\n问：a question\n答："
    asked = [*tokenizer.encode(text), *end]
    assert template.encode_prompt(tokenizer, several) == asked
    ids, supervised = template.encode_conversation(tokenizer, [*several, *talk("", "你好")[1:]])
    assert ids == [*asked, *tokenizer.encode("你好"), checkpoint.config["eos_token_id"]]
    assert supervised.index(True) == len(asked)
    assert template.stop_ids(tokenizer) == (checkpoint.config["eos_token_id"],)


def test_chatglm2_prompts_are_those_of_the_published_code(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["chatglm2_tiny"]
    template = ChatTemplate.load(None, default=TWO.chat_template)
    for case in vectors("chatglm2_tiny")["prompts"]:
        messages = talk(*(text for pair in case["history"] for text in pair), case["query"])
        assert template.encode_prompt(tokenizer, messages) == case["ids"]
        ids, supervised = template.encode_conversation(tokenizer, [*messages, *talk("", "few words")[1:]])
        assert ids == [*case["ids"], *tokenizer.encode("few words"), 2]
        assert supervised.index(True) == len(case["ids"])


# --- tokenizers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatglm_tiny", "chatglm2_tiny"])
def test_ids_and_texts_are_those_of_the_published_tokenizers(name: str, tokenizers: dict[str, Tokenizer]) -> None:
    for case in vectors(name)["texts"]:
        assert tokenizers[name].encode(case["text"]) == case["ids"]
        assert tokenizers[name].encode(case["text"], continuation=True) == case["ids"]  # answers are texts too
        if 0 not in case["ids"]:  # <unk> leaves nothing here, as with transformers when special tokens are skipped
            assert tokenizers[name].decode(case["ids"]) == case["decoded"]


def test_chatglm_blanks_are_pieces_of_their_own(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["chatglm_tiny"]
    pieces = [tokenizer.token(i) for i in tokenizer.encode("a\n" + " " * 83 + "a\ta")]
    assert [piece for piece in pieces if piece and piece.startswith("<")] == [
        "<n>",
        "<|blank_80|>",
        "<|blank_3|>",
        "<|tab|>",
    ]
    text = "a\n\n" + " " * 83 + "a \ta" + " " * 2 + "a"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chatglm_special_tokens(checkpoints: dict[str, Checkpoint], tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, config = tokenizers["chatglm_tiny"], checkpoints["chatglm_tiny"].config
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (264, 265, 3)
    assert tokenizer.encode("[gMASK]<sop>") == [config["gmask_token_id"], config["bos_token_id"]]
    ids = [*tokenizer.encode("a"), *tokenizer.encode("[gMASK]<sop>"), *tokenizer.encode("words"), 265, 272]
    assert tokenizer.decode(ids) == "awords"  # 272 fills up the vocabulary
    assert tokenizer.decode(ids, skip_special=False) == "a[gMASK]<sop>words<eop>"


def test_chatglm_of_the_first_release_counts_image_tokens(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    """20,000 places before the text; the number is in the settings, or follows from the id of <sop>."""
    shutil.copy(FIXTURES / "chatglm_tiny" / "ice_text.model", tmp_path)
    special = {"bos_token_id": 20264, "eos_token_id": 20265, "mask_token_id": 20260, "gmask_token_id": 20261}
    config = {"model_type": "chatglm", "vocab_size": 20300, **special}
    tokenizer = load_tokenizer(tmp_path, config)
    plain = tokenizers["chatglm_tiny"].encode("the model")
    assert tokenizer.encode("the model[gMASK]") == [*(20000 + i for i in plain), 20261]
    assert tokenizer.decode([7, *(20000 + i for i in plain)]) == "the model"
    assert tokenizer.token(7) == "<image_7>"
    assert tokenizer.pad_id == 20003
    tokenizer.save(tmp_path / "again")
    assert (tmp_path / "again" / "ice_text.model").is_file()
    (tmp_path / "tokenizer_config.json").write_text('{"num_image_tokens": 0}')
    with pytest.raises(UserError, match=r"\[gMASK\] has id 261 .* gmask_token_id 20261"):
        load_tokenizer(tmp_path, config)


def test_chatglm2_special_tokens_follow_the_pieces(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["chatglm2_tiny"]
    names = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
    assert [tokenizer.token_id(name) for name in names] == [350, 351, 352, 353, 354]
    assert tokenizer.vocabulary == 355
    assert tokenizer.encode("[gMASK]sop") == [351, 353]
    assert not {353, 354} & set(tokenizer.encode("sophie eop [gMASK] sop"))
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 0)
    assert tokenizer.decode([351, 353, *tokenizer.encode("a question"), 2]) == "a question"


@pytest.mark.parametrize("name", ["chatglm_tiny", "chatglm2_tiny"])
def test_a_tokenizer_that_does_not_fit_is_a_user_error(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(FIXTURES / name, folder)
    config = json.loads((folder / "config.json").read_text())
    small = (
        {**config, "vocab_size": 100, "padded_vocab_size": 100}
        if name != "chatglm_tiny"
        else {**config, "vocab_size": 9}
    )
    with pytest.raises(UserError, match="vocab_size"):
        load_tokenizer(folder, small)
    main = next(path for path in folder.glob("*.model"))
    main.write_bytes(b"no model")
    with pytest.raises(UserError, match="not a readable sentencepiece model"):
        load_tokenizer(folder, config)
    main.unlink()
    with pytest.raises(UserError, match=main.name):
        load_tokenizer(folder, config)
