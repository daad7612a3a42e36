"""Adapters with a rank and a scale for every layer, on every family: each engine, and PEFT's layout and back."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from family_cases import FIXTURES, NAMES, Case, case, plain_engine
from saved import write_lora

from utils.adapters.lora_files import read_lora
from utils.adapters.targets import matrices, matrix_shapes
from utils.checkpoints.convert_peft import from_peft, to_peft
from utils.checkpoints.load import load_model
from utils.checkpoints.tensors import read_tensors
from utils.inference.engine import Engine
from utils.inference.loading import Prepared, engine_of, load_program, make_engine

# One of every family, with heads of their own in both layouts, and tied ones.
CASES = [
    *("bloom_prefixed", "chatglm2_tiny", "chatglm_tiny", "gemma3", "glm_tiny", "gpt2_prefixed", "gptj_tiny", "gptneox"),
    *("llama_tiny", "mistral", "opt_tiny", "qwen2_window", "qwen3", "qwen_tiny"),
]


def test_every_family_has_a_case() -> None:
    families = {name: case(name).checkpoint.family.name for name in NAMES}
    assert {families[name] for name in CASES} == set(families.values())


def by_the_formula(one: Case, adapter: Path) -> Engine:
    """Base + adapter, W + alpha / rank * A B written out from the files."""
    config = json.loads((adapter / "lora_config.json").read_text())
    halves = dict(read_tensors(adapter / "lora_model_state.safetensors"))
    base = one.checkpoint
    model = load_model(base, "float32")
    parameters = dict(model.named_parameters())
    for layer, weight in matrices(base).items():
        a, b = halves[f"{layer}.lora_A"], halves[f"{layer}.lora_B"]
        rank, alpha = config["rank_pattern"].get(layer, 2), config["alpha_pattern"].get(layer, 3)
        assert rank == a.shape[1]
        change = alpha / (math.sqrt(rank) if config["rslora"] else rank) * (a @ b)
        parameter = parameters[weight.parameter]
        parameter.set_value(parameter.numpy() + (change if weight.is_linear else change.T))
    return plain_engine(base, model)


def first_logits(engine: Engine, one: Case) -> np.ndarray:
    return engine.open([row.tolist() for row in one.rows])[1].numpy()


@pytest.mark.parametrize("name", CASES)
def test_every_engine_and_every_layout_compute_the_formula(name: str, tmp_path: Path) -> None:
    one = case(name)
    base = one.checkpoint
    ours = write_lora(tmp_path / "ours", base, rslora=name == "gpt2_prefixed")
    wanted = first_logits(by_the_formula(one, ours), one)
    assert np.abs(wanted - one.reference["logits"][:, -1]).max() > 0.1
    to_peft(ours, tmp_path / "peft", base)
    for folder, inference_model in ((ours, False), (tmp_path / "peft", False), (tmp_path / "peft", True)):
        lora = read_lora(folder, base)
        assert lora.head == (None if base.family.shape(base.config).tied else base.architecture.head_layer)
        # without a tokenizer: some cases have none, and no engine needs one
        prepared = Prepared(base, None, None, "float32", lora, inference_model=inference_model)  # type: ignore[arg-type]
        assert np.abs(first_logits(make_engine(prepared, "cpu"), one) - wanted).max() < 1e-4 * np.abs(wanted).max()
    # what a static export traces
    exported = engine_of(prepared, *load_program(replace(prepared, inference_model=False), "cpu", merged=True))
    assert np.abs(first_logits(exported, one) - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_there_and_back_is_the_adapter_itself(name: str, rslora: bool, tmp_path: Path) -> None:
    """Where parts of one published layer differ in scale, that of their B changes; all else is kept bit for bit."""
    base = case(name).checkpoint
    ours = write_lora(tmp_path / "ours", base, rslora=rslora)
    before = read_lora(ours, base)
    to_peft(ours, tmp_path / "peft", base)
    from_peft(tmp_path / "peft", tmp_path / "back", base)
    to_peft(tmp_path / "back", tmp_path / "again", base)
    for folder in ("peft", "back", "again"):
        after = read_lora(tmp_path / folder, base)
        assert before.pairs.keys() == after.pairs.keys()
        for layer, pair in before.pairs.items():
            (a, b), (again_a, again_b) = ([half.read() for half in halves] for halves in (pair, after.pairs[layer]))
            scale, again_scale = before.settings.scale_of(layer), after.settings.scale_of(layer)
            assert np.array_equal(a, again_a)
            if matrices(base)[layer].part is None:
                assert np.array_equal(b, again_b) and math.isclose(scale, again_scale, rel_tol=1e-12)
            assert np.allclose(scale * b, again_scale * again_b, rtol=1e-6, atol=0)


def test_fused_layers_come_back_bit_for_bit(tmp_path: Path) -> None:
    """GPT's query, key and value are one layer there: what PEFT trained on all three, and what was trained on two."""
    base = case("gpt2_tiny").checkpoint
    from_peft(FIXTURES / "peft_gpt2", tmp_path / "ours", base)
    to_peft(tmp_path / "ours", tmp_path / "theirs", base)
    before, after = (
        dict(read_tensors(folder / "adapter_model.safetensors"))
        for folder in (FIXTURES / "peft_gpt2", tmp_path / "theirs")
    )
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["rank_pattern"] == {}

    two = [layer for layer in matrix_shapes(base) if layer.endswith(("q_proj", "v_proj"))]
    some = write_lora(tmp_path / "some", base, two, even=True)
    to_peft(some, tmp_path / "wide", base)
    written = json.loads((tmp_path / "wide" / "adapter_config.json").read_text())
    assert set(written["rank_pattern"].values()) == {4} and set(written["alpha_pattern"].values()) == {6}
    from_peft(tmp_path / "wide", tmp_path / "back", base)
    before, after = (
        dict(read_tensors(folder / "lora_model_state.safetensors")) for folder in (some, tmp_path / "back")
    )
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    assert "rank_pattern" not in json.loads((tmp_path / "back" / "lora_config.json").read_text())
