"""Shards of tensor-parallel runs merged back, by the real command; PaddleNLP's own rules cut some of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from family_cases import FIXTURES, NAMES, case, hidden_logits
from full_disk import full_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.checkpoints import Checkpoint, locate
from utils.checkpoints.load import load_model
from utils.checkpoints.match import match
from utils.checkpoints.merge_tp import MERGE_RECORD, TRAINED_CONFIG, merge_tp
from utils.checkpoints.shards import join, part_length, split
from utils.checkpoints.tensors import read_tensors, write_safetensors
from utils.data.template import ChatTemplate
from utils.errors import UserError
from utils.families.tokenizers import load_tokenizer
from utils.model.architecture import ModelShape
from utils.model.weights import Split, Weight

Arrays = dict[str, np.ndarray]


def sizes(heads: int, kv_heads: int, head_dim: int) -> ModelShape:
    return ModelShape(heads * head_dim, 1, heads, kv_heads, head_dim, 4, 9, None, False)


# --- the rules ---------------------------------------------------------------------------------------


@st.composite
def shared(draw: st.DrawFn) -> tuple[np.ndarray, Split | None, ModelShape, int]:
    """A parameter that a degree can share, with numbers that tell every element from the others."""
    degree = draw(st.sampled_from([2, 3, 4]))
    rule: Any = draw(st.sampled_from([None, *get_args(Split)]))
    head_dim, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    model = sizes(kv_heads * degree, kv_heads, head_dim)
    length = {
        "key_value": kv_heads * head_dim,
        "query_key_value": (model.heads + 2 * kv_heads) * head_dim,
        "by_head": 3 * model.heads * head_dim,
        "halves": 2 * degree * draw(st.integers(1, 5)),
        "column": degree * draw(st.integers(1, 5)),
        "row": degree * draw(st.integers(1, 5)),
    }.get(rule, draw(st.integers(1, 40)))
    other = draw(st.integers(1, 4))
    if rule in ("row", "vocabulary"):
        shape: tuple[int, ...] = (length, other)
    else:
        shape = draw(st.sampled_from([(length,), (other, length)]))
    kind = draw(st.sampled_from([np.float32, np.float16, np.uint16]))
    return np.arange(np.prod(shape)).reshape(shape).astype(kind), rule, model, degree


@settings(deadline=None)
@given(shared())
def test_join_undoes_split(drawn: tuple[np.ndarray, Split | None, ModelShape, int]) -> None:
    values, rule, model, degree = drawn
    parts = [split(values, rule, model, degree, rank) for rank in range(degree)]
    assert len({part.shape for part in parts}) == 1
    assert parts[0].dtype == values.dtype
    if rule not in (None, "vocabulary", "vocabulary_columns", "key_value", "query_key_value"):
        assert parts[0].size * degree == values.size  # nothing twice, nothing left out
        assert set(np.concatenate([part.reshape(-1) for part in parts])) == set(values.reshape(-1))
    assert np.array_equal(join(iter(parts), rule, values.shape, model, degree), values)


@settings(deadline=None)
@given(st.integers(1, 50), st.sampled_from([2, 3, 4]), st.integers(0, 90), st.booleans())
def test_padded_vocabularies_lose_their_padding(rows: int, degree: int, more: int, columns: bool) -> None:
    """Padding up to 128 rows a process, in Megatron's manner; the last processes may hold nothing else."""
    rule: Split = "vocabulary_columns" if columns else "vocabulary"
    part = -(-rows // degree) + more
    table = np.arange(1, rows * 2 + 1, dtype=np.float32).reshape(rows, 2)
    values = table.T if columns else table
    parts = [split(values, rule, sizes(1, 1, 1), degree, rank, part) for rank in range(degree)]
    if part != rows:
        assert all(part.shape[1 if columns else 0] == parts[0].shape[1 if columns else 0] for part in parts)
        assert np.array_equal(np.concatenate(parts, 1 if columns else 0).sum(), values.sum())
    assert np.array_equal(join(iter(parts), rule, values.shape, sizes(1, 1, 1), degree), values)


def test_few_key_value_heads() -> None:
    """Two heads in four processes: one each, or both in all, where a process trains only the one it reads."""
    model = sizes(4, 2, 3)
    whole = np.arange(12, dtype=np.float32).reshape(2, 6)
    single = [split(whole, "key_value", model, 4, rank, 3) for rank in range(4)]
    assert np.array_equal(single[0], single[1]) and np.array_equal(single[2], whole[:, 3:])
    assert np.array_equal(join(iter(single), "key_value", whole.shape, model, 4), whole)
    copies = [split(whole, "key_value", model, 4, rank).copy() for rank in range(4)]
    for copy in copies[:2]:
        copy[:, :3] += 100
    joined = join(iter(copies), "key_value", whole.shape, model, 4)
    assert np.array_equal(joined, np.concatenate([whole[:, :3] + 100, whole[:, 3:]], 1))


@pytest.mark.parametrize("rule", ["column", "row", "query_key_value", "by_head", "halves", "key_value"])
def test_what_cannot_be_shared_is_refused(rule: Split) -> None:
    with pytest.raises(ValueError):
        part_length(rule, 7, sizes(4, 4, 3), 2)
    with pytest.raises(ValueError):
        join(iter([np.zeros((7, 7))] * 2), rule, (13, 13), sizes(4, 4, 3), 2)


# --- the command -------------------------------------------------------------------------------------


def parameters(checkpoint: Checkpoint) -> Arrays:
    """Every parameter in the Paddle layout."""
    return {
        name: np.ascontiguousarray(tensor.read().T if transpose else tensor.read())
        for name, (tensor, transpose) in match(checkpoint).items()
    }


def cut(checkpoint: Checkpoint, degree: int, *, padded: bool = False) -> list[Arrays]:
    """What each process holds; `padded` gives every one a part of a vocabulary that the degree does not divide."""
    whole, shape = parameters(checkpoint), checkpoint.family.shape(checkpoint.config)
    rows = -(-shape.vocabulary // degree)
    weights = checkpoint.family.weights(checkpoint.config)

    def part(weight: Weight, rank: int) -> np.ndarray:
        length = rows if padded and str(weight.split).startswith("vocabulary") else None
        return split(whole[weight.parameter], weight.split, shape, degree, rank, length)

    return [{weight.parameter: part(weight, rank) for weight in weights} for rank in range(degree)]


def save_pdparams(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    import paddle

    paddle.save({name: paddle.to_tensor(values) for name, values in tensors.items()}, str(path))


def write_shards(
    folder: Path, checkpoint: Checkpoint, shards: list[Arrays], save: Callable[[Path, Arrays], None] = save_pdparams
) -> Path:
    """A checkpoint as a tensor-parallel run leaves it."""
    folder.mkdir(parents=True)
    suffix = "pdparams" if save is save_pdparams else "safetensors"
    stem = "model_state" if save is save_pdparams else "model"
    for rank, tensors in enumerate(shards):
        save(folder / f"{stem}.tp{rank:02d}.{suffix}", tensors)
    family = checkpoint.family
    config = {"model_type": family.model_types[0], **family.paddle_config(checkpoint.config), "dtype": "float32"}
    parallel = {"tensor_parallel_degree": len(shards), "tensor_parallel_rank": 0, "tensor_parallel_output": True}
    (folder / "config.json").write_text(json.dumps({**config, **parallel}))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    return folder


def save_safe(path: Path, tensors: Arrays) -> None:
    write_safetensors(path, tensors.items(), {"format": "np"})


def run(root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "merge_tp_params.py", *map(str, arguments)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def same(folder: Path, whole: Arrays) -> None:
    merged = parameters(locate(folder))
    assert merged.keys() == whole.keys()
    for name, values in whole.items():
        assert merged[name].dtype == values.dtype and np.array_equal(merged[name], values), name


@pytest.mark.parametrize("name", NAMES)
def test_every_family_comes_back_with_the_same_logits(tmp_path: Path, root: Path, name: str) -> None:
    checkpoint = case(name).checkpoint
    folder = write_shards(tmp_path / "shards", checkpoint, cut(checkpoint, 2))
    with pytest.raises(UserError, match=r"merge them first: python merge_tp_params\.py --model_name_or_path"):
        locate(folder)
    done = run(root, "--model_name_or_path", folder)
    assert done.returncode == 0, done.stderr
    assert "merged model written to" in done.stdout
    same(folder, parameters(checkpoint))
    merged = locate(folder)
    assert not {"tensor_parallel_degree", "tensor_parallel_rank", "tensor_parallel_output"} & set(merged.config)
    assert json.loads((folder / TRAINED_CONFIG).read_text())["tensor_parallel_degree"] == 2
    ids = case(name).rows[0][None]
    model = load_model(merged, "float32")
    expected = hidden_logits(checkpoint.family, case(name).model, ids)
    assert np.array_equal(hidden_logits(merged.family, model, ids), expected)


# By the name of a case: PaddleNLP's class whose rules cut it.
LIBRARY = {
    "llama_tiny": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "bloom_tiny": "BloomForCausalLM",
    "opt_tiny": "OPTForCausalLM",
    "opt_narrow": "OPTForCausalLM",
    "qwen_tiny": "QWenForCausalLM",
    "chatglm_tiny": "ChatGLMForCausalLM",
    "chatglm2_tiny": "ChatGLMv2ForCausalLM",
    "gpt2_tiny": "GPTForCausalLM",
    "glm_tiny": "GLMForConditionalGeneration",
}


@pytest.mark.parametrize("name", LIBRARY)
def test_shards_cut_by_the_library_come_back(tmp_path: Path, name: str) -> None:
    import paddle
    import paddlenlp.transformers

    checkpoint = case(name).checkpoint
    family, whole = checkpoint.family, parameters(checkpoint)
    given = {**family.paddle_config(checkpoint.config), "tensor_parallel_degree": 2}
    library = getattr(paddlenlp.transformers, LIBRARY[name])
    shards: list[Arrays] = []
    # The library asks users to pad a vocabulary that the degree does not divide; LLaMA and Qwen2 share none then.
    odd = family.shape(checkpoint.config).vocabulary % 2
    padding = {
        weight.parameter: ((0, odd), (0, 0)) if weight.split == "vocabulary" else ((0, 0), (0, odd))
        for weight in family.weights(checkpoint.config)
        if str(weight.split).startswith("vocabulary")
    }
    for rank in range(2):
        config = library.config_class(**given, tensor_parallel_rank=rank)
        actions = library.get_tensor_parallel_convert_actions(config, list(whole), is_split=True, ignore_error=True)
        tensors = {name: np.pad(values, padding.get(name, 0)) for name, values in whole.items()}
        if "opt.decoder.project_in.weight" in actions:  # the library's rule misses its own parameter
            actions["opt.embeddings.project_in.weight"] = actions.pop("opt.decoder.project_in.weight")
        for parameter, action in actions.items():
            if parameter in tensors:
                try:
                    tensors[parameter] = np.asarray(action(tensors[parameter]))
                except (TypeError, ValueError):  # ChatGLM2's rules want tensors
                    tensors[parameter] = action(paddle.to_tensor(tensors[parameter])).numpy()
        shards.append(tensors)
    ours = cut(checkpoint, 2, padded=True)
    for rank in range(2):
        for parameter, values in shards[rank].items():
            assert np.array_equal(values, ours[rank][parameter]), parameter
    folder = write_shards(tmp_path / "shards", checkpoint, shards, save_safe)
    merge_tp(folder, tmp_path / "merged")
    same(tmp_path / "merged", whole)


# --- what is written, and where ------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    checkpoint = case("llama_tiny").checkpoint
    return write_shards(tmp_path / "shards", checkpoint, cut(checkpoint, 2), save_safe)


def test_command_writes_a_folder_that_is_enough_alone(tmp_path: Path, root: Path, shards: Path) -> None:
    checkpoint = case("llama_tiny").checkpoint
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    words = ["--model_name_or_path", shards, "--merge_model_path", tmp_path / "out", "--device", "cpu"]
    done = run(root, *words, "--export_format", "hf", "--max_shard_size", "60KB")
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before
    merged = locate(tmp_path / "out")
    assert merged.layout == "hf" and len(merged.files) > 1
    same(merged.folder, parameters(checkpoint))
    messages = [{"role": "user", "content": "the hat"}]
    templates = [ChatTemplate.load(folder, default=None) for folder in (shards, merged.folder)]
    tokenizer = load_tokenizer(merged.folder, merged.config)
    assert templates[0].encode_prompt(tokenizer, messages) == templates[1].encode_prompt(tokenizer, messages)
    assert (merged.folder / "generation_config.json").read_bytes() == before["generation_config.json"]

    assert run(root, *words, "--dtype", "bfloat16").returncode == 0  # an earlier merge is replaced
    assert locate(tmp_path / "out").dtype == "bfloat16"
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused = run(root, *words)
    assert refused.returncode == 2 and "holds more than an earlier merge" in refused.stderr
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_merging_beside_the_shards_loses_nothing(shards: Path) -> None:
    whole = parameters(case("llama_tiny").checkpoint)
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    merge_tp(shards, max_shard_bytes=40_000)
    merge_tp(shards, shards)
    same(shards, whole)
    assert sorted(path.name for path in shards.glob("model*")) == [
        *("model.safetensors", "model.tp00.safetensors", "model.tp01.safetensors")
    ]
    kept = before.pop("config.json")
    assert (shards / TRAINED_CONFIG).read_bytes() == kept
    assert all((shards / name).read_bytes() == content for name, content in before.items())
    for name in ("model.safetensors", "model_state.pdparams", "pytorch_model.bin.index.json"):
        other = shards.with_name(f"with_{name}")
        shutil.copytree(shards, other, ignore=shutil.ignore_patterns("model.safetensors", "merge_tp.json"))
        (other / name).write_text("somebody's work")
        with pytest.raises(UserError, match="no earlier merge"):
            merge_tp(other)
        assert (other / name).read_text() == "somebody's work"


def test_interrupted_merges_are_taken_up_again(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def fails(source: Path, target: Path) -> None:
        if Path(target).parent == shards and Path(target).name.startswith("model-00002"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(KeyboardInterrupt):
        merge_tp(shards, max_shard_bytes=40_000)
    assert (shards / "config.json").read_bytes() == (shards / TRAINED_CONFIG).read_bytes()
    assert [path.name[:11] for path in shards.glob("model-*")] == ["model-00001"]
    monkeypatch.undo()
    merge_tp(shards)
    same(shards, parameters(case("llama_tiny").checkpoint))
    assert not list(shards.glob("model-*")) and not list(shards.glob(".*tmp*"))


@pytest.mark.parametrize("name", [MERGE_RECORD, TRAINED_CONFIG])
def test_what_stands_beside_the_shards_is_read_with_care(shards: Path, name: str) -> None:
    faults: dict[str, str] = {
        "[]": "expected a JSON object",
        "[" * 100_000: "not valid JSON: .*nested too deeply",
        "{": "not valid JSON",
        '{"files": 5, "tensor_parallel_degree": "a"}': "(files|tensor_parallel_degree) is .*; expected a",
        '{"files": [[]], "tensor_parallel_degree": [2]}': "(files|tensor_parallel_degree) is .*; expected a",
    }
    for text, said in faults.items():
        (shards / name).write_text(text)
        refuse(shards, f"{name}: {said}")
    (shards / name).write_text('{"files": [], "tensor_parallel_degree": "2"}')
    merge_tp(shards)


def test_a_full_disk_leaves_the_earlier_merge_beside_the_shards(shards: Path) -> None:
    merge_tp(shards)
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    with full_disk(20_000), pytest.raises(OSError, match="File too large"):
        merge_tp(shards, dtype="float16")
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_read_only_file_keeps_the_earlier_merge_beside_the_shards(shards: Path, name: str) -> None:
    merge_tp(shards)
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    (shards / name).chmod(0o444)
    with pytest.raises(UserError, match=f"{name}: is read-only; chmod u\\+w allows to replace it"):
        merge_tp(shards, dtype="float16")
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before


def test_pipeline_stages_are_put_together(tmp_path: Path, shards: Path) -> None:
    checkpoint = case("llama_tiny").checkpoint
    for rank, tensors in enumerate(cut(checkpoint, 2)):
        (shards / f"model.tp{rank:02d}.safetensors").unlink()
        first = {name for name in tensors if "embed" in name or "layers.0" in name}
        for stage in range(2):
            held = {name: values for name, values in tensors.items() if (name in first) == (stage == 0)}
            save_safe(shards / f"model.tp{rank:02d}_pp{stage:02d}.safetensors", held)
    merge_tp(shards, tmp_path / "out")
    same(tmp_path / "out", parameters(checkpoint))
    (shards / "model.tp01_pp00.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.tp01_pp00\.safetensors of 4 shards is missing"):
        merge_tp(shards)


# --- what is refused -----------------------------------------------------------------------------------


def refuse(folder: Path, says: str) -> None:
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(UserError, match=says):
        merge_tp(folder)
    assert sorted(path.name for path in folder.iterdir()) == before


def changed(path: Path, change: Callable[[Arrays], Any]) -> None:
    tensors = {name: values.copy() for name, values in read_tensors(path)}
    change(tensors)
    save_safe(path, tensors)


def test_missing_shards(shards: Path) -> None:
    (shards / "model.tp01.safetensors").rename(shards / "model.tp02.safetensors")
    refuse(shards, "config.json says tensor_parallel_degree 2, but model.tp02.safetensors is there")
    config = json.loads((shards / "config.json").read_text())
    (shards / "config.json").write_text(json.dumps({**config, "tensor_parallel_degree": 4}))
    refuse(shards, r"model\.tp01\.safetensors, model\.tp03\.safetensors of 4 shards are missing")
    (shards / "config.json").write_text(json.dumps({**config, "tensor_parallel_degree": 1}))
    refuse(shards, r"model\.tp01\.safetensors of 3 shards is missing")
    (shards / "model.tp02.safetensors").unlink()
    refuse(shards, "do not belong to config.json, or are not all of a run: llama.embed_tokens|llama.layers.0")


def test_shards_of_several_runs(tmp_path: Path, shards: Path) -> None:
    checkpoint = case("llama_tiny").checkpoint
    second = shards / "model.tp01.safetensors"
    kept = second.read_bytes()

    def other_step(tensors: Arrays) -> None:
        tensors["llama.norm.weight"] += np.float32(0.01)

    changed(second, other_step)
    refuse(shards, r"values that all processes hold differ in llama\.norm\.weight")
    save_safe(second, cut(checkpoint, 4)[1])
    refuse(shards, r"several runs lie together: they differ in .*q_proj\.weight \(\[32, 16\] float32, \[32, 8\]")
    second.write_bytes(kept)
    save_pdparams(shards / "model_state.tp00.pdparams", {"x": np.zeros(2, np.float32)})
    refuse(shards, r"\*\.pdparams and \*\.safetensors")


def test_shards_of_another_model(tmp_path: Path, shards: Path) -> None:
    config = json.loads((shards / "config.json").read_text())
    (shards / "config.json").write_text(json.dumps({**config, "intermediate_size": 60}))
    refuse(shards, r"gate_proj\.weight is \[32, 32\] in each of 2 shards, expected \[32, 60\] in all")
    (shards / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    refuse(shards, r"model\.tp00\.safetensors: holds tensors .* llama\.layers\.1")
    (shards / "config.json").write_text(json.dumps({**config, "vocab_size": 4000}))
    refuse(shards, r"embed_tokens\.weight")
    (shards / "config.json").write_text(json.dumps(config))
    changed(shards / "model.tp01.safetensors", lambda tensors: tensors.pop("llama.norm.weight"))
    refuse(shards, r"model\.tp01\.safetensors: the checkpoint is incomplete: no tensor for llama\.norm\.weight")


def test_copies_of_key_value_heads_that_were_trained_apart(tmp_path: Path) -> None:
    """One head of keys in two processes: no single model computes what the two copies compute."""
    checkpoint = case("llama_tiny").checkpoint
    folder = write_shards(tmp_path / "shards", checkpoint, cut(checkpoint, 4), save_safe)
    merge_tp(folder, tmp_path / "out")
    same(tmp_path / "out", parameters(checkpoint))

    def other(tensors: Arrays) -> None:
        tensors["llama.layers.0.self_attn.k_proj.weight"] *= np.float32(1.5)

    changed(folder / "model.tp01.safetensors", other)
    refuse(folder, "k_proj.weight.* were trained apart")


def test_heads_that_are_not_the_embedding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shards of a tied model may hold the embedding a second time; a head with other values is one of its own."""
    checkpoint = case("opt_tiny").checkpoint
    parts = cut(checkpoint, 2, padded=True)
    table = parameters(checkpoint)["opt.embeddings.word_embeddings.weight"]
    for part in parts:
        part["lm_head.decoder_weight"] = table  # whole in every process, as the library keeps it
    folder = write_shards(tmp_path / "shards", checkpoint, parts, save_safe)
    merge_tp(folder, tmp_path / "out")
    same(tmp_path / "out", parameters(checkpoint))
    for rank in range(2):
        changed(folder / f"model.tp{rank:02d}.safetensors", _untie)
    merge_tp(folder, tmp_path / "own")
    assert "hold lm_head.decoder_weight with other values than the embedding" in capsys.readouterr().err
    same(tmp_path / "own", {**parameters(checkpoint), "lm_head.decoder_weight": table + np.float32(1)})


def test_a_head_of_its_own_in_the_shards_of_a_tied_llama(tmp_path: Path) -> None:
    """It keeps a table of its rows there, as the embedding does; untied models keep the transpose."""
    checkpoint = case("llama_3").checkpoint
    parts = cut(checkpoint, 2)
    for part in parts:
        part["lm_head.weight"] = part["llama.embed_tokens.weight"] * np.float32(1.5)
    folder = write_shards(tmp_path / "shards", checkpoint, parts, save_safe)
    merge_tp(folder, tmp_path / "out")
    head = parameters(checkpoint)["llama.embed_tokens.weight"].T * np.float32(1.5)
    same(tmp_path / "out", {**parameters(checkpoint), "lm_head.weight": head})


def _untie(tensors: Arrays) -> None:
    tensors["lm_head.decoder_weight"] += np.float32(1)


def test_damaged_files_and_foreign_pickles(tmp_path: Path, shards: Path) -> None:
    checkpoint = case("llama_tiny").checkpoint
    pickled = write_shards(tmp_path / "pickled", checkpoint, cut(checkpoint, 2))
    for folder, name in ((shards, "model.tp01.safetensors"), (pickled, "model_state.tp01.pdparams")):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        refuse(folder, name)
    (pickled / "model_state.tp01.pdparams").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    refuse(pickled, r"model_state\.tp01\.pdparams: refused: it asks for os\.system to be run")


def test_folders_without_shards(tmp_path: Path, root: Path) -> None:
    refuse(FIXTURES / "llama_tiny", "holds no tensor-parallel shards.*any other model is used as it is")
    (tmp_path / "model_state.tp00_shard01.pdparams").touch()
    shutil.copyfile(FIXTURES / "llama_tiny" / "config.json", tmp_path / "config.json")
    refuse(tmp_path, "tp00_shard01.*without other sharding")
    done = run(root, "--model_name_or_path", tmp_path / "absent")
    assert done.returncode == 2 and "no such folder" in done.stderr and "Traceback" not in done.stderr
