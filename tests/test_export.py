"""export_model.py and predictor.py --mode static, their mains as users run them: four engines, and everything wrong."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from family_cases import FIXTURES, case, plain
from full_disk import full_disk
from saved import spoil
from tiny_models import write_tiny_llama
from tiny_runs import Tiny, make_tiny
from tiny_runs import run_main as run_script_main

from utils.errors import UserError
from utils.inference import export as exporting
from utils.inference import manifest
from utils.inference.loading import make_engine, prepare
from utils.inference.verify import trial, verify_export
from utils.parallel.topology import Layout

TRAINING: list[object] = ["--do_train", "--max_steps", 12, "--lr_scheduler_type", "constant"]
METHODS: dict[str, list[object]] = {
    "lora": ["--lora"],
    "prefix": ["--prefix_tuning", "--num_prefix_tokens", 6, "--learning_rate", 0.3],
}
QUESTIONS = ["Say red", "Say", "Say blue and then three and four and five " * 3, "What is a house?", "tree " * 9]
QUESTIONS += ["one", "Say green river", "apple tree house river green blue red"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A model, a LoRA adapter, a prefix, and questions of unequal lengths."""
    made = make_tiny(tmp_path_factory.mktemp("export"))
    for name, options in METHODS.items():
        made.run(made.home / name, *TRAINING, *options)
    lines = [json.dumps({"src": question}) + "\n" for question in QUESTIONS]
    (made.home / "questions.json").write_text("".join(lines), encoding="utf-8")
    return made


def run_main(name: str, *options: object, environment: dict[str, str]) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)"""
    done = run_script_main(name, [str(option) for option in options], environment, Path(), None)
    return done.code, done.out, done.err


def export_model(tiny: Tiny, output: Path, *options: object, verify: Any = None) -> tuple[int, str, str]:
    """export_model.py, without its comparison in a new process unless `verify` is one."""
    with mock.patch("export_model.verify_export", verify or (lambda *_: None)):
        return run_main(
            "export_model",
            *("--model_name_or_path", tiny.model, "--output_path", output, "--device", "cpu", *options),
            environment=tiny.environment,
        )


def predict(tiny: Tiny, model: Path, *options: object) -> tuple[int, str, str]:
    return run_main(
        "predictor",
        *("--model_name_or_path", model, "--data_file", tiny.home / "questions.json", "--device", "cpu"),
        *("--output_file", tiny.home / "answers.json", "--src_length", 64, "--max_new_tokens", 12, *options),
        *("--resume", "false"),
        environment=tiny.environment,
    )


def answers(tiny: Tiny, model: Path, *options: object) -> str:
    code, out, err = predict(tiny, model, *options)
    assert code == 0, err + out
    return (tiny.home / "answers.json").read_text(encoding="utf-8")


def refused(done: tuple[int, str, str]) -> str:
    """The one thing that an error says."""
    code, out, err = done
    faults = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(faults) == 1, err + out
    return faults[0]


@pytest.fixture(scope="module")
def exported(tiny: Tiny) -> Path:
    """A plain export, which tests copy before they change it."""
    code, out, err = export_model(tiny, tiny.home / "exported")
    assert code == 0, err + out
    (tiny.home / "said").write_text(out)
    return tiny.home / "exported"


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


# --- answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, *METHODS])
def test_all_four_corners_write_the_same_file(tiny: Tiny, method: str | None, tmp_path: Path) -> None:
    """Of batches of 1, 3 and 8, whose prompts have unequal lengths; the exported ones from elsewhere, alone."""
    adapter: list[object] = [] if method is None else [f"--{method}_path", tiny.home / method]
    base = Tiny(tmp_path / "base")
    shutil.copytree(tiny.model, base.model)
    shutil.copy(tiny.home / "questions.json", base.home)
    found = {}
    for kind in ([], ["--inference_model"]):
        code, out, err = export_model(base, tmp_path / "first", *adapter, *kind)
        assert code == 0, err + out
        moved = tmp_path / f"moved{len(kind)}"
        (tmp_path / "first").rename(moved)
        for batch in (1, 3, 8):
            options = [*kind, "--batch_size", batch]
            found["dynamic", *kind, batch] = answers(base, base.model, *adapter, *options)
    shutil.rmtree(base.model)
    for kind in ([], ["--inference_model"]):
        for batch in (1, 3, 8):
            options = [*kind, "--batch_size", batch, "--mode", "static"]
            found["static", *kind, batch] = answers(base, tmp_path / f"moved{len(kind)}", *options)
    wanted = found["dynamic", 1]
    assert len(set(wanted.splitlines())) == len(QUESTIONS)
    assert {engine for engine, text in found.items() if text != wanted} == set()
    if method is not None:
        assert wanted != answers(tiny, tiny.model)


def test_a_program_overwrites_what_nothing_else_uses(tiny: Tiny, tmp_path: Path) -> None:
    """Paddle falls back to copies without a word where an operator cannot be traced in place."""
    code, _, err = export_model(tiny, tmp_path / "out", "--inference_model")
    assert code == 0, err
    program = (tmp_path / "out" / "model.json").read_text("utf-8")
    layers = re.findall(r'"#":"1\.(\w+)"', program[program.index('"1.if"') :])
    in_place = {"add", "addmm", "flatten", "multiply", "reshape", "scatter", "silu", "softmax"}
    assert {f"{name}_" for name in in_place} <= set(layers)
    assert not in_place & set(layers)


def test_a_second_export_replaces_the_first(tiny: Tiny, folder: Path) -> None:
    (plain,) = [path.read_bytes() for path in folder.glob("*.json") if path.name == manifest.PROGRAM]
    code, out, err = export_model(tiny, folder, "--inference_model")
    assert code == 0, err + out
    assert (folder / manifest.PROGRAM).read_bytes() != plain
    assert "--mode static --inference_model" in out
    answers(tiny, folder, "--mode", "static", "--inference_model")


# --- exports that fail ----------------------------------------------------------------------------------


def test_an_interrupted_export_leaves_no_folder(tiny: Tiny, tmp_path: Path) -> None:
    output = tmp_path / "inference"
    with mock.patch.object(exporting, "write_json", side_effect=KeyboardInterrupt):
        assert export_model(tiny, output)[0] == 130
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_leaves_the_earlier_one(tiny: Tiny, folder: Path) -> None:
    with mock.patch.object(exporting, "save_program", side_effect=KeyboardInterrupt):
        assert export_model(tiny, folder)[0] == 130
    answers(tiny, folder, "--mode", "static")


@pytest.mark.parametrize("size", [3_000, 60_000, 200_000])
def test_a_full_disk_leaves_the_earlier_export(tiny: Tiny, folder: Path, size: int) -> None:
    """Whichever file it is that does not fit; Paddle says nothing of those that it writes."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(before[manifest.PROGRAM]) > 60_000 and len(before[manifest.WEIGHTS]) > 200_000
    with full_disk(size):
        code, _, err = export_model(tiny, folder)
    assert (code, err) == (2, f"error: {folder}: File too large\n")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.glob(".*")) == []


def test_a_read_only_file_keeps_the_earlier_export(tiny: Tiny, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = folder / manifest.WEIGHTS
    weights.chmod(0o444)
    with mock.patch("export_model.prepare", side_effect=AssertionError("a model would load")):
        code, _, err = export_model(tiny, folder)
    weights.chmod(0o644)
    assert (code, err) == (2, f"error: {weights}: is read-only; chmod u+w allows to replace it\n")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_export_that_computes_something_else_is_refused(tiny: Tiny, when: str, tmp_path: Path) -> None:
    """Weights that changed on their way to the disk, before and after their digest was taken."""
    real = exporting.save_program

    def tamper(folder: Path) -> None:
        path = folder / manifest.WEIGHTS
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 4000] = bytes(4000)
        path.write_bytes(content)

    def save(layer: Any, folder: Path, prepared: Any) -> None:
        real(layer, folder, prepared)
        if when == "before":
            tamper(folder)

    def verify(folder: Path, *given: Any) -> None:
        if when == "after":
            tamper(folder)
        verify_export(folder, *given)

    with mock.patch.object(exporting, "save_program", save):
        code, _, err = export_model(tiny, tmp_path / "inference", verify=verify)
    assert code == 2
    assert {"before": "differs from the model", "after": "has changed since the export"}[when] in err
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_named(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.model, tmp_path / "model")
    name = "llama.layers.1.self_attn.o_proj.weight"
    spoil(tmp_path / "model" / "model.safetensors", name, float("nan"))
    said = refused(export_model(Tiny(tmp_path), tmp_path / "out", verify=verify_export))
    assert f"{tmp_path / 'model'}: the weights hold NaN or infinity in {name}; nothing was exported" in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_sound_export_passes_its_comparison(tiny: Tiny, tmp_path: Path) -> None:
    code, out, err = export_model(tiny, tmp_path / "inference", verify=verify_export)
    assert code == 0, err + out


def test_only_an_earlier_export_is_replaced(tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    (folder / "notes.txt").write_text("mine")
    with mock.patch.object(exporting, "save_program") as save:
        for output in (tmp_path / "work", folder, tiny.model):
            assert f"{output}: is there already" in refused(export_model(tiny, output))
    save.assert_not_called()
    assert (tmp_path / "work" / "thesis.txt").read_text() == "years" and (folder / "notes.txt").is_file()


def test_a_lora_of_another_base_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_tiny_llama(tmp_path / "model", seed=11, hidden_size=64, intermediate_size=96, tie_word_embeddings=True)
    other = Tiny(tmp_path)
    with mock.patch("utils.checkpoints.merge.parameters") as weights:
        said = refused(export_model(other, tmp_path / "out", "--lora_path", tiny.home / "lora"))
    assert "trained on another base" in said and not (tmp_path / "out").exists()
    weights.assert_not_called()


# --- folders that do not run ------------------------------------------------------------------------------


def change(name: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        edit(content)
        (folder / name).write_text(json.dumps(content))

    return changed


def cut(folder: Path) -> None:
    path = folder / manifest.WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])


def alter(folder: Path) -> None:
    path = folder / manifest.PROGRAM
    content = path.read_text()
    path.write_text(content.replace("softmax", "softmix", 1))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda folder: (folder / manifest.WEIGHTS).unlink(), "model.pdiparams is missing"),
    "truncated": (cut, "bytes, exported were"),
    "another program": (alter, "model.json: has changed since the export"),
    "another Paddle": (change("export.json", lambda known: known.update(paddle="2.0.0")), "exported by Paddle 2.0.0"),
    "another format": (change("export.json", lambda known: known.update(format=99)), "format 99 is not known"),
    "a torn manifest": (change("export.json", lambda known: known.pop("dtype")), "is damaged"),
    "no manifest": (lambda folder: (folder / "export.json").unlink(), "holds no exported model"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_export_is_refused_before_anything_loads(tiny: Tiny, folder: Path, damage: str) -> None:
    spoil, wanted = DAMAGES[damage]
    spoil(folder)
    with mock.patch("predictor.load") as load:
        said = refused(predict(tiny, folder, "--mode", "static"))
    load.assert_not_called()
    assert wanted in said and "export" in said


def test_the_mode_that_a_folder_needs_is_named(tiny: Tiny, exported: Path) -> None:
    with mock.patch("predictor.load") as load:
        assert "with --mode static" in refused(predict(tiny, exported))
        said = refused(predict(tiny, tiny.model, "--mode", "static"))
        assert "holds no exported model" in said
        assert said.endswith(f"export_model.py --model_name_or_path {tiny.model} --output_path {tiny.model}_static")
        assert "no such folder" in refused(predict(tiny, tiny.home / "nowhere", "--mode", "static"))
        said = refused(predict(tiny, exported, "--mode", "static", "--inference_model"))
        assert "leave --inference_model out" in said
    load.assert_not_called()


def test_the_command_that_is_printed_works(
    tiny: Tiny, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the repository's data lies, as it is."""
    (tmp_path / "data").mkdir()
    shutil.copy(tiny.home / "questions.json", tmp_path / "data" / "dev.json")
    monkeypatch.chdir(tmp_path)
    [command] = re.findall("^run it: python predictor.py (.*)$", (tiny.home / "said").read_text(), re.MULTILINE)
    code, out, err = run_main("predictor", *shlex.split(command), environment=tiny.environment)
    assert code == 0, err + out
    assert len((tmp_path / "output.json").read_text("utf-8").splitlines()) == len(QUESTIONS)


def test_an_exported_inference_model_asks_for_its_flag(tiny: Tiny, tmp_path: Path) -> None:
    assert export_model(tiny, tmp_path / "fused", "--inference_model")[0] == 0
    assert "add --inference_model" in refused(predict(tiny, tmp_path / "fused", "--mode", "static"))


# --- without this toolchain -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2", "bloom_tiny"])
@pytest.mark.parametrize("inference_model", [False, True])
def test_the_program_of_the_guide_decodes_an_export(
    root: Path, name: str, inference_model: bool, tmp_path: Path
) -> None:
    """In a process that knows nothing of this repository."""
    guide = (root / "docs" / "export.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    (tmp_path / "decode.py").write_text(program, encoding="utf-8")
    prepared = prepare(str(FIXTURES / name), device="cpu", dtype="float32", inference_model=inference_model)
    exporting.export(prepared, tmp_path / "inference", device="cpu", verify=lambda *_: None)
    engine, prompt, wanted = plain(case(name)), [5, 9, 11, 8], []
    (slot,), logits = engine.open([prompt])
    for _ in range(10):
        wanted.append(int(logits.argmax()[0][0]))
        logits = engine.advance([slot], [[wanted[-1]]])
    done = subprocess.run(
        [sys.executable, "decode.py", "inference", ",".join(map(str, prompt)), "10"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [int(token) for token in done.stdout.splitlines()[-1].split(",")] == wanted


def test_a_manifest_of_other_types_is_an_error_that_names_the_key(folder: Path) -> None:
    file = folder / manifest.MANIFEST
    known = json.loads(file.read_text(encoding="utf-8"))
    wrong: list[Any] = [None, -1, "x", [], {}, [1], [None], {"a": 1}, {"a": {}}, {"model.json": {"size": 1}}, 10**30]
    first = next(iter(known["files"]))
    for key in known:
        for value in wrong:
            file.write_text(json.dumps({**known, key: value}), encoding="utf-8")
            with contextlib.suppress(UserError):
                manifest.read_export(str(folder), Layout())
    for changed, said in (
        (
            {"files": {**known["files"], first: {"size": "many", "sha256": ""}}},
            f'files.{first}.size is "many"; expected',
        ),
        ({"files": {first: {}}}, f"files.{first} has no size or no sha256"),
        ({"cache": [1, "x"]}, "cache is a list of 2; expected a list of whole numbers"),
    ):
        file.write_text(json.dumps({**known, **changed}), encoding="utf-8")
        with pytest.raises(UserError, match=re.escape(said)):
            manifest.read_export(str(folder), Layout())


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    """Weights load from there, as from anywhere; a program cannot be kept there."""
    model = write_tiny_llama(tmp_path / "model").rename(tmp_path / os.fsdecode(b"mod\xffel"))
    home = Tiny(tmp_path)
    (tmp_path / "questions.json").write_text('{"src": "Say red"}\n', encoding="utf-8")
    code, _, err = predict(home, model)
    assert code == 0, err
    wrong = tmp_path / os.fsdecode(b"ex\xffport")
    for words in (("export_model", "--output_path", wrong), ("predictor", "--mode", "static")):
        folder = wrong if words[0] == "predictor" else model
        data = ("--data_file", tmp_path / "questions.json") if words[0] == "predictor" else ()
        code, _, err = run_main(*words, "--model_name_or_path", folder, *data, "--device", "cpu", environment={})
        assert code == 2 and "only under names in UTF-8; give the folder another name" in err
        wrong.mkdir(exist_ok=True)
        (wrong / manifest.MANIFEST).write_text("{}", encoding="utf-8")


def test_an_export_of_the_version_before_answers_as_its_model(tmp_path: Path) -> None:
    """A plain program of format 2, whose cache is [batch, capacity, kv_heads, head_dim], written by an earlier
    commit."""
    stored, one = FIXTURES / "export_format_2", case("llama_tiny")
    shutil.copytree(one.folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "*.npz"))
    shutil.copy(stored / manifest.WEIGHTS, tmp_path)
    (tmp_path / manifest.PROGRAM).write_bytes(gzip.decompress((stored / "model.json.gz").read_bytes()))
    known = json.loads((stored / manifest.MANIFEST).read_text(encoding="utf-8"))
    (tmp_path / manifest.MANIFEST).write_text(json.dumps({**known, "paddle": manifest.paddle_version()}))
    engine = make_engine(prepare(str(tmp_path), device="cpu", mode="static"), "cpu")
    found, wanted = (trial(each, engine.vocabulary) for each in (engine, plain(one)))
    assert found["tokens"] == wanted["tokens"]
    assert np.abs(np.subtract(found["logits"], wanted["logits"])).max() < 1e-4
