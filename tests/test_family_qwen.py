"""What is special about Qwen: prompts longer than the training length, precision flags, names, tokenizer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from family_cases import hidden_logits, plain_engine

from utils.checkpoints.load import build, load_model
from utils.checkpoints.locate import Checkpoint, locate
from utils.data.template import ChatTemplate
from utils.errors import UserError
from utils.families import FAMILIES
from utils.families.qwen import ntk_factor
from utils.families.tokenizers import load_tokenizer
from utils.inference.engine import Engine

FIXTURE = Path(__file__).parent / "fixtures" / "qwen_tiny"
QWEN = FAMILIES["qwen"]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return locate(FIXTURE)


def changed(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    """With settings of config.json changed."""
    return replace(checkpoint, config={**checkpoint.config, **changes})


def engine_of(checkpoint: Checkpoint, **changes: Any) -> Engine:
    """With settings changed."""
    other = changed(checkpoint, **changes)
    return plain_engine(other, load_model(other, "float32"))


def two_steps(engine: Engine, stored: Any) -> tuple[np.ndarray, np.ndarray]:
    """Last logits of the prompts in long.npz, together in one batch, and those of one cached token more."""
    prompts = [ids[seen == 1].tolist() for ids, seen in zip(stored["ids"], stored["mask"], strict=True)]
    slots, first = engine.open(prompts)
    return first.numpy(), engine.advance(slots, stored["next_ids"][:, None].tolist()).numpy()


@pytest.mark.parametrize(("case", "ntk", "logn"), [("ntk", True, False), ("logn", False, True), ("both", True, True)])
def test_prompts_longer_than_the_training_length(checkpoint: Checkpoint, case: str, ntk: bool, logn: bool) -> None:
    stored = np.load(FIXTURE / "long.npz")
    changes = {"seq_length": int(stored["trained"]), "use_dynamic_ntk": ntk, "use_logn_attn": logn}
    first, second = two_steps(engine_of(checkpoint, **changes), stored)
    np.testing.assert_allclose(first, stored[f"{case}_last"], atol=1e-4)
    np.testing.assert_allclose(second, stored[f"{case}_next"], atol=1e-4)


def test_the_long_cases_differ_from_each_other(checkpoint: Checkpoint) -> None:
    stored = np.load(FIXTURE / "long.npz")
    off = {"seq_length": int(stored["trained"]), "use_dynamic_ntk": False, "use_logn_attn": False}
    plain, _ = two_steps(engine_of(checkpoint, **off), stored)
    for case in ("ntk", "logn", "both"):
        assert np.abs(plain - stored[f"{case}_last"]).max() > 1e-2


def test_a_long_prompt_leaves_nothing_behind(checkpoint: Checkpoint) -> None:
    """The library keeps the factor of the last prompt in its layers, and trains with it."""
    model = load_model(changed(checkpoint, seq_length=8), "float32")
    ids = paddle.to_tensor([[1, 2, 3, 4, 5]])
    with paddle.no_grad():
        before = model.hidden({"input_ids": ids}).numpy()
        plain_engine(changed(checkpoint, seq_length=8), model).open([[1] * 30])
        after = model.hidden({"input_ids": ids}).numpy()
    np.testing.assert_array_equal(before, after)


def test_texts_keep_the_factor_of_their_prompt(checkpoint: Checkpoint) -> None:
    """Also when they grow beyond it, alone, as a copy, or when another one leaves."""
    stored = np.load(FIXTURE / "long.npz")
    config = {**checkpoint.config, "seq_length": int(stored["trained"])}
    prompts = [ids[seen == 1].tolist() for ids, seen in zip(stored["ids"], stored["mask"], strict=True)]
    texts = [QWEN.text(config, prompt) for prompt in prompts]
    assert [text.stretch for text in texts] == [7.0, 3.0]  # 21 and 9 tokens, trained on 8
    texts[1].append([5] * 30)
    assert texts[1].stretch == texts[1].copy().stretch == 3.0
    assert QWEN.text({**config, "use_dynamic_ntk": False}, prompts[0]).stretch == 1.0
    engine = engine_of(checkpoint, seq_length=int(stored["trained"]))
    (gone, kept), _ = engine.open(prompts)
    (copied,) = engine.fork(kept)
    engine.free([gone])
    logits = engine.advance([kept, copied], [stored["next_ids"][1:].tolist()] * 2).numpy()
    np.testing.assert_allclose(logits, np.repeat(stored["both_next"][1:], 2, axis=0), atol=1e-4)


def test_factors_by_definition() -> None:
    """1 up to the training length, 3 up to twice, 7 up to four times that length."""
    lengths = {1: 1, 8: 1, 9: 3, 16: 3, 17: 7, 32: 7, 33: 15}
    assert {length: ntk_factor(length, 8) for length in lengths} == lengths


def test_beginnings_are_shared_only_where_no_prompt_decides_a_factor(checkpoint: Checkpoint) -> None:
    assert not QWEN.shares_prefixes({**checkpoint.config, "use_dynamic_ntk": True})
    assert QWEN.shares_prefixes({**checkpoint.config, "use_dynamic_ntk": False})


def test_names_of_the_first_release(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURE, tmp_path / "older")
    older = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    older |= {"max_position_embeddings": "n_positions", "intermediate_size": "ffn_hidden_size"}
    config = {older.get(name, name): value for name, value in checkpoint.config.items()}
    (folder / "config.json").write_text(json.dumps(config))
    found = locate(folder)
    assert QWEN.shape(found.config) == QWEN.shape(checkpoint.config)
    assert QWEN.paddle_config(found.config) == QWEN.paddle_config(checkpoint.config)


@pytest.mark.parametrize("flag", ["bf16", "fp16", "fp32"])
def test_precision_flags_are_the_publishers(checkpoint: Checkpoint, flag: str) -> None:
    """They say how the published code runs; the type to compute in is the user's, else the weights' own."""
    config = {**checkpoint.config, flag: True}
    assert QWEN.paddle_config(config) == QWEN.paddle_config(checkpoint.config)
    assert checkpoint.dtype == "bfloat16"
    assert not any(QWEN.published_config(config)[name] for name in ("bf16", "fp16", "fp32"))


def test_sizes_that_no_qwen_has(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError) as caught:
        QWEN.paddle_config({**checkpoint.config, "kv_channels": 16, "tie_word_embeddings": True})
    assert "kv_channels 16" in str(caught.value) and "tie_word_embeddings" in str(caught.value)


def test_biases_everywhere(checkpoint: Checkpoint) -> None:
    parameters = dict(build(changed(checkpoint, no_bias=False), "float32").named_parameters())
    weights = QWEN.weights({**checkpoint.config, "no_bias": False})
    assert {weight.parameter for weight in weights} == set(parameters)


def test_rotary_on_a_part_of_the_head(checkpoint: Checkpoint) -> None:
    """The library's rotary embedding fails then; position must still matter, only through that part."""
    model = load_model(changed(checkpoint, rotary_pct=0.5), "float32")
    near, moved, spread = (
        hidden_logits(QWEN, model, np.array([[5, 6, 7, 8]]), positions=where)[0]
        for where in (range(4), range(40, 44), range(0, 36, 9))
    )
    np.testing.assert_allclose(near, moved, atol=1e-4)  # only distances count
    assert np.abs(near[-1] - spread[-1]).max() > 1e-2


# --- tokenizer and template ------------------------------------------------------------------------


def test_tiny_tokenizer(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(FIXTURE, checkpoint.config)
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.pad_id == tokenizer.eos_id == 266
    text = "Hello, the king's 12\n\n  的 e\u0301 🙂<|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.token_id("<|im_end|>") == ids[-1]
    assert tokenizer.decode(ids, skip_special=False) == text.replace("e\u0301", "é")
    assert tokenizer.decode(ids) == text.replace("e\u0301", "é").removesuffix("<|im_end|>")
    assert tokenizer.decode([10**6, *tokenizer.encode("the")]) == "the"
    assert tokenizer.token(tokenizer.token_id("the") or 0) == "the"
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved", checkpoint.config)
    assert again.encode(text) == ids and again.fingerprint() == tokenizer.fingerprint()


def test_chatml(checkpoint: Checkpoint) -> None:
    tokenizer = load_tokenizer(FIXTURE, checkpoint.config)
    template = ChatTemplate.load(FIXTURE, default=QWEN.chat_template)
    ids = template.encode_prompt(tokenizer, [{"role": "user", "content": "the 的"}])
    assert tokenizer.decode(ids, skip_special=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nthe 的<|im_end|>\n<|im_start|>assistant\n"
    )
    assert set(template.stop_ids(tokenizer)) == {266, 268}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:40], "!!! 40", *lines[41:]], "line 41"),
        (lambda lines: lines[:-3] + lines[-2:], "gaps"),
        (lambda lines: ["YWI= 0", *lines[1:]], "single bytes"),
    ],
)
def test_damaged_vocabulary(checkpoint: Checkpoint, tmp_path: Path, damage: Any, message: str) -> None:
    lines = (FIXTURE / "qwen.tiktoken").read_text().splitlines()
    (tmp_path / "qwen.tiktoken").write_text("\n".join(damage(lines)))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path, checkpoint.config)


def test_a_vocabulary_of_another_model(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match="vocab_size"):
        load_tokenizer(FIXTURE, {**checkpoint.config, "vocab_size": 200})


def test_the_published_vocabulary() -> None:
    """It comes with the package dashscope."""
    import importlib.util

    found = importlib.util.find_spec("dashscope")
    assert found is not None and found.submodule_search_locations, "pip install --no-deps dashscope"
    folder = Path(next(iter(found.submodule_search_locations))) / "resources"
    tokenizer = load_tokenizer(folder, {"model_type": "qwen", "vocab_size": 151936})
    assert tokenizer.vocabulary == 151851
    assert [tokenizer.token_id(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>")] == [
        151643,
        151644,
        151645,
        151646,
    ]
    assert tokenizer.encode("<|im_start|>user\n你好<|im_end|>\n") == [151644, 872, 198, 108386, 151645, 198]
    assert tokenizer.encode("Hello, world! 2024") == [9707, 11, 1879, 0, 220, 17, 15, 17, 19]
    texts = [
        "The quick brown fox\n\n\tjumps.",
        "def f(x):\n    return x ** 2  # π",
        "我喜欢吃苹果。🙂👩‍👩‍👧",
        "I'LL we've 3.14",
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
