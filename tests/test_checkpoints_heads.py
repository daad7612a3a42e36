"""A head that is stored beside the embedding it is declared tied to: dropped if equal, else used, everywhere."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from family_cases import case, hidden_logits
from tiny_runs import Tiny, run_main, tensors, write_rows

from utils.checkpoints import Checkpoint, fingerprint, locate
from utils.checkpoints.load import load_model
from utils.checkpoints.save import save_model
from utils.checkpoints.tensors import cast, write_safetensors
from utils.errors import UserError

HEADS = {
    "llama_3": "lm_head.weight",
    "qwen2": "lm_head.weight",
    "gpt2_tiny": "lm_head.weight",
    "opt_tiny": "lm_head.weight",
}
HEADS |= {"opt_narrow": "lm_head.weight", "bloom_tiny": "lm_head.weight"}


def with_head(folder: Path, source: Path, change: float, dtype: str = "float32", **config: Any) -> Path:
    """A copy of a tied model that stores its head too, as the embedding changed by a factor in its last row."""
    checkpoint = locate(source)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*", "*.npz"))
    stored = {name: tensor.read() for name, tensor in checkpoint.tensors().items()}
    (name,) = (
        name for name in stored if name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight"))
    )
    head = np.array(cast(stored[name], "float32"))
    head[-1] *= 1.0 + change
    pairs = [*stored.items(), ("lm_head.weight", cast(head, dtype))]
    write_safetensors(folder / "model.safetensors", pairs, {"format": "pt" if checkpoint.layout == "hf" else "np"})
    written = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**written, **config}), "utf-8")
    return folder


def logits(checkpoint: Checkpoint, ids: np.ndarray) -> np.ndarray:
    return hidden_logits(checkpoint.family, load_model(checkpoint, "float32"), ids)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_its_own_is_used_and_said(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = locate(with_head(tmp_path / "m", case(name).folder, 0.5))
    assert "lm_head.weight has other values than" in (said := capsys.readouterr().err)
    assert said.count("\n") == 1 and "tie_word_embeddings" in said
    ids = case(name).reference["ids"][:1]
    tied = hidden_logits(found.family, case(name).model, ids)
    own = logits(found, ids)
    np.testing.assert_allclose(own[..., :-1], tied[..., :-1], atol=1e-5)
    np.testing.assert_allclose(own[..., -1], 1.5 * tied[..., -1], atol=1e-4)
    assert fingerprint(found) != fingerprint(case(name).checkpoint)
    for layout in ("paddle", "hf"):  # what is written from it is the same model
        (tmp_path / layout).mkdir()
        model = load_model(found, "float32")
        save_model(tmp_path / layout, model, found.family, found.config, export_format=layout)
        assert np.array_equal(logits(locate(tmp_path / layout), ids), own)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_equal_head_is_dropped(name: str, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = locate(with_head(tmp_path / "m", case(name).folder, 0.0, dtype))
    assert found.family.shape(found.config).tied
    assert capsys.readouterr().err == ""
    assert fingerprint(found) == fingerprint(case(name).checkpoint)


def test_one_value_in_the_last_row_of_a_big_head_is_seen(tmp_path: Path) -> None:
    """Heads are compared whole, in blocks."""
    from utils.checkpoints.heads import with_own_head
    from utils.checkpoints.tensors import in_memory

    plain = case("llama_plain").checkpoint
    table = np.ones((300_001, 32), np.float32)
    for row, column in ((0, 0), (131_072, 31), (300_000, 31)):
        head = table.copy()
        head[row, column] = np.nextafter(np.float32(1), np.float32(2))
        config = {**plain.config, "vocab_size": len(table)}
        pair = {"model.embed_tokens.weight": in_memory("e", table), "lm_head.weight": in_memory("h", table)}
        assert with_own_head(tmp_path, config, plain.family, pair) == config
        pair["lm_head.weight"] = in_memory("h", head)
        assert with_own_head(tmp_path, config, plain.family, pair) == {**config, "tie_word_embeddings": False}
        pair["lm_head.weight"] = in_memory("h", np.ascontiguousarray(head.T))
        assert with_own_head(tmp_path, config, plain.family, pair) == {**config, "tie_word_embeddings": False}


def test_in_the_layout_of_paddle_the_head_may_stand_either_way(tmp_path: Path) -> None:
    """Untied LLaMA keeps [width, vocabulary]; a tied one that was written with its head keeps a table."""
    plain = case("llama_3").checkpoint
    model = load_model(plain, "float32")
    table = model.llama.embed_tokens.weight.numpy()
    head = np.array(table)
    head[-1] *= 1.5
    results = []
    for number, values in enumerate((head, head.T, table, table.T)):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_model(folder, model, plain.family, plain.config)
        stored = {**tensors(folder / "model.safetensors"), "lm_head.weight": np.ascontiguousarray(values)}
        write_safetensors(folder / "model.safetensors", stored.items(), {"format": "np"})
        results.append(logits(locate(folder), case("llama_3").reference["ids"][:1]))
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[2], results[3])
    np.testing.assert_allclose(results[0][..., -1], 1.5 * results[2][..., -1], atol=1e-4)


def test_scripts_do_the_same_as_with_a_model_that_is_declared_untied(tmp_path: Path) -> None:
    """Training, export, merge and all four ways to predict."""
    from tiny_models import write_tiny_llama

    data = write_rows(tmp_path / "data" / "train.json", 8)
    write_rows(tmp_path / "data" / "dev.json", 3, seed=1)
    write_tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    results: dict[str, list[object]] = {}
    for name, tied in (("declared", True), ("own", False)):
        home = tmp_path / name
        tiny = Tiny(home)
        with_head(tiny.model, tmp_path / "tied", -3.0, tie_word_embeddings=tied)
        shutil.copytree(data.parent, tiny.data)
        tiny.run(home / "lora", "--do_train", "--max_steps", 2, "--lora", "--learning_rate", 0.05)
        lora = ["--lora_path", str(home / "lora")]
        run_main(
            "merge_lora_params",
            ["--model_name_or_path", str(tiny.model), *lora, "--merge_model_path", str(home / "merged")],
            tiny.environment,
            home,
            0,
        )
        models = {"dynamic": [str(tiny.model), *lora], "merged": [str(home / "merged")]}
        models["inference"] = [*models["dynamic"], "--inference_model"]
        for kind, extra in (("static", []), ("static inference", ["--inference_model"])):
            words = [
                "--model_name_or_path",
                str(tiny.model),
                *lora,
                "--output_path",
                str(home / kind),
                "--device",
                "cpu",
            ]
            with mock.patch("export_model.verify_export", lambda *_: None):
                run_main("export_model", [*words, *extra], tiny.environment, home, 0)
            models[kind] = [str(home / kind), "--mode", "static", *extra]
        answers = []
        for words in models.values():
            asked = ["--data_file", str(tiny.data / "dev.json"), "--output_file", str(home / "out"), "--device", "cpu"]
            options = ["--max_new_tokens", "8", "--min_length", "8", "--resume", "false"]
            run_main("predictor", ["--model_name_or_path", *words, *asked, *options], tiny.environment, home, 0)
            answers.append((home / "out").read_text("utf-8"))
        results[name] = [answers, [row["loss"] for row in tiny_curve(home / "lora")]]
    assert results["declared"] == results["own"]
    assert len(set(results["own"][0])) == 1  # type: ignore[call-overload]
    plain = tensors(tmp_path / "tied" / "model.safetensors")["llama.embed_tokens.weight"]
    merged = tensors(tmp_path / "declared" / "merged" / "model.safetensors")
    np.testing.assert_array_equal(merged["lm_head.weight"].T[-1], -2.0 * plain[-1])


def tiny_curve(folder: Path) -> list[dict[str, str]]:
    with open(folder / "loss_curve.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["glm_tiny", "chatglm_tiny"])
def test_where_no_model_has_a_head_of_its_own_it_is_refused(name: str, tmp_path: Path) -> None:
    locate(with_head(tmp_path / "same", case(name).folder, 0.0))
    with pytest.raises(UserError, match=r"lm_head.weight has other values than .*word_embeddings"):
        locate(with_head(tmp_path / "other", case(name).folder, 0.5))


@pytest.mark.parametrize("name", ["llama_3", "gpt2_tiny", "opt_tiny", "bloom_tiny"])
def test_an_untied_model_without_a_head_is_told_what_to_do(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(case(name).folder, folder)
    written = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**written, "tie_word_embeddings": False}), "utf-8")
    with pytest.raises(UserError, match=r'no tensor for lm_head.weight; .*set "tie_word_embeddings": true'):
        load_model(locate(folder), "float32")
