"""What adapters' files may say: honoured, or refused by name by everything that reads one, before weights load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_cases import FIXTURES, case
from hypothesis import given, settings
from hypothesis import strategies as st
from saved import save_lora, save_prefix, spoil, write_lora
from tiny_runs import Tiny, run_main, tensors, tiny  # noqa: F401

from utils.adapters.lora import add_lora
from utils.adapters.lora_files import read_lora
from utils.adapters.prefix import PrefixTuning
from utils.adapters.prefix_files import read_prefix_settings
from utils.checkpoints.load import load_model
from utils.checkpoints.locate import Checkpoint, locate
from utils.checkpoints.tensors import write_safetensors
from utils.errors import UserError

Q_PROJ = "llama.layers.0.self_attn.q_proj.lora_B"


@pytest.fixture(scope="module")
def base(tiny: Tiny) -> Checkpoint:  # noqa: F811
    return locate(tiny.model)


@pytest.fixture
def adapter(base: Checkpoint, tmp_path: Path) -> Path:
    save_lora(tmp_path / "adapter", add_lora(load_model(base, "float32"), rank=4), base)
    return tmp_path / "adapter"


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    """An adapter that PEFT wrote for FIXTURES / "llama_tiny"."""
    shutil.copytree(FIXTURES / "peft_tiny", tmp_path / "peft")
    return tmp_path / "peft"


def change(file: Path, **settings: Any) -> None:
    config = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in {**config, **settings}.items() if value != "absent"}))


def faults(read: Callable[[], object]) -> list[str]:
    with pytest.raises(UserError) as caught:
        read()
    return list(caught.value.faults)


OTHER_METHODS: dict[str, Any] = {
    **{"pissa": True, "loraga": True, "use_mora": True, "lora_use_mixer": True, "do_qat": True, "lorapro": True},
    **{"trainable_bias": "lora", "trainable_modules": [".*norm.*"], "enable_lora_list": [None, [True, False, True]]},
    **{"nola": True, "something_new": 0.5},
}


@pytest.mark.parametrize("name", OTHER_METHODS)
def test_other_methods_are_refused_by_name(adapter: Path, base: Checkpoint, name: str) -> None:
    change(adapter / "lora_config.json", **{name: OTHER_METHODS[name]})
    [fault] = faults(lambda: read_lora(adapter, base))
    assert fault.startswith(f"{adapter / 'lora_config.json'}: {name} is ")


def test_methods_that_are_off_and_history_are_no_fault(adapter: Path, base: Checkpoint) -> None:
    off = {name: [None] * 7 if name == "enable_lora_list" else None for name in OTHER_METHODS}
    history = {"merge_weights": True, "lora_plus_scale": 16.0, "head_dim": 16, "dtype": "bfloat16", "mixer_num": 1}
    change(adapter / "lora_config.json", **{**off, "pissa": False, "nola": 0, "trainable_modules": []}, **history)
    assert read_lora(adapter, base).settings.scale_of("llama.layers.0.self_attn.q_proj") == 2.0


def test_everything_that_reads_an_adapter_refuses_alike(tiny: Tiny, adapter: Path, tmp_path: Path) -> None:  # noqa: F811
    """Each script says the same three faults, and writes nothing."""
    change(adapter / "lora_config.json", pissa=True, r=0)
    spoil(adapter / "lora_model_state.safetensors", Q_PROJ, np.nan)
    model = ["--model_name_or_path", str(tiny.model), "--lora_path", str(adapter)]
    data = ["--data_file", str(tiny.data / "dev.json"), "--output_file", str(tmp_path / "out.json"), "--device", "cpu"]
    runs = [
        ("predictor", [*model, *data]),
        ("predictor", [*model, *data, "--inference_model"]),
        ("export_model", [*model, "--output_path", str(tmp_path / "out"), "--device", "cpu"]),
        ("merge_lora_params", [*model, "--merge_model_path", str(tmp_path / "out")]),
        ("finetune_generation", tiny.arguments(tmp_path / "out", [*model, "--lora", "--do_train", "--dry_run"])),
        ("finetune_generation", tiny.arguments(tmp_path / "out", [*model, "--lora", "--do_eval"])),
        (
            "utils.checkpoints.convert_peft",
            ["--to-peft", str(adapter), str(tmp_path / "out"), "--base", str(tiny.model)],
        ),
    ]
    for script, words in runs:
        said = run_main(script, words, tiny.environment, tmp_path / "out", expect=2).err
        assert "pissa is set" in said and "r is 0; expected a whole number from 1" in said, script
        assert f"lora_model_state.safetensors: holds NaN or infinity in {Q_PROJ}; its training" in said, script
        assert said.count("error:") == 3 and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


WRONG: dict[str, list[Any]] = {
    "r": [0, -1, 2.5, "eight", True, [4], 10**20, 10**400, float("nan"), "absent"],
    "lora_alpha": [0, -3, "much", float("nan"), float("inf"), 1e300, 10**400, True, {}, "absent"],
    "lora_dropout": [1, -0.1, "none of it", []],
    "rslora": ["perhaps", 2, [True]],
    "target_modules": [3, {"q_proj": 1}, [1, 2], ["("], "("],
    "rank_pattern": [[4], {"llama.layers.0.self_attn.q_proj": 0}, {"llama.layers.9.self_attn.q_proj": 4}],
    "alpha_pattern": [3, {"llama.layers.0.self_attn.q_proj": float("nan")}, {"q_proj": 4}],
}


@pytest.mark.parametrize("name", WRONG)
def test_values_that_mean_nothing_are_named(adapter: Path, base: Checkpoint, name: str) -> None:
    file = adapter / "lora_config.json"
    original = file.read_text()
    for value in WRONG[name]:
        file.write_text(original)
        change(file, **{name: value})
        found = faults(lambda: read_lora(adapter, base))
        assert len(found) == 1 and found[0].startswith(f"{file}: {name}"), (value, found)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("layout", ["ours", "peft"])
def test_any_value_is_taken_or_named(
    tmp_path_factory: pytest.TempPathFactory, layout: str, data: st.DataObject
) -> None:
    """Whatever JSON a configuration holds: a scale that is a number, or errors that name the file."""
    home, llama = tmp_path_factory.getbasetemp() / "any", locate(FIXTURES / "llama_tiny")
    if not home.exists():
        write_lora(home / "ours", llama)
        shutil.copytree(FIXTURES / "peft_tiny", home / "peft")
        for folder in home.iterdir():
            next(folder.glob("*config.json")).rename(folder / "original.json")
    folder = home / layout
    config = json.loads((folder / "original.json").read_text())
    names = st.sampled_from(sorted(config)) | st.text()
    config |= data.draw(st.dictionaries(names, VALUES, min_size=1, max_size=3))
    file = folder / ("lora_config.json" if layout == "ours" else "adapter_config.json")
    file.write_text(json.dumps(config))
    try:
        found = read_lora(folder, llama)
    except UserError as error:
        assert all(str(folder) in fault for fault in error.faults)
    else:
        assert all(0 < found.settings.scale_of(layer) < 1e39 for layer in found.pairs)


def test_all_faults_of_an_adapter_are_told_at_once(adapter: Path, base: Checkpoint) -> None:
    change(adapter / "lora_config.json", pissa=True, r="x", lora_alpha=float("nan"), rslora=3)
    weights = adapter / "lora_model_state.safetensors"
    stored = tensors(weights)
    first, second = sorted(stored)[:3:2]
    stored["lm_head.bias"] = stored.pop(first)
    stored[second] = stored[second][1:]
    write_safetensors(weights, list(stored.items()), {"format": "np"})
    told = "\n".join(faults(lambda: read_lora(adapter, base)))
    for part in ("pissa", "r is", "lora_alpha is", "rslora is", "lm_head.bias", "is missing for", "does not fit"):
        assert part in told
    weights.unlink()
    told = "\n".join(faults(lambda: read_lora(adapter, base)))
    assert "pissa" in told and "has lora_config.json but neither" in told


def test_layers_and_weights_must_be_the_same(adapter: Path, base: Checkpoint) -> None:
    change(adapter / "lora_config.json", target_modules=[".*q_proj", ".*lm_head"])
    assert "target_modules does not name layers that have weights" in faults(lambda: read_lora(adapter, base))[0]
    weights = adapter / "lora_model_state.safetensors"
    kept = {name: value for name, value in tensors(weights).items() if ".layers.1." in name and "q_proj" in name}
    write_safetensors(weights, list(kept.items()), {"format": "np"})
    [fault] = faults(lambda: read_lora(adapter, base))
    assert fault == f"{weights}: has no weights for layers of target_modules: llama.layers.0.self_attn.q_proj"
    change(adapter / "lora_config.json", target_modules=None)  # then the weights say it
    assert list(read_lora(adapter, base).pairs) == ["llama.layers.1.self_attn.q_proj"]


def test_shards_of_an_adapter_get_advice(adapter: Path, base: Checkpoint) -> None:
    (adapter / "lora_model_state.safetensors").rename(adapter / "lora_model_state.tp00.pdparams")
    assert "merge_tensor_parallel" in faults(lambda: read_lora(adapter, base))[0]


def test_a_place_that_cannot_be_written_is_one_line(tiny: Tiny, adapter: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "file").write_text("mine")
    words = ["--to-peft", str(adapter), str(tmp_path / "file" / "peft"), "--base", str(tiny.model)]
    said = run_main("utils.checkpoints.convert_peft", words, tiny.environment, tmp_path, expect=2).err
    assert said.startswith("error: ") and said.count("\n") == 1 and str(tmp_path / "file") in said


# --- PEFT -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq", "something_new", 2])
def test_starts_that_change_the_base_are_refused(peft: Path, start: str) -> None:
    change(peft / "adapter_config.json", init_lora_weights=start)
    [fault] = faults(lambda: read_lora(peft, locate(FIXTURES / "llama_tiny")))
    assert "init_lora_weights is" in fault and "path_initial_model_for_weight_conversion" in fault


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", None, "absent"])
def test_starts_of_plain_lora_are_taken(peft: Path, start: object) -> None:
    change(peft / "adapter_config.json", init_lora_weights=start)
    assert len(read_lora(peft, locate(FIXTURES / "llama_tiny")).pairs) == 6


def test_what_else_peft_may_say(peft: Path) -> None:
    file, llama = peft / "adapter_config.json", locate(FIXTURES / "llama_tiny")
    original = file.read_text()
    refused: dict[str, Any] = {
        **{"use_dora": True, "bias": "lora_only", "modules_to_save": ["lm_head"], "lora_bias": True},
        **{"layer_replication": [[0, 2]], "megatron_config": {"x": 1}, "trainable_token_indices": [3]},
        **{"target_parameters": ["x"], "use_qalora": True, "alora_invocation_tokens": [3], "use_bdlora": {"a": 1}},
        **{"peft_type": "IA3", "r": "x", "lora_alpha": 0, "use_rslora": "perhaps", "target_modules": 7},
        **{"rank_pattern": {"q_proj": 0}, "alpha_pattern": {"(": 3}, "ensure_weight_tying": True},
    }
    for name, value in refused.items():
        file.write_text(original)
        change(file, **{name: value})
        found = faults(lambda: read_lora(peft, llama))
        assert len(found) == 1 and f"{file}: {name}" in found[0], found
    file.write_text(original)
    change(file, **refused)
    assert len(faults(lambda: read_lora(peft, llama))) == len(refused)
    file.write_text(original)
    # which layers were adapted, say the weights; the rest is history
    layers = {"layers_to_transform": [0, 1], "layers_pattern": "layers", "exclude_modules": ["o_proj"]}
    change(file, **layers, fan_in_fan_out=True, target_modules="all-linear", qalora_group_size=16)
    assert len(read_lora(peft, llama).pairs) == 6


def test_patterns_of_peft_match_the_end_of_a_name(peft: Path) -> None:
    weights = peft / "adapter_model.safetensors"
    stored = tensors(weights)
    wider = {}
    for name, value in stored.items():
        axis = 0 if "lora_A" in name else 1
        rank = 3 if "v_proj" in name else 2 if "layers.1.self_attn" in name else 4
        wider[name] = value.take(range(rank), axis=axis)
    write_safetensors(weights, list(wider.items()), {"format": "pt"})
    ranks = {"v_proj": 3, r"layers\.1\.self_attn\..*": 2, "proj": 99}
    change(peft / "adapter_config.json", rank_pattern=ranks, alpha_pattern={"model.layers.0.mlp.down_proj": 20})
    settings = read_lora(peft, locate(FIXTURES / "llama_tiny")).settings
    found = {name: settings.rank_of(f"llama.layers.{name}_proj") for name in ("0.self_attn.q", "1.self_attn.q")}
    assert found == {"0.self_attn.q": 4, "1.self_attn.q": 2}
    assert settings.scale_of("llama.layers.1.self_attn.v_proj") == 6 / 3
    assert settings.scale_of("llama.layers.0.mlp.down_proj") == 20 / 4
    assert settings.scale_of("llama.layers.1.mlp.down_proj") == 6 / 4


def test_an_adapter_of_a_tied_head_gets_advice(tmp_path: Path) -> None:
    """It changes the head and not the embedding, so a merged model would no longer be of its config.json."""
    gpt = case("gpt2_tiny").checkpoint
    shutil.copytree(FIXTURES / "peft_gpt2", tmp_path / "peft")
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    stored = tensors(weights)
    vocabulary = gpt.family.shape(gpt.config).vocabulary
    stored["base_model.model.lm_head.lora_A.weight"] = np.ones((3, 32), np.float32)
    stored["base_model.model.lm_head.lora_B.weight"] = np.ones((vocabulary, 3), np.float32)
    write_safetensors(weights, list(stored.items()), {"format": "pt"})
    [fault] = faults(lambda: read_lora(tmp_path / "peft", gpt))
    assert "adapts lm_head" in fault and "shares with its embedding" in fault


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_of_a_peft_adapter_are_finite(peft: Path, value: float) -> None:
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    spoil(peft / "adapter_model.safetensors", name, value)
    [fault] = faults(lambda: read_lora(peft, locate(FIXTURES / "llama_tiny")))
    assert fault.startswith(f"{peft / 'adapter_model.safetensors'}: holds NaN or infinity in {name}; ")


# --- prefixes ---------------------------------------------------------------------------------------


def test_prefix_files_are_read_by_type_too(base: Checkpoint, tmp_path: Path) -> None:
    shape = base.family.shape(base.config)
    save_prefix(tmp_path, PrefixTuning(base.family, shape, 6, projection=True, projection_hidden=10), base)
    file = tmp_path / "prefix_config.json"
    original = file.read_text()
    wrong: dict[str, list[Any]] = {
        "num_prefix_tokens": [0, -1, "x", float("nan"), 10**12, "absent", 2.5],
        "prefix_projection": ["perhaps", 3],
        "prefix_projection_hidden_size": [0, "x"],
        "something_new": [True],
    }
    for name, values in wrong.items():
        for value in values:
            file.write_text(original)
            change(file, **{name: value})
            found = faults(lambda: read_prefix_settings(tmp_path, base))
            assert len(found) == 1 and found[0].startswith(f"{file}: {name}"), (value, found)
    file.write_text(original)
    spoil(tmp_path / "prefix_model_state.safetensors", "3.bias", np.inf)
    [fault] = faults(lambda: read_prefix_settings(tmp_path, base))
    assert "prefix_model_state.safetensors: holds NaN or infinity in 3.bias; " in fault
    spoil(tmp_path / "prefix_model_state.safetensors", "3.bias", 0.0)
    change(file, num_prefix_tokens=10**9)
    told = "\n".join(faults(lambda: read_prefix_settings(tmp_path, base)))
    assert f"0.weight has shape [6, {shape.kv_heads * shape.head_dim}], this model needs [1000000000, " in told
    file.write_text(original)
    change(file, prefix_projection="false")
    told = "\n".join(faults(lambda: read_prefix_settings(tmp_path, base)))
    assert "1.weight belongs to no layer" in told
