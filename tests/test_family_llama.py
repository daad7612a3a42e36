"""What is special about LLaMA and the families built like it: rotary tables, odd heads, windows, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from family_cases import ENGINES, FIXTURES, Maker, case, hidden_logits, plain, plain_engine, random_prefix

from utils.adapters.prefix import PrefixTuning
from utils.checkpoints import locate
from utils.checkpoints.load import load_model
from utils.errors import UserError
from utils.families.rope import frequencies, rope_scaling
from utils.kernels.masks import window_mask
from utils.kernels.rotary import RotaryTable


def copy_of(name: str, folder: Path, **config: Any) -> Path:
    """A case with some fields of its config.json replaced."""
    shutil.copytree(FIXTURES / name, folder)
    written = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**written, **config}), "utf-8")
    return folder


# --- what is not computed is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("llama_tiny", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ("llama_tiny", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope' is not supported"),
        ("llama_tiny", {"rope_scaling_type": "dynamic_ntk", "rope_scaling_factor": 2.0}, "'dynamic_ntk' is not"),
        ("llama_tiny", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor, high_freq_factor"),
        ("llama_tiny", {"rope_scaling": {"type": "linear"}}, "needs the numbers factor"),
        ("llama_tiny", {"rope_scaling": "linear"}, "expected an object"),
        ("llama_tiny", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ("llama_tiny", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama_tiny", {"alibi": True}, "alibi"),
        ("llama_tiny", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ("qwen2_window", {"max_window_layers": 1, "layer_types": None}, "max_window_layers"),
        ("qwen2_window", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ],
)
def test_refused_before_any_weight_is_read(tmp_path: Path, name: str, config: dict[str, Any], message: str) -> None:
    folder = copy_of(name, tmp_path / "m", **config)
    with pytest.raises(UserError, match=message) as refused:
        locate(folder)
    assert all(fault.startswith(f"{folder / 'config.json'}: ") for fault in refused.value.faults)


# --- rotary angles ------------------------------------------------------------------------------------


def test_scalings_by_definition() -> None:
    plain = frequencies({"rope_theta": 100.0}, 8)
    np.testing.assert_allclose(plain.inverse, [1.0, 100**-0.25, 0.1, 100**-0.75], rtol=1e-6)
    assert plain.magnitude == 1.0
    slowed = frequencies({"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 4}}, 8)
    np.testing.assert_allclose(slowed.inverse, plain.inverse / 4, rtol=1e-6)
    assert rope_scaling({"rope_scaling": {"rope_type": "default"}}) is None
    paddle_names = {"rope_scaling_type": "linear", "rope_scaling_factor": 4.0}
    assert rope_scaling(paddle_names) == {"rope_type": "linear", "factor": 4.0}
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
    found = frequencies({"rope_scaling": yarn}, 64)
    unscaled = frequencies({}, 64)
    assert found.magnitude == pytest.approx(0.1 * np.log(8) + 1)
    assert found.inverse[0] == unscaled.inverse[0]  # fast rotations keep their pace
    assert found.inverse[-1] == pytest.approx(unscaled.inverse[-1] / 8)  # slow ones are slowed
    assert frequencies({"rope_scaling": {**yarn, "attention_factor": 1.5}}, 64).magnitude == 1.5
    both = {**yarn, "mscale": 2.0, "mscale_all_dim": 1.0}
    ratio = (0.2 * np.log(8) + 1) / (0.1 * np.log(8) + 1)
    assert frequencies({"rope_scaling": both}, 64).magnitude == pytest.approx(ratio)


def test_linear_scaling_survives_both_layouts(tmp_path: Path) -> None:
    from utils.checkpoints.save import save_model

    wide = case("llama_wide_heads")
    for layout in ("paddle", "hf"):
        folder = tmp_path / layout
        folder.mkdir()
        save_model(folder, wide.model, wide.checkpoint.family, wide.checkpoint.config, export_format=layout)
        written = json.loads((folder / "config.json").read_text("utf-8"))
        assert written["rope_scaling"] == {"rope_type": "linear", "factor": 3.0}
        if layout == "paddle":  # what the library reads
            assert (written["rope_scaling_type"], written["rope_scaling_factor"]) == ("linear", 3.0)
        assert written["head_dim"] == 12 and written["attention_bias"] and written["mlp_bias"]


def test_rotary_settings_in_one_object(tmp_path: Path) -> None:
    """As transformers 5 writes config.json."""
    one = case("llama_3")
    written = dict(one.checkpoint.config)
    together = {**written["rope_scaling"], "rope_theta": written["rope_theta"]}
    folder = copy_of("llama_3", tmp_path / "m", rope_parameters=together, rope_scaling=None, rope_theta=None)
    again = locate(folder)
    found = hidden_logits(again.family, load_model(again, "float32"), one.rows[0][None])[0]
    assert np.abs(found - one.reference["logits"][0]).max() < 1e-4
    published = again.family.published_config(again.config)
    assert published["rope_scaling"] == written["rope_scaling"] and published["rope_theta"] == written["rope_theta"]


def test_one_table_for_all_layers_that_grows_on_demand() -> None:
    one = case("llama_tiny")
    model = load_model(one.checkpoint, "float32")
    assert len(model.rotaries) == 1 and isinstance(model.rotaries[0].table, RotaryTable)
    assert not [name for name in model.state_dict() if "rotary" in name]
    table = RotaryTable(np.array([1.0, 0.5, 1.0, 0.5], np.float32), 2.0)
    few, many = (paddle.arange(count).unsqueeze(0) for count in (3, 1000))
    short, _ = table.at(few, 3, paddle.float32)
    cos, sin = table.at(many, 1000, paddle.float32)
    assert short.shape == [1, 3, 1, 4] and cos.shape == sin.shape == [1, 1000, 1, 4]
    places = np.arange(1000)[:, None] * np.array([1.0, 0.5, 1.0, 0.5])
    np.testing.assert_allclose(cos[0, :, 0].numpy(), 2 * np.cos(places), atol=2e-4)
    np.testing.assert_allclose(sin[0, :, 0].numpy(), 2 * np.sin(places), atol=2e-4)
    assert table.at(few, 5, paddle.bfloat16)[0].dtype == paddle.bfloat16


def test_more_positions_than_the_first_table() -> None:
    """A prompt of 300 tokens, and steps from before the table's end to behind it, agree with the training forward."""
    one = case("llama_tiny")
    model = load_model(one.checkpoint, "float32")
    ids = np.random.default_rng(0).integers(3, 264, (1, 301))
    whole = hidden_logits(one.checkpoint.family, model, ids)[0]
    engine = plain_engine(one.checkpoint, model)
    slots, logits = engine.open([ids[0, :255].tolist()])
    for place in range(255, 301):
        assert np.abs(logits.numpy()[0] - whole[place - 1]).max() < 1e-4
        logits = engine.advance(slots, [[int(ids[0, place])]])
    assert np.abs(logits.numpy()[0] - whole[-1]).max() < 1e-4
    at_once = plain_engine(one.checkpoint, model).open([ids[0, :300].tolist()])[1]
    assert np.abs(at_once.numpy()[0] - whole[-2]).max() < 1e-4


# --- two end tokens -----------------------------------------------------------------------------------


def test_both_end_tokens_of_llama3_end_an_answer() -> None:
    from utils.inference.loading import load, prepare
    from utils.inference.sampling import SamplingOptions

    prepared = prepare(str(FIXTURES / "llama_3"), device="cpu", dtype="float32")
    assert {2, 7} <= set(prepared.tokenizer.eos_ids)
    generator = load(prepared, "cpu")
    options = SamplingOptions(max_new_tokens=60, top_k=0, temperature=3.0, seed=4)
    answers = generator.generate([[5, 6, 9 + n] for n in range(40)], options, 40)
    ends = {one.tokens[-1] for one in answers if one.finish_reason == "stop"}
    assert ends == {2, 7}
    assert all(not {2, 7} & set(one.tokens[:-1]) for one in answers)


# --- windows ------------------------------------------------------------------------------------------


def test_window_mask_by_definition() -> None:
    mask = window_mask(4, cached=3, window=2, prefix=2)[0, 0].numpy()
    seen = [[key < 2 or 0 <= query - key < 2 for key in range(7)] for query in range(3, 7)]
    assert mask.tolist() == [[see and key <= query for key, see in enumerate(row)] for query, row in enumerate(seen, 3)]


def test_the_window_changes_the_answer(tmp_path: Path) -> None:
    """Keeps the reference honest: 16 positions, of which 5 are seen; and no window is LLaMA."""
    one = case("mistral")
    assert one.checkpoint.config["sliding_window"] < one.reference["ids"].shape[1]
    open_ended = locate(copy_of("mistral", tmp_path / "m", sliding_window=None))
    ids = one.rows[0][None]
    free = hidden_logits(open_ended.family, load_model(open_ended, "float32"), ids)[0]
    wanted = one.reference["logits"][0]
    assert np.abs(free[:5] - wanted[:5]).max() < 1e-4 and np.abs(free[5:] - wanted[5:]).max() > 0.1


@pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES)
def test_a_prefix_is_seen_beyond_the_window(make: Maker) -> None:
    """Training with a prefix, and prefill and steps behind it, agree; far positions still see the prefix."""
    one = case("mistral")
    prefix, ids = random_prefix(one.checkpoint, 3), one.rows[0]
    trained = hidden_logits(one.checkpoint.family, one.model, ids[None], prefix)[0]
    engine = make(one, prefix)
    slots, _ = engine.open([ids[:9].tolist()])
    for place in range(9, len(ids)):
        logits = engine.advance(slots, [[int(ids[place])]])
        assert np.abs(logits.numpy()[0] - trained[place]).max() < 1e-4
    assert np.abs(trained[-1] - one.reference["logits"][0][-1]).max() > 0.05


@pytest.mark.parametrize("name", ["mistral", "qwen2_window"])
def test_a_prefix_started_from_text_has_read_it_through_the_window(name: str) -> None:
    """The second layer's key and value at a place depend on one window of tokens before it, not on all."""
    one = case(name)
    family, window = one.checkpoint.family, one.checkpoint.config["sliding_window"]
    text = one.rows[0].tolist()
    length = len(text)
    found = []
    for first in (text[0], text[0] + 1):
        prefix = PrefixTuning(family, family.shape(one.checkpoint.config), length)
        prefix.start_from_text(plain(one), [first, *text[1:]])
        found.append([value.numpy()[0] for value in prefix.cache(1)[1]])
    for one_value, other in zip(*found, strict=True):
        assert np.abs(one_value[:window] - other[:window]).max() > 1e-3
        assert np.array_equal(one_value[window:], other[window:])
