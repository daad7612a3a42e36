"""Loading: logits agree with PyTorch transformers, whatever the layout; faults are named."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_copies import faults, tiny_copy

from utils.checkpoints import Checkpoint, fingerprint, locate
from utils.checkpoints.fingerprint import same_base
from utils.checkpoints.load import fill_model, load_model
from utils.checkpoints.save import save_model
from utils.checkpoints.tensors import cast, open_tensors, read_tensors, write_safetensors
from utils.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / "reference.npz"))


def logits(checkpoint: Checkpoint, ids: np.ndarray, model: Any = None) -> np.ndarray:
    import paddle

    model = model or load_model(checkpoint, "float32")
    with paddle.no_grad():
        hidden = model.hidden({"input_ids": paddle.to_tensor(ids)})
        return model.logits(hidden).numpy()


@pytest.mark.parametrize(("folder", "key"), [("llama_tiny", "tiny"), ("llama_plain", "plain")])
def test_published_checkpoints_agree_with_transformers(folder: str, key: str, reference: dict[str, np.ndarray]) -> None:
    checkpoint = locate(FIXTURES / folder)
    assert checkpoint.layout == "hf"
    assert checkpoint.dtype == "float32"
    assert np.abs(logits(checkpoint, reference["ids"]) - reference[key]).max() < TOLERANCE


def test_llama3_rope_scaling_agrees_with_transformers(tmp_path: Path, reference: dict[str, np.ndarray]) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    checkpoint = locate(tiny_copy(tmp_path / "m", rope_scaling=scaling))
    assert np.abs(reference["tiny_llama3_rope"] - reference["tiny"]).max() > 0.1  # the scaling matters here
    assert np.abs(logits(checkpoint, reference["ids"]) - reference["tiny_llama3_rope"]).max() < TOLERANCE


@pytest.mark.parametrize("export_format", ["paddle", "hf"])
@pytest.mark.parametrize("shard", [10**9, 40_000])
def test_saved_models_load_again_unchanged(
    tmp_path: Path, export_format: str, shard: int, reference: dict[str, np.ndarray]
) -> None:
    base = locate(FIXTURES / "llama_tiny")
    model = load_model(base, "float32")
    files = save_model(tmp_path, model, base.family, base.config, export_format=export_format, max_shard_bytes=shard)
    assert (len(files) > 1) == (shard == 40_000)
    again = locate(tmp_path)
    assert again.layout == export_format
    assert again.files == tuple(files)
    assert np.array_equal(logits(again, reference["ids"]), logits(base, reference["ids"], model))
    assert fingerprint(again) == fingerprint(base)


def test_hf_export_is_what_transformers_wrote(tmp_path: Path) -> None:
    """Names, shapes and values equal the folder that transformers saved; so do the sizes in config.json."""
    base = locate(FIXTURES / "llama_tiny")
    save_model(tmp_path, load_model(base, "float32"), base.family, base.config, export_format="hf")
    ours = dict(read_tensors(tmp_path / "model.safetensors"))
    theirs = {name: tensor.read() for name, tensor in base.tensors().items()}
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {**base.config, **written}.items() >= base.config.items()
    assert written["torch_dtype"] == "float32"


def test_half_precision_is_rounded_as_pytorch_rounds(tmp_path: Path, reference: dict[str, np.ndarray]) -> None:
    base = locate(FIXTURES / "llama_tiny")
    save_model(tmp_path, load_model(base, "float32"), base.family, base.config, dtype="bfloat16")
    stored = locate(tmp_path)
    assert stored.dtype == "bfloat16"
    assert np.abs(logits(stored, reference["ids"]) - reference["tiny_bfloat16_weights"]).max() < TOLERANCE
    kept = {str(parameter.dtype) for parameter in load_model(stored, "bfloat16").parameters()}
    assert kept == {"paddle.bfloat16"}
    assert same_base(fingerprint(stored), fingerprint(base))  # rounding does not make it another base


def test_pdparams_and_names_without_prefix(tmp_path: Path, reference: dict[str, np.ndarray]) -> None:
    import paddle

    base = locate(FIXTURES / "llama_tiny")
    model = load_model(base, "float32")
    shutil.copy(base.folder / "config.json", tmp_path)
    state = {name.removeprefix("llama."): value for name, value in model.state_dict().items()}
    paddle.save(state, str(tmp_path / "model_state.pdparams"))
    old = locate(tmp_path)
    assert old.layout == "paddle"
    assert np.array_equal(logits(old, reference["ids"]), logits(base, reference["ids"], model))
    assert fingerprint(old) == fingerprint(base)


def test_fingerprints_tell_bases_apart(tmp_path: Path) -> None:
    base = locate(FIXTURES / "llama_tiny")
    own = fingerprint(base)
    assert same_base(json.loads(json.dumps(own)), own)
    assert not same_base(fingerprint(locate(FIXTURES / "llama_plain")), own)
    other = load_model(base, "float32")
    for parameter in other.parameters():  # the same sizes, other weights
        parameter.set_value(parameter * 1.1)
    save_model(tmp_path, other, base.family, base.config)
    assert not same_base(fingerprint(locate(tmp_path)), own)
    for edited in (None, "0" * 64, [], {}, {**own, "sample": None}, {**own, "sample": ["a"] * len(own["sample"])}):
        assert not same_base(edited, own)


def test_fill_model_changes_all_of_an_existing_model(reference: dict[str, np.ndarray]) -> None:
    base = locate(FIXTURES / "llama_tiny")
    model = load_model(base, "float32")
    for parameter in model.parameters():
        parameter.set_value(np.zeros(parameter.shape, np.float32))
    fill_model(model, base)
    assert np.abs(logits(base, reference["ids"], model) - reference["tiny"]).max() < TOLERANCE


def test_loaded_models_train() -> None:
    """Parameters that were allocated by loading take gradients and updates."""
    import paddle

    base = locate(FIXTURES / "llama_tiny")
    model = load_model(base, "float32")
    model.train()
    optimizer = paddle.optimizer.SGD(0.1, parameters=model.parameters())
    before = {name: value.numpy().copy() for name, value in model.named_parameters()}
    hidden = model.hidden({"input_ids": paddle.to_tensor([[5, 6, 7, 8]])})
    model.logits(hidden).square().mean().backward()
    optimizer.step()
    assert all((value.numpy() != before[name]).any() for name, value in model.named_parameters())


def test_every_fault_of_the_weights_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(FIXTURES / "llama_plain", folder)
    tensors = {name: tensor.read() for name, tensor in open_tensors(folder / "pytorch_model.bin").items()}
    (folder / "pytorch_model.bin").unlink()

    def save(**changes: np.ndarray | None) -> None:
        changed = {**tensors, **{name.replace("__", "."): value for name, value in changes.items()}}
        pairs = [(name, value) for name, value in changed.items() if value is not None]
        write_safetensors(folder / "model.safetensors", pairs, {"format": "pt"})

    save(model__norm__weight=None, model__extra__weight=np.ones(3, np.float32))
    text = faults(folder)
    assert "model.norm.weight" in text
    assert "model.extra.weight" in text

    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    save(**{first.replace(".", "__"): tensors[first].T, second.replace(".", "__"): tensors[second][:7]})
    text = faults(folder)
    assert first in text
    assert second in text
    assert "[32, 7]" in text

    # neither a stored rotary cache nor a second copy of the tied head is a fault
    inv_freq, head = "model__layers__0__self_attn__rotary_emb__inv_freq", tensors["model.embed_tokens.weight"]
    save(**{inv_freq: np.ones(4, np.float32), "lm_head__weight": head})
    load_model(locate(folder), "float32")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = tiny_copy(tmp_path / "m")
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in faults(folder)


@pytest.mark.parametrize("keep", [3, 200, 20_000])
def test_cut_file_is_named(tmp_path: Path, keep: int) -> None:
    folder = tiny_copy(tmp_path / "m")
    file = folder / "model-00001-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert str(file) in faults(folder)


def test_headers_that_no_writer_makes(tmp_path: Path) -> None:
    folder = tiny_copy(tmp_path / "m")
    file = folder / "model-00001-of-00003.safetensors"
    places = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for header, said in (
        (json.dumps({"a": {**places, "data_offsets": [0.0, 8.0]}}), "a has sizes or places that are no whole numbers"),
        (json.dumps({"a": {**places, "shape": [2.0]}}), "a has sizes or places that are no whole numbers"),
        (json.dumps({"a": {**places, "shape": [True, 2]}}), "a has sizes or places that are no whole numbers"),
        (json.dumps({"a": {**places, "shape": ["2"]}}), "a has sizes or places that are no whole numbers"),
        (json.dumps({"a": {**places, "data_offsets": 8}}), "its header is damaged"),
        (json.dumps({"a": [places]}), "its header is damaged"),
        ("[]", "its header is damaged: it is no JSON object"),
        ('{"a":' + "[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
    ):
        text = header.encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
        assert (text_of := faults(folder)).startswith(str(file)) and said in text_of


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model_state.pdparams"])
def test_files_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    folder = tiny_copy(tmp_path / "m")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / name).symlink_to("/proc/self/mem")  # is there, and gives an error even to root
    assert f"{folder / name}: " in (said := faults(folder)) and len(said.splitlines()) == 1


def test_unknown_models_and_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_copy(tmp_path / "m", model_type="mamba", architectures=["MambaForCausalLM"])
    assert "'mamba' is not known; known are " in faults(folder)
    (folder / "config.json").write_text("{")
    assert "config.json: not valid JSON" in faults(folder)
    (folder / "config.json").unlink()
    assert "no config.json" in faults(folder)
    (folder / "lora_config.json").write_text("{}")
    assert "scripts take as lora_path" in faults(folder)
    (tmp_path / "empty").mkdir()
    shutil.copy(FIXTURES / "llama_tiny" / "config.json", tmp_path / "empty")
    assert "holds no weights; expected model.safetensors" in faults(tmp_path / "empty")
    monkeypatch.chdir(tmp_path)  # "m/nowhere" then begins like a path, not like a hub id
    for name in (str(tmp_path / "nowhere"), "./nowhere", "nowhere", "m/nowhere", "a/b/c"):
        with pytest.raises(UserError, match="no such folder"):
            locate(name)


def test_hub_ids_without_network_fail_with_a_next_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import socket

    def refuse(*_arguments: object, **_named: object) -> None:
        raise AssertionError("network was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(UserError, match=r"some-org/some-model.*smollm2-135m-instruct needs no hub"):
        locate("some-org/some-model", allow_network=False)


def test_casts() -> None:
    exact = np.array([0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, 3.0e38, 1e-40], np.float32)
    there = cast(cast(exact[:6], "bfloat16"), "float32")
    assert np.array_equal(there, exact[:6])
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], np.float32)  # half way: to even
    assert cast(cast(ties, "bfloat16"), "float32").tolist() == [1.0, 1 + 2 * 2**-7, 1 + 2**-7]
    assert np.isnan(cast(cast(np.array([np.nan], np.float32), "bfloat16"), "float32")).all()
    assert cast(exact[:4], "float16").dtype == np.float16
    assert cast(exact, "float32") is exact
