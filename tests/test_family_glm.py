"""What is special about GLM: positions, attention in both directions, filling of spans, its two tokenizers."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from family_cases import plain_engine

from utils.adapters.prefix import PrefixTuning
from utils.checkpoints.load import load_model
from utils.checkpoints.locate import Checkpoint, locate
from utils.data.template import ChatTemplate
from utils.errors import UserError
from utils.families import FAMILIES
from utils.families.glm import MASK_NAMES
from utils.families.glm_layout import SpansText, layout
from utils.families.tokenizers import load_tokenizer
from utils.kernels.precision import autocast
from utils.model.settings import Settings
from utils.training.model import TrainingModel

FIXTURE = Path(__file__).parent / "fixtures" / "glm_tiny"
GLM = FAMILIES["glm"]
CLS, MASK, GMASK, END, SOP, EOP = 100, 101, 102, 103, 104, 105


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return locate(FIXTURE)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Any:
    return load_model(checkpoint, "float32")


def placed(*rows: list[int], texts: list[list[tuple[int, int]]] | None = None) -> Any:
    ids = np.array(rows, dtype=np.int64)
    return layout(ids, SOP, (MASK, GMASK), texts or [[(0, ids.shape[1])]] * len(rows))


# --- positions and attention -----------------------------------------------------------------------


def test_one_span() -> None:
    found = placed([CLS, 5, GMASK, END, SOP, 6, 7])
    assert found.position.tolist() == [[0, 1, 2, 3, 2, 2, 2]]
    assert found.block.tolist() == [[0, 0, 0, 0, 1, 2, 3]]
    assert found.visible()[0, 0].astype(int).tolist() == [
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1],
    ]


def test_each_span_has_its_mask() -> None:
    found = placed([CLS, MASK, 5, MASK, END, SOP, 6, EOP, SOP, 7, EOP, SOP, 8])
    assert found.position[0, 5:].tolist() == [1, 1, 1, 3, 3, 3, 3, 3]  # one span too many: the last mask
    assert found.block[0, 5:].tolist() == [1, 2, 3, 1, 2, 3, 1, 2]


def test_texts_without_a_mask_or_without_a_span() -> None:
    found = placed([CLS, 5, 6, SOP, 7])
    assert found.position.tolist() == [[0, 1, 2, 3, 3]] and found.block.tolist() == [[0, 0, 0, 1, 2]]
    plain = placed([CLS, 5, 6, 7])
    assert plain.position.tolist() == [[0, 1, 2, 3]] and not plain.block.any()
    np.testing.assert_array_equal(plain.visible()[0, 0], np.tril(np.ones((4, 4), bool)))


def test_padding_and_packing() -> None:
    found = placed([END, END, 5, MASK, SOP], texts=[[(2, 5)]])
    assert found.position.tolist() == [[0, 0, 0, 1, 1]]
    assert found.visible()[0, 0, 2:].astype(int).tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert not found.visible()[0, 0, :2].any()
    packed = placed([5, MASK, SOP, 6, MASK, SOP, 7], texts=[[(0, 3), (3, 7)]])
    assert packed.position.tolist() == [[0, 1, 1, 0, 1, 1, 1]]
    assert packed.visible()[0, 0, 5:].astype(int).tolist() == [
        [0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1, 1],
    ]


def test_two_spans_as_the_authors_code_has_them(checkpoint: Checkpoint, model: Any) -> None:
    stored = np.load(FIXTURE / "spans.npz")
    config = GLM.paddle_config(checkpoint.config)
    masks = [config[name] for name in MASK_NAMES]
    found = layout(stored["ids"], config["sop_token_id"], masks, [[(0, stored["ids"].shape[1])]])
    np.testing.assert_array_equal(found.position, stored["position"])
    np.testing.assert_array_equal(found.block, stored["block"])
    with paddle.no_grad():
        hidden = model.hidden({"input_ids": paddle.to_tensor(stored["ids"])})
        np.testing.assert_allclose(model.logits(hidden).numpy(), stored["logits"], atol=1e-4)


def test_spans_token_by_token(checkpoint: Checkpoint, model: Any) -> None:
    """The second <|startofpiece|> comes while decoding; the text must know where it stands."""
    stored = np.load(FIXTURE / "spans.npz")
    ids = stored["ids"].tolist()
    begun = int(np.flatnonzero(stored["block"][0])[0]) + 1
    assert (
        ids[0].count(checkpoint.config["sop_token_id"]) == 2 and ids[0].index(checkpoint.config["sop_token_id"]) < begun
    )
    engine = plain_engine(checkpoint, model)
    slots, logits = engine.open([row[:begun] for row in ids])
    np.testing.assert_allclose(logits.numpy(), stored["logits"][:, begun - 1], atol=1e-4)
    for place in range(begun, len(ids[0])):
        logits = engine.advance(slots, [[row[place]] for row in ids])
        np.testing.assert_allclose(logits.numpy(), stored["logits"][:, place], atol=1e-4)


def test_positions_of_a_text_while_it_is_written() -> None:
    """Those of the whole text, across a second span and after tokens were taken back."""
    ids = [CLS, MASK, 5, MASK, END, SOP, 6, EOP, SOP, 7]
    wanted = placed(ids)
    text = SpansText(ids[:6], SOP, (MASK, GMASK))
    assert text.context == 5
    parts = [text.positions(), text.append(ids[6:7])]
    text.append([SOP, 8])
    text.truncate(7)
    parts += [text.append(ids[7:9]), text.append(ids[9:])]
    assert np.concatenate(parts, axis=1).tolist() == [wanted.position[0].tolist(), wanted.block[0].tolist()]
    assert text.context == 5
    assert SpansText([CLS, 5, 6], SOP, (MASK, GMASK)).context == 0  # read from left to right
    assert not GLM.shares_prefixes({})


def packed_pair(checkpoint: Checkpoint) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Two texts alone, together in a row with padding, and where each position's text ends."""
    config = GLM.paddle_config(checkpoint.config)
    texts = [
        np.array([5, 6, 7, config["gmask_token_id"], config["sop_token_id"], 8, 9]),
        np.array([9, config["mask_token_id"], 4, config["sop_token_id"], 3]),
    ]
    row = np.concatenate([*texts, [0, 0]])
    ends = np.array([7] * 7 + [12] * 5 + [13, 14], dtype=np.int32)
    return texts, row[None], ends.reshape(1, 1, -1, 1)


@pytest.mark.parametrize("prefix_length", [0, 3])
def test_packed_rows_equal_single_ones(checkpoint: Checkpoint, model: Any, prefix_length: int) -> None:
    texts, row, ends = packed_pair(checkpoint)
    prefix = PrefixTuning(GLM, GLM.shape(checkpoint.config), prefix_length) if prefix_length else None
    training = TrainingModel(GLM, model, prefix=prefix)
    training.eval()
    with paddle.no_grad():
        together = training.hidden({"input_ids": paddle.to_tensor(row), "segment_ends": paddle.to_tensor(ends)})
        for first, text in ((0, texts[0]), (7, texts[1])):
            alone = training.hidden({"input_ids": paddle.to_tensor(text[None])})
            found = together[0, first : first + len(text)].numpy()
            np.testing.assert_allclose(found, alone[0].numpy(), atol=1e-5)


def test_right_padding_changes_nothing(checkpoint: Checkpoint, model: Any) -> None:
    text = packed_pair(checkpoint)[0][0]
    with paddle.no_grad():
        alone = model.hidden({"input_ids": paddle.to_tensor(text[None])})
        padded = model.hidden({"input_ids": paddle.to_tensor(np.append(text, [0, 0, 0])[None])})
    np.testing.assert_allclose(padded[:, : len(text)].numpy(), alone.numpy(), atol=1e-5)


def test_texts_longer_than_the_learned_positions(checkpoint: Checkpoint, model: Any) -> None:
    limit = checkpoint.config["max_sequence_length"]
    with pytest.raises(UserError, match=f"position {limit + 1}.*max_length"):
        model.hidden({"input_ids": paddle.full([1, limit + 2], 5, dtype="int64")})


def test_names_without_the_prefix(checkpoint: Checkpoint, model: Any, tmp_path: Path) -> None:
    from utils.checkpoints.tensors import write_safetensors

    tensors = [(name.removeprefix("glm."), tensor.read()) for name, tensor in checkpoint.tensors().items()]
    write_safetensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    shutil.copy(FIXTURE / "config.json", tmp_path)
    again = load_model(locate(tmp_path), "float32")
    for (name, parameter), (_, wanted) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert bool((parameter == wanted).all()), name


def test_dropout_is_the_publishers(checkpoint: Checkpoint) -> None:
    for kind in ("embedding", "attention", "hidden"):
        model = load_model(checkpoint, "float32", settings=Settings(dropouts={kind: 0.5}))
        batch = {"input_ids": paddle.to_tensor([[5, 6, 7, 8]])}
        with paddle.no_grad():
            still = [model.hidden(batch).numpy() for _ in range(2)]
            model.train()
            moving = [model.hidden(batch).numpy() for _ in range(2)]
        np.testing.assert_array_equal(*still)
        assert np.abs(moving[0] - moving[1]).max() > 1e-2, kind


# --- configuration ---------------------------------------------------------------------------------


def test_published_vocabularies_are_known_by_size(checkpoint: Checkpoint) -> None:
    config = {name: value for name, value in checkpoint.config.items() if not name.endswith("_token_id")}
    known = GLM.paddle_config({**config, "vocab_size": 50048})
    assert (known["sop_token_id"], known["gmask_token_id"]) == (50006, 50009)
    with pytest.raises(UserError, match="sop_token_id"):
        GLM.paddle_config(config)
    with pytest.raises(UserError, match="block_position_encoding"):
        GLM.paddle_config({**checkpoint.config, "block_position_encoding": False})


def test_attention_scale_changes_no_value(checkpoint: Checkpoint, model: Any) -> None:
    scaled = load_model(replace(checkpoint, config={**checkpoint.config, "attention_scale": 8.0}), "float32")
    batch = {"input_ids": paddle.to_tensor(packed_pair(checkpoint)[0][0][None])}
    with paddle.no_grad():
        found, wanted = (one.hidden(batch).numpy() for one in (scaled, model))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_scores_of_scaled_models_have_room_in_mixed_precision(checkpoint: Checkpoint, model: Any) -> None:
    scaled = load_model(replace(checkpoint, config={**checkpoint.config, "attention_scale": 8.0}), "float32")
    for layer in scaled.layers:
        projection = layer.attention.query_key_value
        projection.weight.set_value(projection.weight * 1000)  # scores of millions, hidden states as before
        projection.bias.set_value(projection.bias * 1000)
    batch = {"input_ids": paddle.to_tensor(packed_pair(checkpoint)[0][0][None])}
    with paddle.no_grad(), autocast("float16"):
        assert np.isfinite(scaled.hidden(batch).numpy()).all()


def test_glm4_is_not_glm(checkpoint: Checkpoint) -> None:
    assert not GLM.matches({"model_type": "glm", "num_hidden_layers": 40, "num_key_value_heads": 2})
    assert GLM.matches(checkpoint.config)


# --- templates and tokenizers ----------------------------------------------------------------------


def rendered(checkpoint: Checkpoint, messages: list[Any]) -> str:
    tokenizer = load_tokenizer(FIXTURE, checkpoint.config)
    template = ChatTemplate.load(FIXTURE, default=GLM.chat_template)
    if messages[-1]["role"] == "assistant":
        ids = template.encode_conversation(tokenizer, messages)[0]
    else:
        ids = template.encode_prompt(tokenizer, messages)
    return tokenizer.decode(ids, skip_special=False)


def test_template(checkpoint: Checkpoint) -> None:
    user = {"role": "user", "content": "你好"}
    answer = {"role": "assistant", "content": "世界"}
    closing = "<|endoftext|><|startofpiece|>"
    assert rendered(checkpoint, [user]) == f"[CLS]你好[gMASK]{closing}"
    assert rendered(checkpoint, [user, answer]) == f"[CLS]你好[gMASK]{closing}世界<|endofpiece|>"
    masked = {"role": "user", "content": "我喜欢 [MASK]。"}
    assert rendered(checkpoint, [masked]) == f"[CLS]我喜欢[MASK]。{closing}"
    assert rendered(checkpoint, [user, answer, user]).count("[gMASK]") == 1


def test_answers_end_with_their_span(checkpoint: Checkpoint) -> None:
    tokenizer = load_tokenizer(FIXTURE, checkpoint.config)
    template = ChatTemplate.load(FIXTURE, default=GLM.chat_template)
    assert checkpoint.config["eop_token_id"] in template.stop_ids(tokenizer)
    assert tokenizer.token_id("[gMASK]") == checkpoint.config["gmask_token_id"]
    assert tokenizer.token_id("<|startofpiece|>") == checkpoint.config["sop_token_id"]


def test_saved_tokenizer_is_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(FIXTURE, checkpoint.config)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path, checkpoint.config)
    text = "[CLS]你好 [gMASK]<|endoftext|>"
    assert again.encode(text) == tokenizer.encode(text) and again.fingerprint() == tokenizer.fingerprint()
    (tmp_path / "cog-pretrain.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="sentencepiece"):
        load_tokenizer(tmp_path, checkpoint.config)


def assets() -> Path:
    """The authors' vocabularies, which come with the package SwissArmyTransformer."""
    found = importlib.util.find_spec("sat")
    assert found is not None and found.submodule_search_locations, "pip install --no-deps SwissArmyTransformer"
    return Path(next(iter(found.submodule_search_locations))) / "tokenization" / "embed_assets"


def test_the_published_chinese_vocabulary() -> None:
    tokenizer = load_tokenizer(
        assets() / "chinese_sentencepiece", {"model_type": "glm", "num_layers": 1, "vocab_size": 50048}
    )
    named = ("<|endoftext|>", "[CLS]", "[MASK]", "<|startofpiece|>", "<|endofpiece|>", "[sMASK]", "[gMASK]")
    assert [tokenizer.token_id(token) for token in named] == [50000, 50002, 50003, 50006, 50007, 50008, 50009]
    assert tokenizer.vocabulary == 50010 and tokenizer.bos_id == 50002 and tokenizer.pad_id == 50000
    ids = tokenizer.encode("[CLS]凯旋门位于意大利米兰市古城堡旁。 [MASK]<|endoftext|><|startofpiece|>")
    assert ids[0] == 50002 and ids[-3:] == [50003, 50000, 50006]
    assert tokenizer.decode(ids) == "凯旋门位于意大利米兰市古城堡旁。"
    assert tokenizer.decode(tokenizer.encode("你好, hello world 2024")) == "你好, hello world 2024"


def test_the_published_english_vocabulary(tmp_path: Path) -> None:
    source = assets() / "english_tokenizer"
    shutil.copy(source / "gpt2-vocab.json", tmp_path / "vocab.json")
    shutil.copy(source / "gpt2-merges.txt", tmp_path / "merges.txt")
    tokenizer = load_tokenizer(tmp_path, {"model_type": "glm", "num_layers": 1, "vocab_size": 50304})
    named = ("<|endoftext|>", "<|startofpiece|>", "<|endofpiece|>", "[CLS]", "[MASK]", "[gMASK]", "[sMASK]")
    assert [tokenizer.token_id(token) for token in named] == [50256, 50257, 50258, 50259, 50260, 50263, 50264]
    ids = tokenizer.encode("[CLS]Hello world [MASK].<|endoftext|>")
    assert ids == [50259, 15496, 995, 50260, 13, 50256]  # the blank before a mask belongs to the mask
    text = "The king's 3 horses\n\n naïve 你好"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert set(tokenizer.eos_ids) == {50256, 50258}
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved", {"model_type": "glm", "num_layers": 1, "vocab_size": 50304}).encode(text)
