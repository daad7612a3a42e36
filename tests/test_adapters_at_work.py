"""Adapters through the scripts: PEFT's folders as they are, ranks and scales by layer, targets that match too much."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from saved import write_lora
from tiny_models import write_tiny_llama
from tiny_runs import Result, Tiny, run_main, tensors, tiny  # noqa: F401

from utils.adapters.lora_files import read_lora
from utils.adapters.targets import matrix_shapes
from utils.checkpoints.convert_peft import to_peft
from utils.checkpoints.files import renew_sizes
from utils.checkpoints.locate import locate


@pytest.fixture(scope="module")
def folders(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # noqa: F811
    """The same adapter, whose layers differ in rank and scale, in both layouts."""
    home, base = tmp_path_factory.mktemp("adapters"), locate(tiny.model)
    ours = write_lora(home / "ours", base, spread=0.1)
    to_peft(ours, home / "peft", base)
    return {"ours": ours, "peft": home / "peft"}


def script(tiny: Tiny, name: str, *options: object, expect: int = 0) -> Result:  # noqa: F811
    return run_main(name, [str(option) for option in options], tiny.environment, Path(), expect)


def answers(tiny: Tiny, model: Path, output: Path, *options: object) -> str:  # noqa: F811
    limits = ("--src_length", 64, "--max_new_tokens", 16, "--device", "cpu", "--output_file", output)
    script(tiny, "predictor", "--model_name_or_path", model, "--data_file", tiny.data / "test.json", *limits, *options)
    return output.read_text("utf-8")


def test_both_layouts_answer_alike_everywhere(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """Dynamic, inference model, exported and merged: one text, also where the head is adapted."""
    model = write_tiny_llama(tmp_path / "model")
    ours = write_lora(tmp_path / "ours", locate(model), spread=0.3)
    to_peft(ours, tmp_path / "peft", locate(model))
    texts = {}
    for name in ("ours", "peft"):
        adapter = ("--lora_path", tmp_path / name)
        texts[name] = answers(tiny, model, tmp_path / "a.json", *adapter)
        texts[f"{name} inference"] = answers(tiny, model, tmp_path / "b.json", "--inference_model", *adapter)
    peft = ("--model_name_or_path", model, "--lora_path", tmp_path / "peft")
    script(tiny, "export_model", *peft, "--output_path", tmp_path / "static", "--device", "cpu")
    texts["static"] = answers(tiny, tmp_path / "static", tmp_path / "c.json", "--mode", "static")
    done = script(tiny, "merge_lora_params", *peft)
    merged = tmp_path / "peft_merged"  # beside the adapter, and it says so
    assert f"merged model written to {merged}:" in done.out
    texts["merged"] = answers(tiny, merged, tmp_path / "d.json")
    assert len(set(texts.values())) == 1, texts
    assert answers(tiny, model, tmp_path / "e.json") not in texts.values()
    assert len({row["output"] for row in map(json.loads, texts["ours"].splitlines())}) > 1


def test_training_goes_on_from_a_peft_folder(tiny: Tiny, folders: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    """Ranks and scales stay those of each layer, through a checkpoint and in the result."""
    base = locate(tiny.model)
    given = read_lora(folders["peft"], base)
    options = ["--do_train", "--do_eval", "--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2, "--lora"]
    whole = tiny.run(tmp_path / "whole", *options, "--lora_path", folders["peft"])
    same = tiny.run(tmp_path / "same", *options, "--lora_path", folders["ours"])
    np.testing.assert_array_equal(same.losses, whole.losses)
    checkpoint = whole.output / "checkpoint-2"
    resumed = tiny.run(
        tmp_path / "on", *options, "--lora_path", folders["peft"], "--resume_from_checkpoint", checkpoint
    )
    np.testing.assert_allclose(resumed.losses[-2:], whole.losses[-2:], atol=1e-6, rtol=0)
    result = read_lora(whole.output, base)
    assert len({result.settings.rank_of(layer) for layer in result.pairs}) == 3
    for layer, (a, _) in given.pairs.items():
        assert result.settings.scale_of(layer) == given.settings.scale_of(layer)
        assert result.pairs[layer][0].shape == a.shape
    again = tiny.run(tmp_path / "again", "--do_eval", "--lora", "--lora_path", whole.output)
    wanted = whole.json("eval_results.json")["eval_loss"]
    assert again.json("eval_results.json")["eval_loss"] == pytest.approx(wanted, abs=1e-6)
    # a checkpoint whose scales are others is no checkpoint of this run
    config = json.loads((checkpoint / "lora_config.json").read_text())
    layer = next(iter(config["alpha_pattern"]))
    config["alpha_pattern"][layer] *= 2
    (checkpoint / "lora_config.json").write_text(json.dumps(config))
    renew_sizes(checkpoint)
    refused = tiny.run(
        tmp_path / "no", *options, "--lora_path", folders["peft"], "--resume_from_checkpoint", checkpoint, expect=2
    )
    assert f"another scale (alpha and rank) of {layer}" in refused.err
    weights = sum(value.size for value in tensors(whole.output / "lora_model_state.safetensors").values())
    planned = tiny.run(tmp_path / "dry", *options, "--lora_path", folders["peft"], "--dry_run")
    assert f" {weights:,} trained beside them" in planned.out


@pytest.mark.parametrize("target", [r".*self_attn.*", r".*", r".*(q_proj|norm)"])
def test_targets_that_match_more_than_linears(tiny: Tiny, tmp_path: Path, target: str) -> None:  # noqa: F811
    """The Linears among them are adapted, the others named; the plan says what the run does."""
    options = ["--do_train", "--max_steps", 2, "--lora", "--lora_target_modules", target]
    planned = tiny.run(tmp_path / "dry", *options, "--dry_run")
    done = tiny.run(tmp_path / "out", *options)
    linears = [name for name in matrix_shapes(locate(tiny.model)) if re.fullmatch(target, name)]
    saved = tensors(done.output / "lora_model_state.safetensors")
    assert {name.rsplit(".", 1)[0] for name in saved} == set(linears) and linears
    assert f" {sum(value.size for value in saved.values()):,} trained beside them" in planned.out
    left = {".*self_attn.*": "llama.layers.0.self_attn", ".*": "llama.embed_tokens"}.get(target, "llama.norm")
    for run in (planned, done):
        assert "which LoRA does not adapt; they are left out" in run.err and left in run.err
    assert tiny.run(tmp_path / "on", "--do_eval", "--lora", "--lora_path", done.output).code == 0
    # PaddleNLP takes target_modules as patterns over all layers, so none may match another one
    assert not any(re.fullmatch(kept, left) for kept in done.json("lora_config.json")["target_modules"])


def test_sizes_out_of_reach_are_refused(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    options = ["--do_train", "--lora", "--lora_rank", 10**9]
    for more in ([], ["--dry_run"]):
        said = tiny.run(tmp_path / "out", *options, *more, expect=2).err
        assert "lora_rank 1000000000 (--lora_rank): no adapted layer" in said and "set it to 64 or less" in said
    prefix = ["--do_train", "--prefix_tuning", "--num_prefix_tokens", 10**15]
    for more in ([], ["--prefix_projection"]):
        said = tiny.run(tmp_path / "out", *prefix, *more, expect=2).err
        assert "num_prefix_tokens 1000000000000000 (--num_prefix_tokens)" in said and "of this machine" in said
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_the_head_is_merged_before_it_is_trained(tmp_path: Path, tiny: Tiny) -> None:  # noqa: F811
    untied = locate(write_tiny_llama(tmp_path / "model"))
    adapter = write_lora(tmp_path / "adapter", untied, ["lm_head"])
    options = ["--lora", "--do_train", "--model_name_or_path", untied.folder, "--lora_path", adapter]
    said = tiny.run(tmp_path / "out", *options, expect=2).err
    assert "adapts the head (lm_head)" in said and "merge_lora_params.py" in said
    options += ["--lora_rank", 7, "--lora_target_modules", "q_proj"]
    assert tiny.run(tmp_path / "out", *options, expect=2).err.count("error:") == 3
