"""What is special about GPT: fused Conv1D weights, mask buffers, learned positions, variants of published models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from saved import save_lora

from utils.adapters.lora import add_lora, load_lora
from utils.adapters.lora_files import read_lora
from utils.adapters.prefix import PrefixTuning
from utils.checkpoints import Checkpoint, locate
from utils.checkpoints.convert_peft import from_peft, to_peft
from utils.checkpoints.load import load_model
from utils.checkpoints.match import match
from utils.checkpoints.merge import merge_lora
from utils.checkpoints.save import save_model
from utils.checkpoints.tensors import in_memory, read_tensors, write_lazy
from utils.errors import UserError
from utils.families import FAMILIES, family_of

FIXTURES = Path(__file__).parent / "fixtures"
FAMILY = FAMILIES["gpt-3"]


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return locate(FIXTURES / "gpt2_tiny")


@pytest.fixture(scope="module")
def peft() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / "peft_gpt2" / "logits.npz"))


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    model.eval()
    with paddle.no_grad():
        return model.logits(model.hidden({"input_ids": paddle.to_tensor(ids)})).numpy()


def changed(folder: Path, config: dict[str, Any] | None = None, **tensors: np.ndarray | None) -> Checkpoint:
    """gpt2_tiny with tensors added, replaced or (None) removed."""
    shutil.copytree(FIXTURES / "gpt2_tiny", folder)
    stored = dict(read_tensors(folder / "model.safetensors")) | tensors
    kept = [in_memory(name, np.array(values)) for name, values in stored.items() if values is not None]
    write_lazy(folder / "model.safetensors", kept, {"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **(config or {})}))
    return locate(folder)


def test_query_key_and_value_are_thirds_of_one_tensor(tiny: Checkpoint) -> None:
    fused = tiny.tensors()["h.1.attn.c_attn.weight"].read()
    model = load_model(tiny, "float32")
    attention = model.gpt.decoder.layers[1].self_attn
    parts = [getattr(attention, name).weight.numpy() for name in ("q_proj", "k_proj", "v_proj")]
    assert np.array_equal(np.concatenate(parts, axis=1), fused)


def test_only_known_buffers_are_left_over(tmp_path: Path, tiny: Checkpoint) -> None:
    assert any(name.endswith("attn.masked_bias") for name in tiny.tensors())
    match(tiny)
    with pytest.raises(UserError, match=r"h\.0\.attn\.other"):
        match(changed(tmp_path / "m", **{"h.0.attn.other": np.zeros(3, "float32")}))


def test_a_fused_tensor_that_is_missing_or_of_another_size_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tensor for transformer\.h\.0\.attn\.c_attn\.weight$"):
        match(changed(tmp_path / "missing", **{"h.0.attn.c_attn.weight": None}))
    for name, width in (("whole", 3 * 16), ("odd", 97)):
        wrong = changed(tmp_path / name, **{"h.0.attn.c_attn.weight": np.zeros((32, width), "float32")})
        with pytest.raises(UserError, match=r"h\.0\.attn\.c_attn\.weight is \["):
            load_model(wrong, "float32")


def test_a_tied_head_that_is_stored_too_is_no_fault(tmp_path: Path, tiny: Checkpoint) -> None:
    embedding = tiny.tensors()["wte.weight"].read()
    again = changed(tmp_path / "m", **{"lm_head.weight": embedding})
    ids = np.array([[5, 6, 7]])
    assert np.array_equal(logits(load_model(again, "float32"), ids), logits(load_model(tiny, "float32"), ids))


def test_peft_adapters_of_fused_layers_compute_what_peft_computes(
    tmp_path: Path, tiny: Checkpoint, peft: dict[str, np.ndarray]
) -> None:
    """The adapter and its logits come from PEFT itself, see fixtures/make_gpt.py."""
    from_peft(FIXTURES / "peft_gpt2", tmp_path / "adapter", tiny)
    model = load_lora(load_model(tiny, "float32"), read_lora(tmp_path / "adapter", tiny)).model
    assert np.abs(logits(model, peft["ids"]) - peft["logits"]).max() < 1e-4
    assert np.abs(logits(load_model(tiny, "float32"), peft["ids"]) - peft["logits"]).max() > 0.1
    for export_format in ("paddle", "hf"):
        target = tmp_path / export_format
        merge_lora(tiny, tmp_path / "adapter", target, export_format=export_format)
        assert np.abs(logits(load_model(locate(target), "float32"), peft["ids"]) - peft["logits"]).max() < 1e-4


@pytest.mark.parametrize("rslora", [False, True])
def test_parts_with_adapters_of_their_own_become_one_wider_adapter(
    tmp_path: Path, tiny: Checkpoint, rslora: bool
) -> None:
    """What PEFT adds to a fused weight, scale * A B, is what ours adds to its parts."""
    paddle.seed(5)
    adapted = add_lora(
        load_model(tiny, "float32"), rank=2, alpha=3, targets=["q_proj", "v_proj", "linear2"], rslora=rslora
    )
    for name, parameter in adapted.model.named_parameters():
        if "lora_" in name:
            parameter.set_value(paddle.normal(0.0, 0.3, parameter.shape))
    (tmp_path / "ours").mkdir()
    save_lora(tmp_path / "ours", adapted, tiny)
    to_peft(tmp_path / "ours", tmp_path / "peft", tiny)
    merge_lora(tiny, tmp_path / "ours", tmp_path / "merged", export_format="hf")

    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] and config["r"] == 2
    written = dict(read_tensors(tmp_path / "peft" / "adapter_model.safetensors"))
    merged = dict(read_tensors(tmp_path / "merged" / "model.safetensors"))
    layers = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in written}
    assert len(layers) == 4  # c_attn and mlp.c_proj of both layers
    for layer in layers:
        a, b = (written[f"base_model.model.{layer}.lora_{letter}.weight"] for letter in "AB")
        rank = config["rank_pattern"].get(layer, config["r"])
        alpha = config["alpha_pattern"].get(layer, config["lora_alpha"])
        assert a.shape[0] == b.shape[1] == rank == (4 if layer.endswith("c_attn") else 2)
        scale = alpha / (rank**0.5 if rslora else rank)
        base = tiny.tensors()[f"{layer.removeprefix('transformer.')}.weight"].read()
        assert np.abs(base + scale * (b @ a).T - merged[f"{layer}.weight"]).max() < 1e-5


def test_a_prefix_does_not_use_up_positions(tiny: Checkpoint) -> None:
    """As many tokens as there are positions fit behind any prefix; the library's table of masks ends there."""
    model = load_model(tiny, "float32")
    model.eval()
    prefix = PrefixTuning(FAMILY, FAMILY.shape(tiny.config), 40)
    with paddle.no_grad():
        batch = {"input_ids": paddle.full([2, 48], 9, dtype="int64")}
        hidden = model.hidden(batch, prefix.cache(2))
    assert hidden.shape == [2, 48, 32] and bool(paddle.isfinite(hidden).all())


def test_configurations_of_paddlenlp_and_of_transformers_say_the_same(tmp_path: Path) -> None:
    theirs = {
        "model_type": "gpt",
        "architectures": ["GPTForCausalLM"],
        "vocab_size": 50304,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 8192,
        "hidden_act": "gelu",
        "max_position_embeddings": 1024,
    }
    assert family_of(theirs) is FAMILY
    published = FAMILY.published_config(theirs)
    assert family_of(published) is FAMILY
    assert published["activation_function"] == "gelu_new"  # PaddleNLP's "gelu" is the tanh form
    assert FAMILY.shape(published) == FAMILY.shape(theirs) == FAMILY.shape(FAMILY.paddle_config(published))
    assert FAMILY.paddle_config({**published, "activation_function": "gelu"})["activation"] == "gelu"


def test_what_a_published_model_sets_survives_the_paddle_layout(tmp_path: Path) -> None:
    """An exact GELU, another epsilon, scores scaled by layer, an untied head: each moves the logits."""
    base = locate(FIXTURES / "gpt2_prefixed")
    reference = dict(np.load(base.folder / "reference.npz"))
    save_model(tmp_path, load_model(base, "float32"), FAMILY, base.config)
    again = locate(tmp_path)
    ids = reference["ids"][:1]
    assert np.abs(logits(load_model(again, "float32"), ids) - reference["logits"][:1]).max() < 1e-4
    stored = json.loads((tmp_path / "config.json").read_text())
    others: dict[str, Any] = {
        "activation": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": False,
    }
    for name, value in others.items():
        (tmp_path / "config.json").write_text(json.dumps({**stored, name: value}))
        different = np.abs(logits(load_model(locate(tmp_path), "float32"), ids) - reference["logits"][:1]).max()
        assert different > 1e-4, name


def test_an_unknown_activation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'mish' is not known"):
        load_model(changed(tmp_path / "m", {"activation_function": "mish"}), "float32")
