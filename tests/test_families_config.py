"""config.json as people and other tools write it: what is unambiguous is taken, the rest is one error that names it."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
from family_cases import FIXTURES, NAMES, case

from utils.checkpoints import Checkpoint, locate
from utils.errors import UserError
from utils.families.rope import frequencies

WRONG: list[Any] = [
    0,
    -1,
    "x",
    "",
    2.5,
    True,
    [],
    {},
    [1],
    {"a": {}},
    10**9,
    10**30,
    "9" * 400,
    math.nan,
    math.inf,
    "1e400",
]


def changed(folder: Path, name: str, *, drop: tuple[str, ...] = (), **values: Any) -> Path:
    """A folder with the config.json of a fixture, changed; without weights."""
    config = {**json.loads((FIXTURES / name / "config.json").read_text("utf-8")), **values}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if key not in drop}), "utf-8")
    return folder


def read(folder: Path) -> Checkpoint:
    return locate(folder, allow_network=False, weights=False)


def faults(folder: Path) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        read(folder)
    return caught.value.faults


@pytest.mark.parametrize("name", NAMES)
def test_numbers_as_text_and_as_floats_are_the_same_model(name: str, tmp_path: Path) -> None:
    plain = case(name).checkpoint
    text = json.loads((FIXTURES / name / "config.json").read_text("utf-8"))
    typed = {"vocab_size", "initializer_range", "bos_token_id", "pad_token_id", *plain.family.settings}
    numbers = {key: text[key] for key in typed & text.keys() if type(text[key]) in (int, float)}
    assert len(numbers) >= 6
    for number, write in enumerate((str, float, lambda value: str(float(value)))):
        found = read(changed(tmp_path / str(number), name, **{key: write(value) for key, value in numbers.items()}))
        family = found.family
        assert family.shape(found.config) == plain.family.shape(plain.config)
        assert family.weights(found.config) == plain.family.weights(plain.config)
        assert family.paddle_config(found.config) == plain.family.paddle_config(plain.config)
        assert all(type(size) in (int, bool, type(None)) for size in astuple(family.shape(found.config)))


@pytest.mark.parametrize("name", ["llama_plain", "gpt2_prefixed", "opt_tiny", "bloom_prefixed", "qwen2"])
def test_a_flag_as_text_counts_as_what_it_says(name: str, tmp_path: Path) -> None:
    for number, (value, tied) in enumerate({"false": False, "False": False, "true": True, 0: False, 1: True}.items()):
        found = read(changed(tmp_path / str(number), name, tie_word_embeddings=value))
        assert found.family.shape(found.config).tied is tied
        assert found.config["tie_word_embeddings"] is tied
    (fault,) = faults(changed(tmp_path / "no", name, tie_word_embeddings="no"))
    assert fault == f'{tmp_path / "no" / "config.json"}: tie_word_embeddings is "no"; expected true or false'


def test_all_faults_are_told_at_once_with_file_key_and_what_is_expected(tmp_path: Path) -> None:
    folder = changed(
        tmp_path / "m",
        "llama_tiny",
        drop=("vocab_size",),
        num_attention_heads=0,
        num_hidden_layers="two",
        hidden_size=None,
        rms_norm_eps="tiny",
        rope_scaling={"rope_type": "linear", "factor": [2]},
        bos_token_id="<s>",
    )
    file = folder / "config.json"
    assert sorted(faults(folder)) == [
        f'{file}: bos_token_id is "<s>"; expected the id of a token, a list of ids or null',
        f"{file}: hidden_size is missing; expected a whole number from 1 to 10000000",
        f"{file}: num_attention_heads is 0; expected a whole number from 1 to 100000",
        f'{file}: num_hidden_layers is "two"; expected a whole number from 1 to 10000',
        f'{file}: rms_norm_eps is "tiny"; expected a number above 0 and up to 1',
        f"{file}: rope_scaling.factor is a list of 1; expected a number above 0 and up to 1e+09",
        f"{file}: vocab_size is missing; expected a whole number from 1 to 100000000",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_no_value_of_any_key_is_more_than_an_error(name: str, tmp_path: Path) -> None:
    """Wrong values, keys that are missing or null: the model or a `UserError`, never another exception or a hang."""
    config = json.loads((FIXTURES / name / "config.json").read_text("utf-8"))
    for key in dict.fromkeys([*config, "rope_scaling", "rope_parameters", "tie_word_embeddings", "head_dim"]):
        for value in [*WRONG, None, {"factor": "x"}, {"rope_type": 5}, {"rope_type": "yarn", "factor": 0}]:
            folder = changed(tmp_path / "m", name, **{key: value})
            try:
                found = read(folder)
            except UserError as error:
                assert all(fault.startswith(str(folder / "config.json")) for fault in error.faults)
                continue
            assert len(found.family.weights(found.config)) < 10**6
            found.family.architecture(found.config)
        with contextlib.suppress(UserError):
            read(changed(tmp_path / "m", name, drop=(key,)))


def test_sizes_that_no_model_has_together(tmp_path: Path) -> None:
    for values, said in (
        (
            {"num_attention_heads": 3, "num_key_value_heads": 3},
            "a width of 32 cannot be divided among 3 attention heads",
        ),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 heads of keys and values"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected a whole number from 1 to 10000"),
        ({"head_dim": 7}, "the width of an attention head is 7; positions that turn it need a multiple of 2"),
    ):
        drop = () if "head_dim" in values else ("head_dim",)
        folder = changed(tmp_path / "m", "llama_tiny", drop=drop, **values)
        assert faults(folder) == (f"{folder / 'config.json'}: {said}",)


def test_files_that_are_hardly_json(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(FIXTURES / "llama_tiny", folder)
    file = folder / "config.json"
    text = file.read_bytes()
    file.write_bytes(b"\xef\xbb\xbf" + text)
    assert locate(folder).config == locate(FIXTURES / "llama_tiny").config
    for content, said in (
        (b'{"a":' * 100_000, "objects or lists are nested too deeply"),
        (b'{"model_type": "llama", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"model_type": "llama", "vocab_size": ' + b"9" * 5_000 + b"}", "not valid JSON"),
        (text.decode().encode("utf-16"), "is no text in UTF-8"),
        (b"[]", "expected a JSON object"),
    ):
        file.write_bytes(content)
        (fault,) = faults(folder)
        assert fault.startswith(f"{file}: ") and said in fault


def test_partial_rotary_positions_are_refused_wherever_they_are_said(tmp_path: Path) -> None:
    half = {"partial_rotary_factor": 0.5}
    places: list[dict[str, Any]] = [
        half,
        {"rope_parameters": {"rope_type": "default", **half}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, **half}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": half},
    ]
    for number, values in enumerate(places):
        folder = changed(tmp_path / str(number), "llama_tiny", **values)
        assert faults(folder) == (f"{folder / 'config.json'}: partial_rotary_factor other than 1 is not supported",)
    both = {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}}
    (fault,) = faults(changed(tmp_path / "layers", "llama_tiny", rope_parameters=both))
    assert "full_attention, sliding_attention" in fault


def test_the_attention_factor_of_yarn_in_either_name(tmp_path: Path) -> None:
    """`attention_factor` is the whole factor; `attn_factor` multiplies 0.1 ln(factor) + 1 (the authors' code)."""
    expected = {"attention_factor": 1.5, "attn_factor": 1.5 * (0.1 * math.log(4.0) + 1.0)}
    for name, magnitude in expected.items():
        scaling = {"rope_type": "yarn", "factor": "4.0", name: "1.5"}
        found = read(changed(tmp_path / name, "llama_tiny", rope_scaling=scaling))
        known = found.family.paddle_config(found.config)
        assert frequencies(known, 8).magnitude == pytest.approx(magnitude)
    for scaling in (
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "attn_factor": 1.5},
        {"rope_type": "linear", "factor": 4.0, "attn_factor": 1.5},
    ):
        (fault,) = faults(changed(tmp_path / "both", "llama_tiny", rope_scaling=scaling))
        assert "attn_factor belongs to rope_scaling of type 'yarn'" in fault


def test_the_base_of_the_rotary_positions_counts_inside_rope_scaling(tmp_path: Path) -> None:
    def base(folder: Path) -> float:
        found = read(folder)
        return found.family.paddle_config(found.config)["rope_theta"]

    for number, scaling in enumerate(({"rope_type": "default"}, {"type": "linear", "factor": 2}, {})):
        inside = {**scaling, "rope_theta": 500_000}
        folder = changed(tmp_path / f"{number}", "llama_tiny", drop=("rope_theta",), rope_scaling=inside)
        assert base(folder) == 500_000
        folder = changed(tmp_path / f"{number}", "llama_tiny", rope_theta=500_000.0, rope_scaling=inside)
        assert base(folder) == 500_000
        (fault,) = faults(changed(tmp_path / f"{number}", "llama_tiny", rope_theta=10_000, rope_scaling=inside))
        assert "rope_theta is 10000, but 500000 in rope_scaling" in fault


def test_rotary_numbers_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"rope_scaling": {"factor": 4}}, "rope_type is missing beside factor"),
        ({"rope_parameters": {"factor": 4, "rope_theta": 1e4}}, "rope_type is missing beside factor"),
        ({"rope_theta": 1, "rope_scaling": yarn}, "rope_theta is 1; expected a number above 1"),
        ({"rope_theta": 0.5, "rope_scaling": yarn}, "rope_theta is 0.5; expected a number above 1"),
        (
            {"rope_scaling": {**llama3, "low_freq_factor": 4, "high_freq_factor": 4.0}},
            "low_freq_factor 4 must be below",
        ),
        ({"rope_scaling": {**llama3, "low_freq_factor": 4, "high_freq_factor": 1}}, "must be below high_freq_factor 1"),
    ]
    for number, (values, said) in enumerate(cases):
        (fault,) = faults(changed(tmp_path / str(number), "llama_tiny", **values))
        assert said in fault
