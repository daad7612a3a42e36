"""Folders of quantized weights: refused before weights load, with the method's name and what to do instead."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_copies import faults, tiny_copy
from family_cases import FIXTURES
from tiny_runs import run_main, write_rows

from utils.checkpoints import locate
from utils.checkpoints.load import load_model
from utils.checkpoints.tensors import write_safetensors

METHODS: dict[str, dict[str, Any]] = {
    "by GPTQ (quantization_config)": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    "by AWQ (": {"quantization_config": {"quant_method": "awq", "bits": 4, "zero_point": True}},
    "by bitsandbytes (": {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}},
    "by FP8 (": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "by compressed-tensors (": {
        "compression_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}
    },
    "by an unnamed method (": {"quantization_config": {"bits": 4, "group_size": 128}},
    "by PaddleNLP (weight_only_int8)": {"quantization_config": {"weight_quantize_algo": "weight_only_int8"}},
    "by newmethod (": {"quantization_config": {"quant_method": "newmethod"}},
    "by an unnamed method (quantization)": {"quantization": {"bits": 4, "group_size": 64}},
    "to 4 bits (quantization_bit)": {"quantization_bit": 4},
}
ADVICE = "take the unquantized model that they were made from"


@pytest.mark.parametrize("said", METHODS)
def test_a_config_that_names_its_method(said: str, tmp_path: Path) -> None:
    folder = tiny_copy(tmp_path / "m", **METHODS[said])
    text = faults(folder)
    assert text.startswith(f"{folder / 'config.json'}: the weights were quantized {said}") and ADVICE in text
    assert locate(folder, weights=False).folder == folder  # its tokenizer may be used


def test_a_config_that_says_there_is_none(tmp_path: Path) -> None:
    """As PaddleNLP writes it beside ordinary weights."""
    none = {"weight_quantize_algo": None, "quant_type": None, "llm_int8_threshold": 6.0, "weight_blocksize": 64}
    load_model(locate(tiny_copy(tmp_path / "a", quantization_config={**none, "quant_method": None})), "float32")
    load_model(locate(tiny_copy(tmp_path / "b", quantization_config=None, quantization_bit=0)), "float32")


def stored(folder: Path) -> dict[str, np.ndarray]:
    shutil.copytree(FIXTURES / "llama_tiny", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    return {name: tensor.read() for name, tensor in locate(FIXTURES / "llama_tiny").tensors().items()}


def test_weights_as_whole_numbers(tmp_path: Path) -> None:
    tensors, name = stored(tmp_path / "m"), "model.layers.1.mlp.up_proj.weight"
    for kind in (np.int8, np.uint8, np.int32):
        changed = {**tensors, name: np.round(tensors[name] * 100).astype(kind)}
        write_safetensors(tmp_path / "m" / "model.safetensors", changed.items(), {"format": "pt"})
        text = faults(tmp_path / "m")
        assert f"{name} ({np.dtype(kind).name})" in text and ADVICE in text
    data = write_rows(tmp_path / "dev.json", 1)
    words = ["--model_name_or_path", str(tmp_path / "m"), "--data_file", str(data), "--device", "cpu"]
    done = run_main("predictor", [*words, "--output_file", str(tmp_path / "out.json")], {}, tmp_path, 2)
    assert f"{name} (int32)" in done.err and "Traceback" not in done.err


@pytest.mark.parametrize("endings", [("qweight", "qzeros", "scales", "g_idx"), ("weight_packed", "weight_scale")])
def test_tensors_of_quantized_weights_without_a_word_in_config(endings: tuple[str, ...], tmp_path: Path) -> None:
    tensors, name = stored(tmp_path / "m"), "model.layers.1.mlp.up_proj"
    del tensors[f"{name}.weight"]
    tensors |= {f"{name}.{ending}": np.ones((4, 4), np.int32) for ending in endings}
    write_safetensors(tmp_path / "m" / "model.safetensors", tensors.items(), {"format": "pt"})
    text = faults(tmp_path / "m")
    assert "holds tensors of quantized weights" in text and f"{name}.{endings[0]}" in text and ADVICE in text


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    stored(tmp_path / "m")
    header = {"model.norm.weight": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    (tmp_path / "m" / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    said = faults(tmp_path / "m")
    assert "tensor model.norm.weight is stored as F8_E4M3, which is not read here" in said and "damaged" not in said
