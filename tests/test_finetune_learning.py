"""Every way of finetuning learns, and options change what they say they change and nothing else."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from tiny_runs import Tiny, tensors, tiny, write_rows  # noqa: F401

from utils.kernels import attention

METHODS = {
    "sft": ("--learning_rate", "3e-3"),
    "lora": ("--lora",),
    "prefix": ("--prefix_tuning", "--num_prefix_tokens", "8", "--learning_rate", "0.5"),
    "projection": ("--prefix_tuning", "--num_prefix_tokens", "8", "--prefix_projection"),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls(tiny: Tiny, tmp_path: Path, method: str) -> None:  # noqa: F811
    run = tiny.run(tmp_path, "--do_train", "--do_eval", "--num_train_epochs", 6, *METHODS[method])
    assert len(run.losses) == 6 * 7
    assert run.losses[-7:].mean() < 0.9 * run.losses[:7].mean()
    before = run.losses[0]
    assert run.json("eval_results.json")["eval_loss"] < before


@pytest.mark.parametrize("method", [*METHODS, "dropout"])
def test_recomputation_changes_no_loss(tiny: Tiny, tmp_path: Path, method: str) -> None:  # noqa: F811
    chosen = ("--lora", "--lora_dropout", "0.2") if method == "dropout" else METHODS[method]
    options = ["--do_train", "--max_steps", 4, *chosen]
    with mock.patch.object(attention, "dense_attention", wraps=attention.dense_attention) as counted:
        plain = tiny.run(tmp_path / "plain", *options)
        once = counted.call_count
        again = tiny.run(tmp_path / "recomputed", *options, "--recompute")
    np.testing.assert_allclose(again.losses, plain.losses, atol=1e-6, rtol=0)
    assert len(set(plain.losses)) == 4
    steps, layers = 4, 2
    assert counted.call_count - once == once + steps * layers


@pytest.mark.parametrize("method", ["sft", "lora"])
def test_accumulated_micro_batches_are_one_batch(tiny: Tiny, tmp_path: Path, method: str) -> None:  # noqa: F811
    """Rows with 1 to 60 targets: a mean of micro-batch means would be far off.

    The norms of the gradients are compared too: clipping and Adam hide a wrong scale from the losses.
    """
    data = tmp_path / "data"
    write_rows(data / "train.json", 16, seed=3, longest=30)
    options = ["--do_train", "--num_train_epochs", 2, "--dataset_name_or_path", data, *METHODS[method]]
    whole = tiny.run(tmp_path / "whole", *options, "--per_device_train_batch_size", 4)
    parts = tiny.run(
        tmp_path / "parts", *options, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4
    )
    assert len(whole.losses) == 8
    np.testing.assert_allclose(parts.losses, whole.losses, atol=1e-5, rtol=0)
    norms = [[log["grad_norm"] for log in run.json("trainer_state.json")["log_history"]] for run in (parts, whole)]
    assert len(norms[0]) == 8
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)


def test_lora_plus_multiplies_the_learning_rate_of_b(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    options = ["--do_train", "--lora", "--max_steps", 1, "--lr_scheduler_type", "constant", "--max_grad_norm", 0]
    options += ["--learning_rate", 1e-4]
    tiny.run(tmp_path / "plain", *options)
    tiny.run(tmp_path / "plus", *options, "--lora_plus_scale", 16)
    plain = tensors(tmp_path / "plain" / "lora_model_state.safetensors")
    plus = tensors(tmp_path / "plus" / "lora_model_state.safetensors")
    for name in plain:
        if name.endswith("lora_B"):
            assert np.abs(plain[name]).max() > 0.9e-4
            np.testing.assert_allclose(plus[name], 16 * plain[name], rtol=1e-4)
        else:  # B was zero, so A had no gradient
            np.testing.assert_array_equal(plus[name], plain[name])


def test_lora_options_reach_the_layers(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    options = ["--lora", "--lora_rank", 4, "--lora_alpha", 12, "--rslora", "--lora_target_modules", "q_proj,.*up_proj"]
    run = tiny.run(tmp_path / "a", "--do_train", "--max_steps", 2, *options)
    saved = tensors(run.output / "lora_model_state.safetensors")
    layers = {name.rsplit(".", 1)[0] for name in saved}
    assert layers == {f"llama.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")}
    assert saved["llama.layers.0.self_attn.q_proj.lora_A"].shape == (64, 4)
    config = run.json("lora_config.json")
    assert config["scaling"] == pytest.approx(12 / 2)  # alpha / sqrt(rank)
    assert config["base_model_name_or_path"] == str(tiny.model)
    # dropout is drawn anew at every step, so the same rows give another loss
    dropped = tiny.run(tmp_path / "b", "--do_train", "--max_steps", 2, *options, "--lora_dropout", 0.5)
    assert dropped.losses[0] == pytest.approx(run.losses[0], abs=1e-6)  # B is zero
    assert dropped.losses[1] != run.losses[1]
    wrong = tiny.run(tmp_path / "c", "--do_train", "--lora", "--lora_target_modules", "q_proj,dense", expect=2)
    assert "'dense' matches no Linear layer" in wrong.err and "down_proj" in wrong.err
    assert not wrong.output.exists()


@pytest.mark.parametrize("method", ["lora", "prefix", "projection"])
def test_training_goes_on_from_an_adapter(tiny: Tiny, tmp_path: Path, method: str) -> None:  # noqa: F811
    first = tiny.run(tmp_path / "first", "--do_train", "--do_eval", "--num_train_epochs", 4, *METHODS[method])
    kind = "lora" if method == "lora" else "prefix"
    path = [METHODS[method][0], f"--{kind}_path", first.output]
    evaluated = tiny.run(tmp_path / "evaluated", "--do_eval", *path)
    wanted = first.json("eval_results.json")["eval_loss"]
    assert evaluated.json("eval_results.json")["eval_loss"] == pytest.approx(wanted, abs=1e-6)
    assert not (evaluated.output / "train_results.json").exists()
    second = tiny.run(tmp_path / "second", "--do_train", "--max_steps", 2, "--learning_rate", 0, *path)
    assert second.losses[0] < 0.9 * first.losses[0]
    weights = f"{kind}_model_state.safetensors"
    before, after = tensors(first.output / weights), tensors(second.output / weights)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    option = "lora_rank" if method == "lora" else "num_prefix_tokens"
    other = tiny.run(tmp_path / "third", "--do_train", *path, f"--{option}", 3, expect=2)
    assert f"{option}" in other.err and "leave" in other.err


def test_neftune_adds_noise_in_training_only(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    options = ["--do_train", "--do_eval", "--max_steps", 2, "--learning_rate", 0, "--lora"]
    plain = tiny.run(tmp_path / "plain", *options)
    noisy = tiny.run(tmp_path / "noisy", *options, "--neftune", "--neftune_noise_alpha", 20)
    assert abs(noisy.losses[0] - plain.losses[0]) > 1e-4
    assert noisy.json("eval_results.json") == plain.json("eval_results.json")


def test_neftune_noise_has_the_bound_of_the_paper() -> None:
    import paddle

    from utils.checkpoints.load import new_model
    from utils.families import FAMILIES
    from utils.training.model import TrainingModel

    config = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    base = new_model(FAMILIES["llama"], config, "float32")
    model = TrainingModel(FAMILIES["llama"], base, neftune_alpha=5.0)
    ids = paddle.arange(50).reshape([2, 25])
    model.eval()
    clean = base.llama.embed_tokens(ids).numpy()
    model.train()
    noise = base.llama.embed_tokens(ids).numpy() - clean
    bound = 5.0 / np.sqrt(25 * 32)
    assert 0.95 * bound < np.abs(noise).max() <= bound * (1 + 1e-6)
    assert np.mean(noise**2) == pytest.approx(bound**2 / 3, rel=0.1)  # the variance of a uniform variable


def test_loader_processes_change_nothing(tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    options = ["--do_train", "--do_eval", "--lora", "--max_steps", 3]
    alone = tiny.run(tmp_path / "alone", *options)
    several = tiny.run(tmp_path / "several", *options, "--dataloader_num_workers", 2)
    np.testing.assert_array_equal(several.losses, alone.losses)
    assert several.json("eval_results.json") == alone.json("eval_results.json")
    assert not capfd.readouterr().err  # what the processes themselves say
