"""LoRA and prefix files: what fits is filled, what does not is named, and nothing is changed then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from family_cases import hidden_logits, plain_engine
from saved import save_lora, save_prefix
from tiny_runs import Tiny, tensors, tiny  # noqa: F401

from utils.adapters.lora import add_lora, load_lora
from utils.adapters.lora_files import read_lora
from utils.adapters.prefix import PrefixTuning, load_prefix
from utils.adapters.targets import adapted_shapes, target_patterns
from utils.checkpoints.load import load_model
from utils.checkpoints.locate import Checkpoint, locate
from utils.checkpoints.tensors import write_safetensors
from utils.errors import UserError

LINEARS = ["a.0.dense", "a.0.dense_h_to_4h", "a.1.dense", "a.1.query_key_value"]


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["dense"], {"a.0.dense", "a.1.dense"}),
        ([r".*\.dense.*"], {"a.0.dense", "a.0.dense_h_to_4h", "a.1.dense"}),
        ([r"a\.1\..*", "dense"], {"a.0.dense", "a.1.dense", "a.1.query_key_value"}),
    ],
)
def test_a_name_is_a_whole_name_and_a_pattern_a_pattern(targets: list[str], found: set[str]) -> None:
    import re

    patterns = target_patterns(LINEARS, targets)
    assert {name for name in LINEARS if any(re.fullmatch(pattern, name) for pattern in patterns)} == found


def test_every_wrong_target_is_named() -> None:
    with pytest.raises(UserError) as caught:
        target_patterns(LINEARS, ["den", "(", "dense"])
    assert len(caught.value.faults) == 2
    assert "'den' matches no Linear layer; there are: dense, dense_h_to_4h, query_key_value" in caught.value.faults[0]
    assert "no valid regular expression" in caught.value.faults[1]


@pytest.fixture(scope="module")
def base(tiny: Tiny) -> Checkpoint:  # noqa: F811
    return locate(tiny.model)


def adapted(base: Checkpoint, seed: int = 0, **options: Any) -> Any:
    paddle.seed(seed)
    lora = add_lora(load_model(base, "float32"), rank=4, **options)
    for name, parameter in lora.model.named_parameters():
        if name.endswith("lora_B"):
            parameter.set_value((paddle.randn(parameter.shape) * 0.1).astype(parameter.dtype))
    return lora


def logits(base: Checkpoint, model: Any) -> np.ndarray:
    with paddle.no_grad():
        ids = paddle.arange(40).reshape([2, 20])
        return model.logits(model.hidden({"input_ids": ids})).numpy()


def test_only_lora_is_trained_and_its_sizes_are_known_before(base: Checkpoint) -> None:
    lora = adapted(base)
    trained = {name for name, parameter in lora.model.named_parameters() if not parameter.stop_gradient}
    assert trained == {f"{layer}.{part}" for layer in adapted_shapes(base, None) for part in ("lora_A", "lora_B")}
    shapes = {name: tuple(parameter.shape) for name, parameter in lora.model.named_parameters()}
    for layer, (rows, columns) in adapted_shapes(base, None).items():
        assert shapes[f"{layer}.lora_A"] == (rows, 4) and shapes[f"{layer}.lora_B"] == (4, columns)


def test_the_scale_is_in_the_output(base: Checkpoint) -> None:
    """W + scale * A B, with alpha / r, or alpha / sqrt(r) with rsLoRA."""
    for rslora, scale in ((False, 12 / 4), (True, 12 / 2)):
        lora = adapted(base, alpha=12, rslora=rslora)
        layer = lora.model.llama.layers[0].mlp.down_proj
        x = paddle.randn([3, layer.weight.shape[0]])
        whole = layer.weight + scale * paddle.matmul(layer.lora_A, layer.lora_B)
        np.testing.assert_allclose(layer(x).numpy(), paddle.matmul(x, whole).numpy(), atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 1e-9])  # the library's fused layer, and the other one
def test_weights_of_another_type_are_cast_to_that_of_the_base(base: Checkpoint, dropout: float) -> None:
    """As trained float32 weights over a base in half precision, with types that a CPU computes in."""
    outputs, gradients = [], []
    for dtype in ("float32", "float64"):
        lora = adapted(base, dropout=dropout, dtype=dtype)
        layer = lora.model.llama.layers[0].mlp.down_proj
        assert (layer.lora_A.dtype, layer.weight.dtype) == (getattr(paddle, dtype), paddle.float32)
        x = paddle.cos(paddle.arange(3 * layer.weight.shape[0], dtype="float32")).reshape([1, 3, -1])
        outputs.append(layer(x))
        assert outputs[-1].dtype == paddle.float32
        outputs[-1].sum().backward()
        gradients.append([layer.lora_A.grad, layer.lora_B.grad])
        assert {gradient.dtype for gradient in gradients[-1]} == {getattr(paddle, dtype)}
        assert "lora_A" in dict(layer.named_parameters()) and layer.lora_A.dtype == getattr(paddle, dtype)
    np.testing.assert_array_equal(outputs[1].numpy(), outputs[0].numpy())
    for ours, theirs in zip(gradients[1], gradients[0], strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-6)


@pytest.mark.parametrize("suffix", [".safetensors", ".pdparams"])
def test_an_adapter_comes_back_as_it_was(base: Checkpoint, tmp_path: Path, suffix: str) -> None:
    lora = adapted(base, dropout=0.3, rslora=True)
    lora.model.eval()
    save_lora(tmp_path, lora, base)
    if suffix == ".pdparams":  # as earlier toolchains wrote it
        weights = tensors(tmp_path / "lora_model_state.safetensors")
        paddle.save({name: paddle.to_tensor(value) for name, value in weights.items()},
                    str(tmp_path / "lora_model_state.pdparams"))  # fmt: skip
        (tmp_path / "lora_model_state.safetensors").unlink()
        config = json.loads((tmp_path / "lora_config.json").read_text())
        for name in ("base_fingerprint", "base_model_name_or_path", "scaling"):
            del config[name]
        (tmp_path / "lora_config.json").write_text(json.dumps(config))
    again = load_lora(load_model(base, "float32"), read_lora(tmp_path, base))
    again.model.eval()
    np.testing.assert_array_equal(logits(base, again.model), logits(base, lora.model))
    assert np.abs(logits(base, again.model) - logits(base, load_model(base, "float32"))).max() > 0.01


def test_weights_that_do_not_fit_are_named_before_a_model_loads(base: Checkpoint, tmp_path: Path) -> None:
    lora = adapted(base, targets=["q_proj", "v_proj"])
    save_lora(tmp_path, lora, base)
    path = tmp_path / "lora_model_state.safetensors"
    saved = tensors(path)
    first, _, other, half = sorted(saved)[:4]
    saved["llama.layers.9.self_attn.q_proj.lora_A"] = saved.pop(first)
    saved[half] = saved[half][:, :-1]
    write_safetensors(path, list(saved.items()), {"format": "np"})
    with pytest.raises(UserError) as caught:
        read_lora(tmp_path, base)
    text = "\n".join(caught.value.faults)
    layer = first.removesuffix(".lora_A")
    assert f"lora_A or lora_B is missing for {layer}, llama.layers.9.self_attn.q_proj" in text
    assert f"{half.removesuffix('.lora_B')} (A {list(saved[other].shape)}, B {list(saved[half].shape)}" in text


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_comes_back_as_it_was(base: Checkpoint, tmp_path: Path, projection: bool) -> None:
    paddle.seed(3)
    shape = base.family.shape(base.config)
    prefix = PrefixTuning(base.family, shape, 6, projection=projection, projection_hidden=10)
    save_prefix(tmp_path, prefix, base)
    again = load_prefix(load_model(base, "float32"), base.family, tmp_path, base)
    assert again.length == 6
    np.testing.assert_array_equal(again.flat().numpy(), prefix.flat().numpy())
    config = json.loads((tmp_path / "prefix_config.json").read_text())
    config["num_prefix_tokens"] = 7
    (tmp_path / "prefix_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"has shape \[6, "):
        load_prefix(load_model(base, "float32"), base.family, tmp_path, base)


def test_a_prefix_of_text_is_the_text_itself(base: Checkpoint) -> None:
    """What follows a prefix made of tokens sees the keys and values of these tokens, at their places."""
    model = load_model(base, "float32")
    family = base.family
    text, rest = list(range(10, 15)), list(range(20, 28))
    prefix = PrefixTuning(family, family.shape(base.config), 5)
    prefix.start_from_text(plain_engine(base, model), text)
    behind = hidden_logits(family, model, np.array([rest]), prefix, range(5, 13))[0]
    joined = hidden_logits(family, model, np.array([text + rest]))[0]
    np.testing.assert_allclose(behind, joined[5:], atol=1e-5)


def test_a_prefix_is_stored_by_keys_and_values(base: Checkpoint) -> None:
    """Files of earlier toolchains hold the keys of all layers, then the values; a cache is a pair per layer."""
    shape = base.family.shape(base.config)
    prefix = PrefixTuning(base.family, shape, 6)
    flat, cache = prefix.flat().numpy()[0], prefix.cache(3)
    assert len(cache) == shape.layers
    for layer, (key, value) in enumerate(cache):
        assert key.shape == value.shape == [3, 6, shape.kv_heads, shape.head_dim]
        assert all(np.array_equal(row, flat[:, layer]) for row in key.numpy())
        assert all(np.array_equal(row, flat[:, shape.layers + layer]) for row in value.numpy())
