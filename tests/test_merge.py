"""Merging: base + adapter, by the real command; conversion from and to PEFT, against PEFT's own logits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from full_disk import full_disk
from saved import spoil
from tiny_runs import run_main

from utils.checkpoints import Checkpoint, fingerprint, locate
from utils.checkpoints.convert_peft import from_peft, to_peft
from utils.checkpoints.load import load_model
from utils.checkpoints.merge import merge_lora
from utils.checkpoints.tensors import cast, read_tensors, write_safetensors
from utils.data.template import ChatTemplate
from utils.errors import UserError
from utils.families.tokenizers import load_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
ADAPTER_WEIGHTS = "lora_model_state.safetensors"
RANK = 4
# Changes the logits by up to 2.7. Where an adapter outweighs its base (0.3 here), two orders of summation in
# float32 differ by 1.2e-5, and a merge computed in float64 differs from base + adapter by as much.
SPREAD = 0.1


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / "reference.npz"))


@pytest.fixture
def base() -> Checkpoint:
    return locate(FIXTURES / "llama_tiny")


def forward(family: Any, model: Any, ids: np.ndarray) -> np.ndarray:
    import paddle

    with paddle.no_grad():
        hidden = model.hidden({"input_ids": paddle.to_tensor(ids)})
        return model.logits(hidden).numpy()


def logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    checkpoint = locate(folder)
    return forward(checkpoint.family, load_model(checkpoint, "float32"), ids)


def make_adapter(folder: Path, base: Checkpoint, *, rslora: bool = False) -> Path:
    """An adapter on four kinds of layers with random weights, as training leaves it."""
    random = np.random.default_rng(5)
    kinds = ("q_proj", "k_proj", "o_proj", "down_proj")
    tensors = []
    for weight in base.family.weights(base.config):
        layer = weight.parameter.removesuffix(".weight")
        if layer.endswith(kinds):
            width, height = dict(zip(kinds, ((32, 32), (32, 16), (32, 32), (64, 32)), strict=True))[
                layer.rsplit(".", 1)[-1]
            ]
            tensors.append((f"{layer}.lora_A", random.normal(0, SPREAD, (width, RANK)).astype(np.float32)))
            tensors.append((f"{layer}.lora_B", random.normal(0, SPREAD, (RANK, height)).astype(np.float32)))
    folder.mkdir()
    write_safetensors(folder / ADAPTER_WEIGHTS, tensors, {"format": "np"})
    config = {
        "r": RANK,
        "lora_alpha": 6,
        "lora_dropout": 0.1,
        "rslora": rslora,
        "target_modules": [rf"(.*\.)?{kind}" for kind in kinds],
        "base_model_name_or_path": str(base.folder),
        "base_fingerprint": fingerprint(base),
    }
    (folder / "lora_config.json").write_text(json.dumps(config))
    return folder


def adapted_logits(base: Checkpoint, adapter: Path, ids: np.ndarray) -> np.ndarray:
    """base + adapter with the layers in place, as the predictor runs it."""
    from utils.adapters.lora import load_lora
    from utils.adapters.lora_files import read_lora

    model = load_model(base, "float32")
    adapted = load_lora(model, read_lora(adapter, base))
    adapted.model.eval()
    return forward(base.family, adapted.model, ids)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("export_format", ["paddle", "hf"])
def test_merged_logits_equal_base_and_adapter(
    tmp_path: Path, base: Checkpoint, reference: dict[str, np.ndarray], rslora: bool, export_format: str
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, rslora=rslora)
    merge_lora(base, adapter, tmp_path / "merged", export_format=export_format)
    together = adapted_logits(base, adapter, reference["ids"])
    merged = logits(tmp_path / "merged", reference["ids"])
    assert np.abs(together - reference["tiny"]).max() > 0.1
    assert np.abs(merged - together).max() < 1e-5
    assert locate(tmp_path / "merged").layout == export_format


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_weights_are_the_exact_sums_rounded_once(tmp_path: Path, base: Checkpoint, rslora: bool) -> None:
    """Against the formula in float64, which holds for a model of any size and any size of logits."""
    adapter = make_adapter(tmp_path / "adapter", base, rslora=rslora)
    merge_lora(base, adapter, tmp_path / "merged")
    halves = {name: value.astype(np.float64) for name, value in read_tensors(adapter / ADAPTER_WEIGHTS)}
    merged = dict(read_tensors(tmp_path / "merged" / "model.safetensors"))
    published = {name: tensor.read().astype(np.float64) for name, tensor in base.tensors().items()}
    changed = 0
    for weight in base.family.weights(base.config):
        exact = published[weight.published].T if weight.transpose else published[weight.published]
        layer = weight.parameter.removesuffix(".weight")
        if f"{layer}.lora_A" in halves:
            scale = 6 / (RANK**0.5 if rslora else RANK)
            exact = exact + scale * (halves[f"{layer}.lora_A"] @ halves[f"{layer}.lora_B"])
            changed += 1
        assert np.abs(merged[weight.parameter] - exact).max() <= 2.0**-23 * np.abs(exact).max()
    assert changed == 8


def test_merge_from_paddle_layout_in_shards_and_half_precision(
    tmp_path: Path, base: Checkpoint, reference: dict[str, np.ndarray]
) -> None:
    from utils.checkpoints.companions import write_companions
    from utils.checkpoints.save import save_model

    adapter = make_adapter(tmp_path / "adapter", base)
    paddle_base = tmp_path / "base"
    paddle_base.mkdir()
    save_model(paddle_base, load_model(base, "float32"), base.family, base.config, max_shard_bytes=40_000)
    write_companions(base, adapter, paddle_base)
    merge_lora(base, adapter, tmp_path / "from_hf")
    merge_lora(locate(paddle_base), adapter, tmp_path / "from_paddle", max_shard_bytes=40_000)
    assert len(locate(tmp_path / "from_paddle").files) > 1
    one, other = (logits(tmp_path / name, reference["ids"]) for name in ("from_hf", "from_paddle"))
    assert np.array_equal(one, other)

    merge_lora(base, adapter, tmp_path / "half", dtype="bfloat16")
    assert locate(tmp_path / "half").dtype == "bfloat16"
    whole = {n: v for f in locate(tmp_path / "from_hf").files for n, v in read_tensors(f)}
    half = {n: v for f in locate(tmp_path / "half").files for n, v in read_tensors(f)}
    assert all(np.array_equal(cast(whole[name], "bfloat16"), half[name]) for name in whole)


def run(root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_command_writes_a_folder_that_is_enough_alone(
    tmp_path: Path, root: Path, base: Checkpoint, reference: dict[str, np.ndarray]
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    load_tokenizer(base.folder, base.config).save(adapter)
    trained_with = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    (adapter / "chat_template.jinja").write_text(trained_with)
    named = ["--model_name_or_path", base.folder, "--lora_path", adapter, "--merge_model_path", tmp_path / "out"]
    done = run(root, "merge_lora_params.py", *named, "--max_shard_size", "60KB", "--export_format", "hf")
    assert done.returncode == 0, done.stderr
    assert "merged model written to" in done.stdout
    merged = locate(tmp_path / "out")
    assert len(merged.files) > 1
    together = adapted_logits(base, adapter, reference["ids"])
    assert np.abs(logits(merged.folder, reference["ids"]) - together).max() < 1e-5
    assert json.loads((merged.folder / "generation_config.json").read_text())["eos_token_id"] == 2
    tokenizer = load_tokenizer(merged.folder, merged.config)
    template = ChatTemplate.load(merged.folder, default=None)
    messages = [{"role": "user", "content": "the hat"}]
    before = ChatTemplate.load(adapter, default=None).encode_prompt(load_tokenizer(adapter, base.config), messages)
    assert template.encode_prompt(tokenizer, messages) == before
    assert tokenizer.decode(before) == "[user]the hat"


def test_command_refuses_before_anything_is_written(tmp_path: Path, root: Path, base: Checkpoint) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    named = ["--model_name_or_path", base.folder, "--lora_path", adapter]
    missing = run(root, "merge_lora_params.py", *named[:2])
    assert missing.returncode == 2
    assert "lora_path is missing" in missing.stderr
    other = ["--model_name_or_path", FIXTURES / "llama_plain", "--lora_path", adapter]
    wrong = run(root, "merge_lora_params.py", *other, "--merge_model_path", tmp_path / "out")
    assert wrong.returncode == 2
    assert "another base" in wrong.stderr
    assert "Traceback" not in missing.stderr + wrong.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_only_an_earlier_merge_is_replaced(tmp_path: Path, base: Checkpoint) -> None:
    (tmp_path / "work").mkdir()
    adapter = make_adapter(tmp_path / "work" / "adapter", base)
    refused = "holds more than an earlier merge"
    with pytest.raises(UserError, match=refused):
        merge_lora(base, adapter, tmp_path / "work")
    assert (adapter / ADAPTER_WEIGHTS).is_file()

    merge_lora(base, adapter, tmp_path / "out")
    merge_lora(base, adapter, tmp_path / "out", export_format="hf")
    assert locate(tmp_path / "out").layout == "hf"
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=refused):
        merge_lora(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("export_format", ["paddle", "hf"])
def test_a_full_disk_leaves_the_earlier_merge(tmp_path: Path, base: Checkpoint, export_format: str) -> None:
    adapter, target = make_adapter(tmp_path / "lora", base), tmp_path / "merged"
    words = ["--model_name_or_path", str(base.folder), "--lora_path", str(adapter), "--merge_model_path", str(target)]
    words += ["--export_format", export_format, "--device", "cpu"]
    run_main("merge_lora_params", words, {}, target, 0)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    for size in (100, 1_000, 20_000):
        with full_disk(size):
            full = run_main("merge_lora_params", words, {}, target, 2)
        assert full.err == f"error: {target}: File too large\n"
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "merged"]


def test_a_merge_that_is_not_finite_leaves_the_earlier_one(tmp_path: Path, base: Checkpoint) -> None:
    """Weights too large for the type, and a base that holds NaN."""
    adapter, target = make_adapter(tmp_path / "lora", base), tmp_path / "merged"
    merge_lora(base, adapter, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    shutil.copytree(base.folder, tmp_path / "base")
    config = json.loads((adapter / "lora_config.json").read_text())
    (adapter / "lora_config.json").write_text(json.dumps({**config, "base_fingerprint": None}))
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    for value, dtype in ((np.nan, None), (-np.inf, "bfloat16"), (1e5, "float16")):
        spoil(tmp_path / "base" / index["weight_map"][name], name, value)
        if value == 1e5:  # fits the type of the base
            merge_lora(locate(tmp_path / "base"), adapter, tmp_path / "wide")
        with pytest.raises(UserError, match=r"merged llama.layers.1.mlp.up_proj.weight would hold NaN or infinity in "):
            merge_lora(locate(tmp_path / "base"), adapter, target, dtype=dtype)
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_a_read_only_file_keeps_the_earlier_merge(tmp_path: Path, base: Checkpoint) -> None:
    """Said before the adapter is read; `chmod u+w` is enough."""
    adapter, target = make_adapter(tmp_path / "lora", base), tmp_path / "merged"
    words = ["--model_name_or_path", str(base.folder), "--lora_path", str(adapter), "--merge_model_path", str(target)]
    words += ["--device", "cpu"]
    run_main("merge_lora_params", words, {}, target, 0)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    weights = target / "model.safetensors"
    weights.chmod(0o444)
    trained = (adapter / ADAPTER_WEIGHTS).read_bytes()
    (adapter / ADAPTER_WEIGHTS).write_bytes(b"damaged")
    refused = run_main("merge_lora_params", words, {}, target, 2)
    assert refused.err == f"error: {weights}: is read-only; chmod u+w allows to replace it\n"
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    (adapter / ADAPTER_WEIGHTS).write_bytes(trained)
    weights.chmod(0o644)
    run_main("merge_lora_params", words, {}, target, 0)


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path, base: Checkpoint) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    config = json.loads((adapter / "lora_config.json").read_text())
    tensors = dict(read_tensors(adapter / ADAPTER_WEIGHTS))
    first = "llama.layers.0.self_attn.q_proj"

    def refuse(says: str, /, changed: dict[str, Any] | None = None, **settings: Any) -> None:
        pairs = {**tensors, **(changed or {})}
        stored = [(name, value) for name, value in pairs.items() if value is not None]
        write_safetensors(adapter / ADAPTER_WEIGHTS, stored, {"format": "np"})
        (adapter / "lora_config.json").write_text(json.dumps({**config, **settings}))
        with pytest.raises(UserError, match=says):
            merge_lora(base, adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refuse(r"lora_A or lora_B is missing for llama.layers.0.self_attn.q_proj", {f"{first}.lora_B": None})
    refuse(r"no LoRA pair.*lm_head.bias", {"lm_head.bias": np.ones(3, np.float32)})
    pair = {f"llama.layers.7.x.lora_{letter}": tensors[f"{first}.lora_{letter}"] for letter in "AB"}
    refuse(r"llama.layers.7.x \(the base has no such layer\)", pair)
    refuse(r"q_proj \(A \[31, 4\]", {f"{first}.lora_A": tensors[f"{first}.lora_A"][:31]})
    refuse(r"another base", base_fingerprint="0" * 64)
    refuse(r"rank 8", r=8)
    refuse(r"r is missing", r=None)
    refuse(r"pissa is set", pissa=True)
    (adapter / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(UserError, match="neither"):
        merge_lora(base, adapter, tmp_path / "out")


def test_peft_adapters_compute_what_peft_computes(
    tmp_path: Path, base: Checkpoint, reference: dict[str, np.ndarray]
) -> None:
    """The adapter and its logits come from PEFT itself, see fixtures/make_llama.py."""
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / "peft_tiny", source)
    for key, rslora in (("peft", False), ("peft_rslora", True)):
        config = json.loads((source / "adapter_config.json").read_text())
        (source / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": rslora}))
        from_peft(source, tmp_path / key, base)
        assert np.abs(reference[key] - reference["tiny"]).max() > 0.1
        assert np.abs(adapted_logits(base, tmp_path / key, reference["ids"]) - reference[key]).max() < 1e-4
        merge_lora(base, tmp_path / key, tmp_path / f"{key}_merged")
        assert np.abs(logits(tmp_path / f"{key}_merged", reference["ids"]) - reference[key]).max() < 1e-4


def test_conversion_there_and_back_changes_nothing(tmp_path: Path, base: Checkpoint) -> None:
    from_peft(FIXTURES / "peft_tiny", tmp_path / "ours", base)
    to_peft(tmp_path / "ours", tmp_path / "theirs", base)
    before = dict(read_tensors(FIXTURES / "peft_tiny" / "adapter_model.safetensors"))
    after = dict(read_tensors(tmp_path / "theirs" / "adapter_model.safetensors"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    old = json.loads((FIXTURES / "peft_tiny" / "adapter_config.json").read_text())
    new = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    old["target_modules"].sort()
    same = new.keys() - {"base_model_name_or_path"}
    assert {key: new[key] for key in same} == {key: old[key] for key in same}


def test_partial_targets_keep_their_layers(tmp_path: Path, base: Checkpoint) -> None:
    """An adapter on some layers only names them in full in both layouts."""
    adapter = make_adapter(tmp_path / "adapter", base)
    config = json.loads((adapter / "lora_config.json").read_text())
    config["target_modules"] = [r"llama\.layers\.1\..*q_proj"]
    (adapter / "lora_config.json").write_text(json.dumps(config))
    tensors = dict(read_tensors(adapter / ADAPTER_WEIGHTS))
    kept = [(name, value) for name, value in tensors.items() if ".layers.1." in name and "q_proj" in name]
    write_safetensors(adapter / ADAPTER_WEIGHTS, kept, {"format": "np"})
    to_peft(adapter, tmp_path / "theirs", base)
    named = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["target_modules"]
    assert named == ["model.layers.1.self_attn.q_proj"]
    from_peft(tmp_path / "theirs", tmp_path / "back", base)
    assert dict(read_tensors(tmp_path / "back" / ADAPTER_WEIGHTS)).keys() == dict(kept).keys()
    ids = np.arange(3, 15)[None]
    merge_lora(base, tmp_path / "back", tmp_path / "merged")
    together = adapted_logits(base, tmp_path / "back", ids)
    assert np.abs(logits(tmp_path / "merged", ids) - together).max() < 1e-5


def test_peft_settings_without_counterpart_are_refused(tmp_path: Path, base: Checkpoint) -> None:
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / "peft_tiny", source)
    config = json.loads((source / "adapter_config.json").read_text())
    for setting, value in (("use_dora", True), ("bias", "all"), ("peft_type", "IA3")):
        (source / "adapter_config.json").write_text(json.dumps({**config, setting: value}))
        with pytest.raises(UserError, match=setting):
            from_peft(source, tmp_path / "out", base)
    (source / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="fit"):
        from_peft(source, tmp_path / "out", locate(_narrower(tmp_path / "narrower")))
    assert not (tmp_path / "out").exists()


def _narrower(folder: Path) -> Path:
    """A base whose down projections take half as many inputs."""
    shutil.copytree(FIXTURES / "llama_tiny", folder)
    for file in sorted(folder.glob("*.safetensors")):
        halved = [(n, v[:, :32] if "down_proj" in n else v) for n, v in read_tensors(file)]
        copies = [(name, np.array(value)) for name, value in halved]
        write_safetensors(file, copies, {"format": "pt"})
    return folder


def test_conversion_command(tmp_path: Path, root: Path, base: Checkpoint) -> None:
    module = ["-m", "utils.checkpoints.convert_peft"]
    done = run(root, *module, "--from-peft", FIXTURES / "peft_tiny", tmp_path / "ours", "--base", base.folder)
    assert done.returncode == 0, done.stderr
    done = run(root, *module, "--to-peft", tmp_path / "ours", tmp_path / "theirs")  # its base is on record
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "theirs" / "adapter_model.safetensors").is_file()
    again = run(root, *module, "--to-peft", tmp_path / "ours", tmp_path / "theirs")
    assert again.returncode == 2
    assert "is there already" in again.stderr
