"""Every JSON file of every family's folder: known keys of the right types, and a dry run on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from family_cases import WITH_TOKENIZER, case
from tiny_runs import Tiny, run_main, write_rows
from tiny_text import tokenize_text

from utils.arguments import FinetuneArguments, PretrainArguments, parse
from utils.errors import UserError
from utils.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
METHODS = {"sft": None, "lora": "lora", "pt": "prefix_tuning", "ptq": "do_ptq", "gptq": "do_gptq", "pretrain": None}
FILES = [f"{family}/{method}_argument.json" for family in FAMILIES for method in METHODS]
FILES += sorted({path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/*_argument.json")} - set(FILES))
PARALLEL = ("tensor_parallel_degree", "pipeline_parallel_degree", "sharding_parallel_degree")


def content(name: str) -> dict[str, object]:
    return json.loads((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_files_and_a_guide(family: str) -> None:
    guide = (ROOT / family / "README.md").read_text(encoding="utf-8")
    for method, option in METHODS.items():
        values = content(f"{family}/{method}_argument.json")
        assert option is None or values[option] is True
        assert f"`{method}_argument.json`" in guide
        assert str(values["model_name_or_path"]) in guide
        assert re.fullmatch(rf"\./checkpoints/\w+_{method}_ckpts", str(values["output_dir"]))
    for written in re.findall(rf"\./({re.escape(family)}/\S+\.json)", guide):
        assert (ROOT / written).is_file()


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("argument_files", ROOT / "tools" / "argument_files.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", FAMILIES)
def test_the_files_of_all_families_are_in_step(family: str, tool: ModuleType) -> None:
    """`python tools/argument_files.py` brings them there."""
    for method in METHODS:
        pattern, own = ((ROOT / name / f"{method}_argument.json").read_text("utf-8") for name in (tool.PATTERN, family))
        assert tool.in_step(pattern, own) == own, method


def test_a_change_reaches_all_families_and_keeps_what_is_theirs(tool: ModuleType) -> None:
    pattern = (ROOT / tool.PATTERN / "sft_argument.json").read_text("utf-8")
    own = (ROOT / "chatglm2" / "sft_argument.json").read_text("utf-8")
    changed = tool.in_step(pattern.replace('"warmup_steps": 30', '"warmup_steps": 31'), own)
    assert json.loads(changed) == {**json.loads(own), "warmup_steps": 31}
    new = json.loads(tool.first(pattern, "another", "house/model"))
    assert new["model_name_or_path"] == "house/model" and new["output_dir"] == "./checkpoints/another_sft_ckpts"
    assert new["dataset_name_or_path"] == "./data"


def tiny_model(family: str) -> Path:
    return next(case(one).folder for one in WITH_TOKENIZER if case(one).checkpoint.family.name == family)


@pytest.mark.parametrize("name", FILES)
def test_file_says_what_the_script_takes(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = content(name)
    if name.endswith("pretrain_argument.json"):
        assert {"min_learning_rate", "max_steps", "split", "continue_training"} <= values.keys()
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "text.idx").touch()
        monkeypatch.chdir(tmp_path)
        run = parse(PretrainArguments, [str(ROOT / name), "--device", "cpu"], "run_pretrain.py")
        assert {key: run.to_json()[key] for key in values} == values
        return
    degrees = [int(str(values.get(key, 1))) for key in PARALLEL]
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", str(max(1, degrees[0]) * max(1, degrees[1]) * max(1, degrees[2])))
    monkeypatch.chdir(ROOT)
    run = parse(FinetuneArguments, [f"./{name}", "--device", "cpu"], "finetune_generation.py")
    parsed = run.to_json()
    assert {key: parsed[key] for key in values} == values


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    tiny = Tiny(tmp_path_factory.mktemp("files"))
    for split in ("train", "dev"):
        write_rows(tiny.data / f"{split}.json", 6)
    return tiny


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("pretrain_argument.json")])
def test_dry_run(name: str, data: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the file itself, with the tiny model of its family for the published one."""
    import finetune_generation

    model = tiny_model(name.split("/")[0])
    for variable, value in data.environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr("utils.runtime.prepare", lambda **_: None)  # done by conftest, before Paddle was loaded
    words = [f"./{name}", "--dry_run", "--model_name_or_path", model, "--dataset_name_or_path", data.data]
    words += ["--output_dir", tmp_path / "out", "--device", "cpu", "--src_length", 64, "--max_length", 128]
    for key in PARALLEL:
        if int(str(content(name).get(key, 1))) > 1:
            words += [f"--{key}", 1]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["finetune_generation.py", *map(str, words)])
    said: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *texts, **_: said.extend(map(str, texts)))
    finetune_generation.main()
    text = "\n".join(said)
    if content(name).keys() & {"do_ptq", "do_gptq"}:  # checked, and refused in a real run of this version
        assert "quantization: " in text and "not part of this version yet" in text
        monkeypatch.setattr("sys.argv", ["finetune_generation.py", *(str(w) for w in words if w != "--dry_run")])
        with pytest.raises(UserError, match="quantization is not part of this version yet"):
            finetune_generation.main()
    else:
        assert "model: " in text and "⟦" in text and "memory per device" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("pretrain_argument.json")])
def test_dry_run_of_pretraining(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the file itself, with its family's tiny model and text, and without that model's weights."""
    folder = tiny_model(name.split("/")[0])
    shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*", "*.npz"))
    text = tokenize_text(folder, tmp_path / "text")
    monkeypatch.chdir(ROOT)
    words = [f"./{name}", "--dry_run", "--input_dir", text, "--output_dir", tmp_path / "out", "--device", "cpu"]
    words += ["--max_seq_length", 32, "--model_name_or_path", tmp_path / "model", "--tokenizer_name_or_path", folder]
    said = run_main("run_pretrain", [str(word) for word in words], {}, tmp_path / "out", 0).out
    assert "min_learning_rate = 3e-05\n" in said and "logging_steps = 1\n" in said
    weights = sum(math.prod(parameter.shape) for parameter in case(folder.name).model.parameters())
    assert f"{weights:,} parameters, all of them trained, from new random weights, seed 42" in said
    assert "steps: 500 of 256 tokens each (8 samples), 128,000 tokens in all" in said
    assert "train data: 4,000 samples of 32 tokens" in said and "dev data: 3 documents" in said
    assert "memory per device, estimated" in said and "would write: " in said
    assert not (tmp_path / "out").exists()
