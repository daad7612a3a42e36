"""What is special about GPT-J: attention and MLP side by side, a head with a bias, neighbours that turn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from family_cases import FIXTURES, cached, case, hidden_logits, step_layer

from utils.checkpoints import Checkpoint, locate
from utils.checkpoints.load import load_model, new_model
from utils.checkpoints.match import match
from utils.checkpoints.tensors import in_memory, read_tensors, write_lazy
from utils.errors import UserError
from utils.families import FAMILIES, family_of
from utils.kernels import inference as kernels
from utils.model.architecture import rotated_neighbours

FAMILY = FAMILIES["gptj"]
IDS = np.array([[5, 6, 7, 90, 91, 5, 6]])


def changed(folder: Path, config: dict[str, Any] | None = None, **tensors: np.ndarray | None) -> Checkpoint:
    """gptj_tiny with tensors added, replaced or (None) removed."""
    shutil.copytree(FIXTURES / "gptj_tiny", folder)
    stored = dict(read_tensors(folder / "model.safetensors")) | tensors
    kept = [in_memory(name, np.array(values)) for name, values in stored.items() if values is not None]
    write_lazy(folder / "model.safetensors", kept, {"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **(config or {})}))
    return locate(folder)


def logits(checkpoint: Checkpoint) -> np.ndarray:
    return hidden_logits(FAMILY, load_model(checkpoint, "float32"), IDS)[0]


@pytest.fixture(scope="module")
def tiny() -> np.ndarray:
    return logits(case("gptj_tiny").checkpoint)


def test_the_configuration_of_the_published_model() -> None:
    published = {
        "architectures": ["GPTJForCausalLM"],
        "model_type": "gptj",
        **{"n_embd": 4096, "n_head": 16, "n_inner": None, "n_layer": 28, "n_positions": 2048, "rotary_dim": 64},
        **{"rotary": True, "scale_attn_weights": True, "tie_word_embeddings": False, "vocab_size": 50400},
    }
    assert family_of(published) is FAMILY
    shape = FAMILY.shape(published)
    assert (shape.head_dim, shape.intermediate, shape.positions, shape.tied) == (256, 16384, 2048, False)
    assert FAMILY.shape(FAMILY.paddle_config(published)) == shape == FAMILY.shape(FAMILY.published_config(published))
    assert len(FAMILY.weights(published)) == 1 + 28 * 10 + 4


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ({"rotary_dim": 18}, "rotary_dim is 18; expected an even number up to 16"),
        ({"rotary_dim": 5}, "rotary_dim is 5"),
        ({"rotary_dim": None}, "rotary_dim is None"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is not supported"),
        ({"activation_function": "mish"}, "'mish' is not known"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path: Path, setting: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        load_model(changed(tmp_path / "m", setting), "float32")


@pytest.mark.parametrize(
    "setting", [{"rotary_dim": 8}, {"activation_function": "relu"}, {"layer_norm_epsilon": 1e-3}], ids=str
)
def test_settings_move_the_logits(tmp_path: Path, tiny: np.ndarray, setting: dict[str, Any]) -> None:
    assert np.abs(logits(changed(tmp_path / "m", setting)) - tiny).max() > 1e-3


def test_a_bias_of_the_head_is_added_to_the_logits(tmp_path: Path, tiny: np.ndarray) -> None:
    bias = case("gptj_tiny").checkpoint.tensors()["lm_head.bias"].read()
    without = logits(changed(tmp_path / "m", **{"lm_head.bias": np.zeros_like(bias)}))
    assert np.abs(tiny - without - bias).max() < 1e-5
    with pytest.raises(UserError, match=r"no tensor for lm_head\.bias"):
        match(changed(tmp_path / "none", **{"lm_head.bias": None}))


def test_only_known_buffers_are_left_over(tmp_path: Path) -> None:
    assert any(name.endswith("attn.masked_bias") for name in case("gptj_tiny").checkpoint.tensors())
    with pytest.raises(UserError, match=r"h\.0\.attn\.other"):
        match(changed(tmp_path / "m", **{"transformer.h.0.attn.other": np.zeros(3, "float32")}))


def test_attention_and_mlp_share_their_norm() -> None:
    """The inference model has one a layer, and computes it once."""
    norms = [part for part in step_layer("gptj_tiny", True).sublayers() if isinstance(part, kernels.Norm)]
    assert len(norms) == FAMILY.shape(case("gptj_tiny").checkpoint.config).layers + 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_weights_are_as_wide_as_the_configuration_says(dtype: str) -> None:
    paddle.seed(3)
    one = case("gptj_tiny").checkpoint
    model = new_model(one.family, one.config, dtype)
    for weight in (model.transformer.wte.weight, model.transformer.h[1].attn.q_proj.weight, model.lm_head.weight):
        assert float(weight.astype("float32").std()) == pytest.approx(0.02, rel=0.1)
    assert not model.lm_head.bias.astype("float32").any()


@pytest.mark.parametrize(("head_dim", "rotated"), [(16, 4), (16, 16), (12, 8), (10, 4)])
def test_neighbours_as_halves(head_dim: int, rotated: int) -> None:
    """Products of queries and keys are the same in the order of the generic decoder."""
    random = np.random.default_rng(1)
    rotary = rotated_neighbours(head_dim, rotated)
    assert rotary.order is not None and sorted(rotary.order) == list(range(head_dim))

    def neighbours(x: np.ndarray, position: int) -> np.ndarray:
        x = x.copy()
        for pair in range(0, rotated, 2):
            angle = position * 10000.0 ** (-pair / rotated)
            whole = (x[pair] + 1j * x[pair + 1]) * np.exp(1j * angle)
            x[pair], x[pair + 1] = whole.real, whole.imag
        return x

    def halves(x: np.ndarray, position: int) -> np.ndarray:
        first, second = np.split(x[rotary.order], 2)
        whole = (first + 1j * second) * np.exp(1j * position * rotary.inverse[0])
        return np.concatenate([whole.real, whole.imag])

    query, key = random.normal(size=(2, head_dim))
    for near, far in ((0, 0), (3, 1), (40, 7)):
        wanted = neighbours(query, near) @ neighbours(key, far)
        assert halves(query, near) @ halves(key, far) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["gptj_tiny", "gptj_wide"])
def test_the_inference_model_in_batches(name: str, static: bool, batch: int) -> None:
    """Prompts of many lengths together, then one token more, against the training forward of each alone."""
    random, one = np.random.default_rng(batch), case(name)
    rows = [random.integers(3, 250, 3 + 5 * number).tolist() for number in range(batch)]
    engine = cached(one, static=static, inference_model=True)
    slots, first = engine.open(rows)
    second = engine.advance(slots, [[11]] * batch)
    for number, row in enumerate(rows):
        alone = hidden_logits(FAMILY, one.model, np.array([[*row, 11]]))[0]
        assert np.abs(first.numpy()[number] - alone[-2]).max() < 1e-4
        assert np.abs(second.numpy()[number] - alone[-1]).max() < 1e-4
